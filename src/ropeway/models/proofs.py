"""Proofs on a model's own first layers that this project's loss and attention compute what the model's own code does.

A family is accepted or refused by what is found here, not by its name. The authority is the model's own forward with
transformers' eager attention; compared are the loss and the gradient of every weight, in fp32 on the CPU.

Shapes: B rows, T tokens.
"""

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ropeway.models.architectures import PACKED, SDPA, VARIABLE_LENGTH, Proofs
from ropeway.models.attention import VARLEN, attend_each, register_attention
from ropeway.models.open_model import disable_dropout
from ropeway.models.supervised_loss import SupervisedLoss
from ropeway.runtime.errors import ConfigError

_ROWS, _TOKENS = 2, 48
_WINDOW = 12  # sliding windows become as short, so that the rows are longer
_SOFTCAP = 0.5  # soft caps become as low, so that they matter
_VOCABULARY = 512
_OWN = "eager"  # attention of the authority, which is in evaluation mode; the others are as in training
_TOLERANCE = 1e-3  # of losses and of gradients, relative
_ROUNDING = 1e-5  # of losses in fp32, relative


def prove_model(model: PreTrainedModel) -> Proofs:
    """Return what differs, by the way in which attention is computed.

    `sdpa`: transformers' SDPA on padded rows. `variable length`: this project's kernels, which get the boundaries of
    sequences. `packed`: the same with several sequences in a row, compared with each of them alone.
    """
    generator = torch.Generator().manual_seed(0)
    own = first_layers(model, _OWN)
    rows = own.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, rows, (_ROWS, _TOKENS), generator=generator)
    expected = _own_loss(own, ids)
    proofs = {
        SDPA: _tried(lambda: _difference(_our_loss(first_layers(model, "sdpa"), ids), expected)),
        VARIABLE_LENGTH: _tried(lambda: _kernel_difference(model, ids, expected)),
    }
    packed = _tried(lambda: _packed_difference(first_layers(model, VARLEN), ids))
    proofs[PACKED] = proofs[VARIABLE_LENGTH] or packed
    return proofs


