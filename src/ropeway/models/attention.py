"""Selection of the attention backend: SDPA on a CPU, variable-length flash kernels on a GPU.

A row contains several sequences (packed), or one sequence and padding (padded). In both layouts a sequence begins where
`position_ids` is 0. The kernel receives these boundaries as cu_seqlens, so no `(T, T)` mask is created.

Shapes: B rows, T tokens/row, H heads, K key-value heads, D head size, S sequences in all rows.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ropeway.config.params import WeightParams
from ropeway.runtime.errors import ConfigError

VARLEN = "ropeway_varlen"  # name of this backend in transformers' AttentionInterface
# (q, k, v, cu_seqlens, longest, scale) -> out; q `(B*T, H, D)`, k and v `(B*T, K, D)`, causal within each sequence.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None], Tensor]


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention backend of a run.

    Attributes:
        requested_flash: `use_flash_attention` of params.yaml.
        effective: Backend and device that are used, for logs.
        implementation: Name of the backend in transformers.
        on_cuda: Whether a flash kernel runs on a GPU.
    """

    requested_flash: bool
    effective: str
    implementation: str = "sdpa"
    on_cuda: bool = False


def choose_attention(profile: WeightParams, *, cuda: bool) -> Attention:
    """Return the attention backend: SDPA on a CPU; on a GPU a flash kernel if `use_flash_attention` is set, else SDPA.

    On a CPU, packed rows use SDPA per sequence. With a mask over the whole row, SDPA also computes the masked part,
    which made packing no faster than padding (docs/runs.md).

    Raises:
        ConfigError: Flash attention is requested on a GPU in fp32, which flash kernels do not support.
    """
    if not cuda and profile.layout == "packed":
        return Attention(profile.use_flash_attention, "sdpa sequence by sequence (cpu)", VARLEN)
    if not cuda:
        return Attention(profile.use_flash_attention, "sdpa (cpu)")
    if not profile.use_flash_attention:
        return Attention(requested_flash=False, effective="sdpa (cuda)")
    if profile.dtype == "fp32":
        raise ConfigError(
            "use_flash_attention: expected dtype fp16 or bf16, found fp32; change dtype or set it to false"
        )
    name = "flash-attn" if importlib.util.find_spec("flash_attn") else "PyTorch's varlen flash kernel"
    return Attention(requested_flash=True, effective=f"{name} (cuda)", implementation=VARLEN, on_cuda=True)


def register_attention(kernel: Kernel) -> None:
    """Register the kernel in transformers as `VARLEN`; transformers creates no masks for this name."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, partial(varlen_attention, kernel=kernel))


def varlen_kernel(*, on_cuda: bool) -> Kernel:
    """Return the attention kernel: SDPA on a CPU; on a GPU flash-attn's if it is installed, else PyTorch's."""
    if not on_cuda:  # torch.cuda.is_available is no test: DS_ACCELERATOR=cpu leaves a GPU unused
        return attend_each
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        return lambda q, k, v, cu, longest, scale: flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True
        )
    from torch.nn.attention.varlen import varlen_attn

    def attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float | None) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        out = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=grouped)
        return out if isinstance(out, Tensor) else out[0]

    return attend


def attend_each(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, _longest: int, scale: float | None) -> Tensor:
    """Return the attention of each sequence, computed with SDPA: the CPU substitute of a flash kernel."""
    lengths = (cu[1:] - cu[:-1]).tolist()
    sequences = zip(*(part.transpose(0, 1)[None].split(lengths, dim=2) for part in (q, k, v)), strict=True)
    grouped = q.shape[1] != k.shape[1]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    outs = [sdpa(a, b, c, is_causal=True, scale=scale, enable_gqa=grouped) for a, b, c in sequences]
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


def borders(position_ids: Tensor) -> tuple[Tensor, int]:
    """Return (cu_seqlens `(S + 1,)` int32, tokens of the longest sequence) of `(B, T)` positions.

    >>> borders(torch.tensor([[0, 1, 2, 0, 1]]))
    (tensor([0, 3, 5], dtype=torch.int32), 3)
    """
    flat = position_ids.flatten()
    begins = torch.nonzero(flat == 0).flatten()
    ends = torch.cat((begins, begins.new_tensor([len(flat)]))).to(torch.int32)
    return ends, int((ends[1:] - ends[:-1]).max())


def varlen_attention(
    _module: torch.nn.Module,
    *given: Any,  # noqa: ANN401 - query, key, value, attention_mask, as transformers passes them
    kernel: Kernel,
    cu_seqlens: Tensor,
    longest: int,
    scaling: float | None = None,
    **_: Any,  # noqa: ANN401 - other arguments that transformers passes to every backend
) -> tuple[Tensor, None]:
    """Return `(B, T, H, D)` attention of `(B, H, T, D)` queries, `(B, K, T, D)` keys and values.

    Raises:
        ConfigError: `attention_mask` is not None; the kernel would silently ignore it.
    """
    *parts, attention_mask = given
    if attention_mask is not None:
        raise ConfigError(
            "attention: expected no attention_mask with cu_seqlens, found one; pass rows without attention_mask"
        )
    batch, _heads, length, _size = parts[0].shape
    query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in parts)
    out = kernel(query, key, value, cu_seqlens, longest, scaling)
    return out.unflatten(0, (batch, length)), None
