"""Counts the bytes of living storages by device, and answers reads of values that fake tensors do not have."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StorageCounter(TorchDispatchMode):
    """Counts every storage from the operation that returns it until it is garbage collected.

    Attributes:
        now: Bytes of living storages by device.
        peak: Maximum of `now` by device since the last `restart`.
    """

    def __init__(self) -> None:
        """Start with 0 bytes; storages made before this mode is entered are counted when an operation returns them."""
        super().__init__()
        self.now: Counter[torch.device] = Counter()
        self.peak: Counter[torch.device] = Counter()
        self._seen: set[int] = set()

    def restart(self) -> None:
        """Begin a new phase: its peak is at least what lives now."""
        self.peak = Counter(self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run an operation and count the storages of its results."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._count(tensor)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001 - the identity of a storage; Python's wrappers of it come and go
        if key in self._seen:
            return
        size, device = storage.nbytes(), tensor.device
        self._seen.add(key)
        self.now[device] += size
        self.peak[device] = max(self.peak[device], self.now[device])
        weakref.finalize(storage, self._free, key, size, device)

    def _free(self, key: int, size: int, device: torch.device) -> None:
        self._seen.discard(key)
        self.now[device] -= size