def _tried(prove: Callable[[], str]) -> str:
    """Return what a proof finds, or why the model cannot even be tried."""
    try:
        return prove()
    except KeyError as error:
        return f"the model's code has a list of its own of attention kernels, without {error}"
    except (ConfigError, NotImplementedError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        return re.split(r"[.\n] ?", str(error).strip())[0] or type(error).__name__


def _kernel_difference(model: PreTrainedModel, ids: Tensor, expected: "_Found") -> str:
    """Return the difference with this project's kernels, which the model's code has to call."""
    small, calls = first_layers(model, VARLEN), 0

    def counted(*given: Any, **options: Any) -> Tensor:  # noqa: ANN401 - as `Kernel`
        nonlocal calls
        calls += 1
        return attend_each(*given, **options)

    register_attention(counted)
    found = _difference(_our_loss(small, ids), expected)
    register_attention(attend_each)
    return found if calls else "the model's code does not use transformers' interface of attention kernels"


def first_layers(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """Return a copy in fp32 of a model's first layers, at least one of each kind, with few tokens and short windows.

    It is made with this attention implementation, as training makes it; some families cannot change it later.
    """
    config = shorten(model.config)
    if implementation == VARLEN:
        register_attention(attend_each)
    with torch.random.fork_rng(devices=[]):  # new models draw their weights from the global generator
        small = (
            AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation=implementation)
            .float()
            .eval()
        )
    found = small.config._attn_implementation  # noqa: SLF001 - transformers 5.24 has no other name for it
    if found != implementation:
        raise ConfigError(f"the model's code uses attention {found!r} where {implementation!r} was asked for")
    given = model.state_dict()
    own = {}
    for name, part in small.state_dict().items():
        stored = given.get(name)
        if stored is None or stored.dim() != part.dim():
            raise ConfigError(
                f"model_type {config.model_type}: its layers differ in their weights ({name}), so that what the first "
                "ones compute says nothing about the others; choose another base"
            )
        own[name] = stored[tuple(slice(size) for size in part.shape)].float()
    small.load_state_dict(own)
    if implementation != _OWN:
        disable_dropout(small)  # as training does
        small.train()
    return small


def shorten(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config of the first layers: enough to have every kind of layer."""
    short = deepcopy(config)
    layers = config.num_hidden_layers
    by_layer = {
        name: value for name, value in config.to_dict().items() if isinstance(value, list) and len(value) == layers
    }
    kinds = list(zip(*(map(str, value) for value in by_layer.values()), strict=True)) or [()] * layers
    count = next(number for number in range(1, layers + 1) if set(kinds[:number]) == set(kinds))
    short.num_hidden_layers = min(layers, max(2, count))
    for name, value in by_layer.items():
        setattr(short, name, value[: short.num_hidden_layers])
    if getattr(short, "sliding_window", None):
        short.sliding_window = min(short.sliding_window, _WINDOW)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(short, name, None):
            setattr(short, name, min(getattr(short, name), _SOFTCAP))
    short.vocab_size = min(config.vocab_size, _VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # they may exceed the short vocabulary
        try:
            setattr(short, name, None)
        except Exception:  # noqa: BLE001 - some families require a number, each with an error of its own
            setattr(short, name, 0)
    short.use_cache = False
    return short


_Found = tuple[float, dict[str, Tensor | None]]


def _own_loss(model: PreTrainedModel, ids: Tensor) -> _Found:
    """Return the loss and gradients of the model's own forward with eager attention."""
    return _with_gradients(model, model(input_ids=ids, labels=ids, use_cache=False).loss)


def _our_loss(model: PreTrainedModel, ids: Tensor) -> _Found:
    """Return the same from this project's loss, all next tokens supervised."""
    return _with_gradients(model, _losses(model, ids).mean())


def _losses(model: PreTrainedModel, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return the loss of each next token; `positions`, `(B, T)`, restart where a sequence begins."""
    if positions is None:
        positions = torch.arange(ids.shape[1]).expand_as(ids)
    has_next = torch.ones_like(ids, dtype=torch.bool)
    has_next[:, :-1] = positions[:, 1:] > 0
    has_next[:, -1] = False
    losses: Tensor = SupervisedLoss(model)(ids, positions, ids.roll(-1, dims=1), has_next)
    return losses


def _with_gradients(model: PreTrainedModel, loss: Tensor) -> _Found:
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = {name: part.grad for name, part in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), gradients


def _difference(found: _Found, expected: _Found) -> str:
    """Return the first difference of loss and gradients, empty if there is none."""
    (loss, gradients), (own_loss, own_gradients) = found, expected
    if not abs(loss - own_loss) <= _TOLERANCE * abs(own_loss):
        return f"the loss is {loss:.6g}, that of the model's own forward {own_loss:.6g}"
    for name, own in own_gradients.items():
        mine = gradients[name]
        if own is None or mine is None:
            if own is not mine and not (mine is not None and float(mine.abs().max()) == 0):
                return f"only one of the two has a gradient of {name}"
            continue
        distance, size = float((mine - own).norm()), float(own.norm())
        if not distance <= _TOLERANCE * size + 1e-7:
            return f"the gradient of {name} differs by {distance / max(size, 1e-30):.2g} (relative)"
    return ""


@torch.no_grad()
def _packed_difference(model: PreTrainedModel, ids: Tensor) -> str:
    """Return how losses of sequences in one row differ from those of each alone, empty if they do not."""
    lengths = (_TOKENS - 7, 7, _TOKENS)
    row = ids.flatten()[None, : sum(lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    together = _losses(model, row, positions)
    alone = torch.cat([_losses(model, part) for part in row.split(lengths, dim=1)])
    joined = _losses(model, row)
    worst = float((together - alone).abs().max())
    inner = positions[0, 1:] > 0
    control = float((joined[inner] - alone).abs().max())
    if not worst <= max(_ROUNDING * float(alone.abs().max()), control / 10):
        return (
            f"losses in a packed row differ by {worst:.2g} nats from those of each sequence alone (ignored boundaries: "
            f"{control:.2g})"
        )
    return ""
