"""Selection of the attention backend: SDPA on a CPU, variable-length flash kernels on a GPU.

A row contains several sequences (packed), or one sequence and padding (padded). In both layouts a sequence begins where
`position_ids` is 0. The kernel receives these boundaries as cu_seqlens, so no `(T, T)` mask is created.

Shapes: B rows, T tokens/row, H heads, K key-value heads, D head size, S sequences in all rows.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, TypedDict, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ropeway.config.params import WeightParams
from ropeway.models.open_model import DTYPES, head_dim
from ropeway.models.sequence_parallel import SequenceGroup
from ropeway.runtime.errors import ConfigError

VARLEN = "ropeway_varlen"  # name of this backend in transformers' AttentionInterface
# Arguments of transformers' attention interface that do not change the result of causal attention without a mask.
_WITHOUT_EFFECT = frozenset((
    "position_ids", "use_cache", "cache_position", "past_key_value", "past_key_values", "output_attentions",
    "output_hidden_states", "return_dict", "output_router_logits", "num_items_in_batch", "position_embeddings",
))  # fmt: skip


class Seen(TypedDict, total=False):
    """What a query of some families sees beside the causal order.

    Attributes:
        window: Positions that it sees, itself included; without it all before it.
        softcap: Scores s become softcap x tanh(s / softcap); without it they stay.
    """

    window: int
    softcap: float


class Kernel(Protocol):
    """Causal attention within each sequence."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float | None, /, **seen: Unpack[Seen]
    ) -> Tensor:
        """Return `(B*T, H, D)` attention of `(B*T, H, D)` queries, `(B*T, K, D)` keys and values.

        Args:
            q: Queries.
            k: Keys.
            v: Values.
            cu: `(S + 1,)` int32, where each sequence begins, and the end.
            longest: Tokens of the longest sequence.
            scale: Factor of the scores; None: 1 / sqrt(D).
            seen: What a query sees beside the causal order.
        """


PROBE_LENGTHS = (40, 1, 87)  # tokens of the sequences with which a flash kernel is checked
PROBE_WINDOW = 16  # window of that check, for models with sliding windows


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention backend of a run.

    Attributes:
        requested_flash: `use_flash_attention` of params.yaml.
        effective: Backend, its version and device, for logs.
        kernel: The kernel that gets the sequence boundaries; None: transformers' SDPA.
        rejected: Flash kernels that are installed but do not work here, each with the reason.
    """

    requested_flash: bool
    effective: str
    kernel: Kernel | None = None
    rejected: tuple[str, ...] = ()

    @property
    def implementation(self) -> str:
        """Name of the backend in transformers."""
        return "sdpa" if self.kernel is None else VARLEN


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention heads of a model: H query heads, K key-value heads, head size D.

    Attributes:
        has_window: Whether some layers see a window of positions only.
        softcap: The cap of the scores; None: none.
    """

    query: int
    key_value: int
    size: int
    has_window: bool = False
    softcap: float | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Heads":
        """Return the heads that a model's config.json states."""
        return cls(
            query=config.num_attention_heads,
            key_value=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            size=head_dim(config),
            has_window=bool(getattr(config, "sliding_window", None)),
            softcap=getattr(config, "attn_logit_softcapping", None),
        )


def choose_attention(profile: WeightParams, heads: Heads, device: torch.device) -> Attention:
    """Return the attention backend: SDPA on a CPU; on a GPU a flash kernel if `use_flash_attention` is set, else SDPA.

    On a CPU, packed rows use SDPA per sequence. With a mask over the whole row, SDPA also computes the masked part,
    which made packing no faster than padding (docs/runs.md).

    Raises:
        ConfigError: Flash attention is requested on a GPU in fp32, which flash kernels do not support, or no flash
            kernel works with these heads on this GPU.
    """
    if device.type == "cpu":  # torch.cuda.is_available is no test: DS_ACCELERATOR=cpu leaves a GPU unused
        if profile.layout == "packed" or profile.sequence_parallel > 1 or heads.softcap is not None:
            return Attention(profile.use_flash_attention, "sdpa sequence by sequence (cpu)", attend_each)
        return Attention(profile.use_flash_attention, "sdpa (cpu)")
    if not profile.use_flash_attention:
        if profile.sequence_parallel > 1 or heads.softcap is not None:  # transformers' SDPA has no soft cap
            return Attention(requested_flash=False, effective="sdpa sequence by sequence (cuda)", kernel=attend_each)
        return Attention(requested_flash=False, effective="sdpa (cuda)")
    if profile.dtype == "fp32":
        raise ConfigError(
            "use_flash_attention: expected dtype fp16 or bf16, found fp32; change dtype or set it to false"
        )
    rejected: list[str] = []
    for name, load in FLASH_KERNELS:
        try:
            label, kernel = load(deterministic=profile.deterministic)
        except ModuleNotFoundError:
            rejected.append(f"{name}: not installed")
            continue
        except ImportError as error:
            rejected.append(f"{name}: cannot be imported ({error})")
            continue
        fault = kernel_fault(kernel, heads, DTYPES[profile.dtype], device)
        if fault is None:
            faulty = tuple(reason for reason in rejected if not reason.endswith("not installed"))
            return Attention(requested_flash=True, effective=f"{label} (cuda)", kernel=kernel, rejected=faulty)
        rejected.append(f"{label}: {fault}")
    raise ConfigError(
        f"use_flash_attention: no flash kernel works on this GPU with {heads.query} query heads, {heads.key_value} "
        f"key-value heads of size {heads.size} in {profile.dtype}: {'; '.join(rejected)}. Install one that does, or "
        "set use_flash_attention: false"
    )


