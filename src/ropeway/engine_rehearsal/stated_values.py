"""Answers for the operations whose result depends on values, which fake tensors do not have."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class AnswerValues(TorchDispatchMode):
    """States the values that the engine reads, so that no function of a library has to be replaced.

    - A flag read from a tensor (an overflow, a norm that is not finite) is 0.
    - A real number (the gradient norm) is 1.
    - An integer is `longest`: `borders` in models/attention.py alone reads one, the tokens of the longest sequence.
    - `nonzero` finds `sequences` positions: the beginnings of sequences that `borders` looks for.
    - A boolean mask selects every position: the worst case, all positions supervised.
    """

    def __init__(self, *, sequences: int, longest: int) -> None:
        """Answer for rows of `sequences` sequences, the longest with `longest` tokens."""
        super().__init__()
        self.sequences, self.longest = sequences, longest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Answer an operation that needs values; run any other."""
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:  # noqa: SLF001 - the operation behind `.item()`
            return self._read(args[0].dtype)
        if func is aten.nonzero.default:
            return args[0].new_empty((self.sequences, args[0].dim()), dtype=torch.int64)
        if func is aten.index.Tensor and _is_mask(args[1]):
            return _select_all(args[0], args[1][0])
        return func(*args, **kwargs)

    def _read(self, dtype: torch.dtype) -> bool | int | float:
        if dtype in (torch.bool, torch.uint8):
            return 0
        return 1.0 if dtype.is_floating_point else self.longest


def _is_mask(indices: list[torch.Tensor | None]) -> bool:
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool


def _select_all(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty((mask.numel(), *tensor.shape[mask.dim() :]))
