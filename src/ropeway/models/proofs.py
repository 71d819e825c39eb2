"""Proofs on a model's own first layers that this project's loss and attention compute what the model's own code does.

A family is accepted or refused by what is found here, not by its name. The authority is the model's own forward with
transformers' eager attention; compared are the loss and the gradient of every weight, in fp32 on the CPU.

Shapes: B rows, T tokens.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ropeway.models.attention import VARLEN, attend_each, register_attention
from ropeway.models.supervised_loss import SupervisedLoss
from ropeway.runtime.errors import ConfigError

SDPA, VARIABLE_LENGTH, PACKED = "sdpa", "variable length", "packed"
_ROWS, _TOKENS = 2, 48
_WINDOW = 12  # sliding windows become as short, so that the rows are longer
_VOCABULARY = 512
_MAX_LAYERS = 8
_TOLERANCE = 1e-3  # of losses and of gradients, relative; fp32 rounding is below 1e-5

Proofs = dict[str, str]  # what was tried -> what differs, empty if nothing does


def prove_model(model: PreTrainedModel) -> Proofs:
    """Return what differs, by the way in which attention is computed.

    `sdpa`: transformers' SDPA on padded rows. `variable length`: this project's kernels, which get the boundaries of
    sequences. `packed`: the same with several sequences in a row, compared with each of them alone.
    """
    with torch.random.fork_rng(devices=[]):  # new models draw their weights from the global generator
        small = first_layers(model)
    generator = torch.Generator().manual_seed(0)
    rows = small.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, rows, (_ROWS, _TOKENS), generator=generator)
    expected = _own_loss(small, ids)
    proofs = {}
    for name, implementation in ((SDPA, "sdpa"), (VARIABLE_LENGTH, VARLEN)):
        try:
            with _attention(small, implementation):
                proofs[name] = _difference(small, _our_loss(small, ids), expected)
        except (ConfigError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
            proofs[name] = re.split(r"[.\n] ?", str(error).strip())[0] or type(error).__name__
    proofs[PACKED] = proofs[VARIABLE_LENGTH] or _packed_difference(small, ids)
    return proofs


def check_proof(proofs: Proofs, needed: str, *, where: str) -> None:
    """Raise ConfigError if what a run needs differs from the model's own code; the message says what would work."""
    fault = proofs.get(needed, "")
    if not fault:
        return
    working = [name for name, found in proofs.items() if not found]
    remedies = {
        SDPA: "layout: padded with use_flash_attention: false",
        VARIABLE_LENGTH: "layout: padded",
        PACKED: "layout: packed",
    }
    advice = f"What works: {'; '.join(remedies[name] for name in working)}" if working else "Nothing else works either"
    raise ConfigError(
        f"{where}: with attention `{needed}` the model does not compute what it should: {fault}. {advice}"
    )


def first_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy in fp32 of a model's first layers, at least one of each kind, with few tokens and short windows."""
    config = shorten(model.config)
    small = type(model)(config).float().eval()
    given = model.state_dict()
    own = {}
    for name, part in small.state_dict().items():
        stored = given.get(name)
        if stored is None or stored.dim() != part.dim():
            raise ConfigError(f"model_type {config.model_type}: {name} of a shorter model is not a weight of the model")
        own[name] = stored[tuple(slice(size) for size in part.shape)].float()
    small.load_state_dict(own)
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
    short.num_hidden_layers = min(layers, _MAX_LAYERS, max(2, count))
    for name, value in by_layer.items():
        setattr(short, name, value[: short.num_hidden_layers])
    if getattr(short, "sliding_window", None):
        short.sliding_window = min(short.sliding_window, _WINDOW)
    short.vocab_size = min(config.vocab_size, _VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(short, name, None)
    short.use_cache = False
    return short


@contextmanager
def _attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    if implementation == VARLEN:
        register_attention(attend_each)
    before = model.config._attn_implementation  # noqa: SLF001 - transformers 5.24 has no other name for it
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


_Found = tuple[float, dict[str, Tensor | None]]


def _own_loss(model: PreTrainedModel, ids: Tensor) -> _Found:
    """Return the loss and gradients of the model's own forward with eager attention."""
    with _attention(model, "eager"):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        return _with_gradients(model, loss)


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


def _difference(model: PreTrainedModel, found: _Found, expected: _Found) -> str:
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
    del model
    return ""


@torch.no_grad()
def _packed_difference(model: PreTrainedModel, ids: Tensor) -> str:
    """Return how losses of sequences in one row differ from those of each alone, empty if they do not."""
    lengths = (_TOKENS - 7, 7, _TOKENS)
    row = ids.flatten()[None, : sum(lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with _attention(model, VARLEN):
        together = _losses(model, row, positions)
        alone = torch.cat([_losses(model, part) for part in row.split(lengths, dim=1)])
        joined = _losses(model, row)
    worst = float((together - alone).abs().max())
    inner = positions[0, 1:] > 0
    control = float((joined[inner] - alone).abs().max())
    if not worst <= max(_TOLERANCE * float(alone.abs().max()), control / 100):
        return f"losses in a packed row differ by {worst:.2g} nats from those of each sequence alone"
    return ""
