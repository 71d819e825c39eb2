"""Which attention runs: SDPA on a CPU, variable-length flash kernels on a GPU, both told where sequences begin.

A row may hold several sequences (packed) or one and padding (padded): either way a sequence begins where `position_ids`
is 0, and the kernel gets those borders as cu_seqlens, so no `(T, T)` mask is ever made.

Shapes: B rows, T tokens a row, H heads, K key-value heads, D head size, S sequences in all rows.
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

VARLEN = "ropeway_varlen"  # our name in transformers' AttentionInterface
# (q, k, v, cu_seqlens, longest, scale) -> out; q `(B*T, H, D)`, k and v `(B*T, K, D)`, causal within each sequence.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None], Tensor]


@dataclass(frozen=True, slots=True)
class Attention:
    """What attention runs: asked in params, effective on this machine, its name in transformers, and where it runs."""

    asked_flash: bool
    effective: str
    implementation: str = "sdpa"
    on_cuda: bool = False


def choose_attention(profile: WeightParams, *, cuda: bool) -> Attention:
    """Return the effective attention: PyTorch's SDPA on a CPU, a flash kernel (and no other) on a GPU when asked.

    Packed rows on a CPU get SDPA on each sequence alone: with a mask over a whole row it computes what the mask throws
    away, which made packing no faster than padding (docs/runs.md).

    Raises:
        ConfigError: A GPU was asked for flash attention in fp32, which no flash kernel computes.
    """
    if not cuda and profile.layout == "packed":
        return Attention(profile.use_flash_attention, "sdpa sequence by sequence (cpu)", VARLEN)
    if not cuda:
        return Attention(profile.use_flash_attention, "sdpa (cpu)")
    if not profile.use_flash_attention:
        return Attention(asked_flash=False, effective="sdpa (cuda)")
    if profile.dtype == "fp32":
        raise ConfigError("use_flash_attention: flash kernels need dtype fp16 or bf16, found fp32; change one of them")
    name = "flash-attn" if importlib.util.find_spec("flash_attn") else "PyTorch's varlen flash kernel"
    return Attention(asked_flash=True, effective=f"{name} (cuda)", implementation=VARLEN, on_cuda=True)


def register(kernel: Kernel) -> None:
    """Give transformers this kernel under the name `VARLEN`; its masks are then never made."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, partial(varlen_attention, kernel=kernel))


def varlen_kernel(*, on_cuda: bool) -> Kernel:
    """Return flash-attn's kernel where it is installed, else PyTorch's own, which needs no build; SDPA on a CPU."""
    if not on_cuda:  # not whether there is a card: DS_ACCELERATOR=cpu leaves one unused
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
    """Return what a flash kernel does, by SDPA on each sequence alone; flash kernels have no CPU."""
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
    **_: Any,  # noqa: ANN401 - what transformers passes to every kind of attention
) -> tuple[Tensor, None]:
    """Return `(B, T, H, D)` attention of `(B, H, T, D)` queries, `(B, K, T, D)` keys and values.

    Raises:
        ConfigError: A mask came along: the borders say everything, and a kernel would ignore it without a word.
    """
    *parts, attention_mask = given
    if attention_mask is not None:
        raise ConfigError("attention: a mask was made beside cu_seqlens; pass rows without attention_mask")
    batch, _heads, length, _size = parts[0].shape
    query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in parts)
    out = kernel(query, key, value, cu_seqlens, longest, scaling)
    return out.unflatten(0, (batch, length)), None