def kernel_fault(kernel: Kernel, heads: Heads, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return what is wrong with a kernel, None if it computes causal attention within each sequence.

    Output and gradients of random inputs are compared with SDPA in fp32. The limit of each is a tenth of the
    difference that ignored sequence boundaries make, so it needs no constant per dtype or card.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = sum(PROBE_LENGTHS)
    counts = (heads.query, heads.key_value, heads.key_value, heads.query)
    *inputs, weights = (torch.randn(tokens, count, heads.size, generator=generator) for count in counts)
    rounded = [part.to(device, dtype) for part in inputs]
    ends = torch.tensor([0, *PROBE_LENGTHS]).cumsum(0).to(device, torch.int32)
    joined = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    options: dict[str, Any] = {"window": PROBE_WINDOW} if heads.has_window else {}
    if heads.softcap is not None:
        options["softcap"] = heads.softcap
    probed, exactly = partial(kernel, **options), partial(attend_each, **options)
    try:
        found = _output_and_gradients(probed, rounded, weights.to(device, dtype), ends, max(PROBE_LENGTHS))
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    exact = [part.float() for part in rounded]
    upstream = weights.to(device, dtype).float()
    expected = _output_and_gradients(exactly, exact, upstream, ends, max(PROBE_LENGTHS))
    mistaken = _output_and_gradients(exactly, exact, upstream, joined, tokens)
    for name, mine, right, wrong in zip(
        ("output", *(f"gradient of {x}" for x in "qkv")), found, expected, mistaken, strict=True
    ):
        if mine.shape != right.shape:
            return f"{name} has shape {tuple(mine.shape)}, expected {tuple(right.shape)}"
        worst, allowed = float((mine.float() - right).abs().max()), float((wrong - right).abs().max()) / 10
        if not worst <= allowed:
            return f"{name} differs by {worst:.2g} from SDPA in fp32, expected at most {allowed:.2g}"
    return None


def _output_and_gradients(
    kernel: Callable[..., Tensor], inputs: list[Tensor], weights: Tensor, ends: Tensor, longest: int
) -> list[Tensor]:
    """Return the output and the gradients of q, k and v, each detached; `weights` is the gradient of the output."""
    query, key, value = leaves = [part.detach().requires_grad_() for part in inputs]
    out = kernel(query, key, value, ends, longest, None)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def register_attention(kernel: Kernel, sequence: SequenceGroup | None = None) -> None:
    """Register the kernel in transformers as `VARLEN`; transformers creates no masks for this name."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, partial(varlen_attention, kernel=kernel, sequence=sequence))


def flash_attention_3(*, deterministic: bool) -> tuple[str, Kernel]:
    """Return (name with version, kernel) of FlashAttention-3, which runs on Hopper GPUs (sm90)."""
    from flash_attn_interface import flash_attn_varlen_func

    return f"FlashAttention-3 {_version('flash_attn_3')}", _from_flash_attn(
        flash_attn_varlen_func, deterministic=deterministic
    )


def flash_attention_2(*, deterministic: bool) -> tuple[str, Kernel]:
    """Return (name with version, kernel) of flash-attn."""
    from flash_attn import flash_attn_varlen_func

    return f"flash-attn {_version('flash_attn')}", _from_flash_attn(flash_attn_varlen_func, deterministic=deterministic)


def _from_flash_attn(function: Callable[..., Any], *, deterministic: bool) -> Kernel:
    options: dict[str, Any] = {"causal": True, "deterministic": deterministic}

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float | None, **seen: Unpack[Seen]
    ) -> Tensor:
        more: dict[str, Any] = {"softcap": seen["softcap"]} if "softcap" in seen else {}
        if "window" in seen:
            more["window_size"] = (seen["window"] - 1, 0)
        return _only_output(function(q, k, v, cu, cu, longest, longest, softmax_scale=scale, **options, **more))

    return attend


def torch_varlen(**_: bool) -> tuple[str, Kernel]:
    """Return (name with version, kernel) of PyTorch's flash kernel for several sequences.

    torch 2.11 has no `enable_gqa`; key-value heads are repeated there. Its backward pass is deterministic if
    `torch.use_deterministic_algorithms` is set.
    """
    from torch.nn.attention.varlen import varlen_attn

    grouping = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float | None, **seen: Unpack[Seen]
    ) -> Tensor:
        if "softcap" in seen:
            raise NotImplementedError("it has no soft cap of scores")
        options: dict[str, Any] = {"scale": scale, "window_size": (seen.get("window", 0) - 1, 0)}  # -1: no window
        if (repeats := q.shape[1] // k.shape[1]) > 1:
            if grouping:
                options["enable_gqa"] = True
            else:
                k, v = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
        return _only_output(varlen_attn(q, k, v, cu, cu, longest, longest, **options))

    return f"PyTorch {torch.__version__} varlen", attend


def _only_output(result: Any) -> Tensor:  # noqa: ANN401 - some versions also return the log-sum-exp
    out: Tensor = result if isinstance(result, Tensor) else result[0]
    return out


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


# Best first.
FLASH_KERNELS: tuple[tuple[str, Callable[..., tuple[str, Kernel]]], ...] = (
    ("FlashAttention-3", flash_attention_3),
    ("flash-attn", flash_attention_2),
    ("PyTorch's varlen", torch_varlen),
)


def attend_each(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    _longest: int,
    scale: float | None,
    **seen: Unpack[Seen],
) -> Tensor:
    """Return the attention of each sequence, computed with SDPA: the CPU substitute of a flash kernel."""
    lengths = (cu[1:] - cu[:-1]).tolist()
    sequences = zip(*(part.transpose(0, 1)[None].split(lengths, dim=2) for part in (q, k, v)), strict=True)
    outs = [_attend(*parts, scale=scale, window=seen.get("window"), softcap=seen.get("softcap")) for parts in sequences]
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Return the causal attention of one sequence: `(1, H, T, D)` queries, `(1, K, T, D)` keys and values."""
    length, grouped = q.shape[2], q.shape[1] != k.shape[1]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if softcap is None and (window is None or length <= window):
        return sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    at = torch.arange(length, device=q.device)
    distance = at[:, None] - at
    seen = (distance >= 0) & (distance < (window or length))
    if softcap is None:
        return sdpa(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
    repeats = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    capped = (softcap * torch.tanh(scores / softcap)).masked_fill(~seen, -torch.inf)
    return torch.softmax(capped, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def borders(position_ids: Tensor) -> tuple[Tensor, int]:
    """Return (cu_seqlens `(S + 1,)` int32, tokens of the longest sequence) of `(B, T)` positions.

    >>> borders(torch.tensor([[0, 1, 2, 0, 1]]))
    (tensor([0, 3, 5], dtype=torch.int32), 3)
    """
    flat = position_ids.flatten()
    begins = torch.nonzero(flat == 0).flatten()
    ends = torch.cat((begins, begins.new_tensor([len(flat)]))).to(torch.int32)
    return ends, int((ends[1:] - ends[:-1]).max())


def varlen_attention(  # noqa: PLR0913 - the arguments of transformers' interface
    _module: torch.nn.Module,
    *given: Any,  # noqa: ANN401 - query, key, value, attention_mask, as transformers passes them
    kernel: Kernel,
    cu_seqlens: Tensor | None = None,
    longest: int = 0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = True,
    sequence: SequenceGroup | None = None,
    **others: Any,  # noqa: ANN401 - what transformers passes to every backend, and what a family adds
) -> tuple[Tensor, None]:
    """Return `(B, T, H, D)` attention of `(B, H, T, D)` queries, `(B, K, T, D)` keys and values.

    With `sequence`, T are this rank's tokens of rows that the group shares; `cu_seqlens` are of whole rows.

    Raises:
        ConfigError: A mask, dropout or an argument of a family's own that the kernel would silently ignore.
    """
    *parts, attention_mask = given
    if attention_mask is not None:
        raise ConfigError(
            "attention: expected no attention_mask with cu_seqlens, found one; pass rows without attention_mask"
        )
    if cu_seqlens is None:
        raise ConfigError("attention: the model's code does not pass the boundaries of sequences on to its attention")
    unknown = [name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT]
    unknown += [f"dropout {dropout:g}"] if dropout else []
    unknown += ["no causal order"] if is_causal is False else []
    if unknown:
        raise ConfigError(
            f"attention: this model's attention has {', '.join(unknown)}, which the kernels of this project do not have"
        )
    by_token = [part.transpose(1, 2) for part in parts]
    if sequence is not None:
        by_token = sequence.to_heads(by_token)
    batch, length, _heads, _size = by_token[0].shape
    query, key, value = (part.flatten(0, 1) for part in by_token)
    stated = {"window": sliding_window, "softcap": softcap}
    options: dict[str, Any] = {name: value for name, value in stated.items() if value is not None}
    out = kernel(query, key, value, cu_seqlens, longest, scaling, **options).unflatten(0, (batch, length))
    return out if sequence is None else sequence.to_tokens(out), None
