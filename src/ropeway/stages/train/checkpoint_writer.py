"""DeepSpeed's checkpoint engine of a run: keeps which files this rank wrote, and can copy states to write them later.

Reasons for an engine of our own: docs/decisions/0015-background-saves.md.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class CheckpointWriter(CheckpointEngine):
    """Writes and reads files as the engine that DeepSpeed chose does.

    Attributes:
        written: The files of the current save that this rank writes.
        is_copying: Copy the states instead of writing them; `write_copies` then writes them.
    """

    def __init__(self, chosen: CheckpointEngine) -> None:
        """Delegate to `chosen`."""
        super().__init__()
        self._chosen = chosen
        self._copies: list[tuple[object, str]] = []
        self.written: list[Path] = []
        self.is_copying = False

    def create(self, info: CheckpointCommitInfo) -> None:
        """Start a save."""
        self.written, self._copies = [], []
        self._chosen.create(info)

    def save(self, state_dict: object, path: str) -> None:
        """Write a file, or copy what it will hold."""
        self.written.append(Path(path))
        if self.is_copying:
            self._copies.append((copy_to_host(state_dict), path))
        else:
            self._chosen.save(state_dict, path)

    def write_copies(self) -> None:
        """Write the copied states, each freed once it is written; may run in another thread than the training's."""
        while self._copies:
            self._chosen.save(*self._copies.pop(0))

    def load(self, path: str, map_location: object = None) -> Any:  # noqa: ANN401 - whatever the file holds
        """Return the content of a file."""
        return self._chosen.load(path, map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """End a save; return whether it is complete."""
        return bool(self._chosen.commit(info))


def copy_to_host(state: object) -> object:
    """Return a copy of a state dict in host memory, of which torch.save writes the same bytes (of CPU tensors).

    Tensors that share memory in `state`, such as weights in one flat buffer, share it in the copy too. `copy.deepcopy`
    would copy CUDA tensors on the GPU and separate parameters from their buffer.
    """
    storages: dict[StorageWeakRef, torch.UntypedStorage] = {}
    # deepcopy takes the tensors from here and copies all other objects, with the identities that pickle looks at.
    memo: dict[int, object] = {id(tensor): _copy_tensor(tensor, storages) for tensor in _tensors_in(state)}
    return copy.deepcopy(state, memo)


def _tensors_in(state: object) -> Iterator[Tensor]:
    """Yield the tensors of nested mappings, lists and tuples; deepcopy copies those inside other objects."""
    if isinstance(state, Tensor) and state.layout is torch.strided:
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors_in(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors_in(value)


def _copy_tensor(tensor: Tensor, storages: dict[StorageWeakRef, torch.UntypedStorage]) -> Tensor:
    """Return a tensor of the same type, view and attributes on a copy of its storage, one copy for each storage."""
    storage = tensor.untyped_storage()
    key = StorageWeakRef(storage)
    if key not in storages:
        storages[key] = storage.clone() if storage.device.type == "cpu" else storage.cpu()
    copied = torch.empty(0, dtype=tensor.dtype).set_(
        storages[key], tensor.storage_offset(), tensor.size(), tensor.stride()
    )
    if isinstance(tensor, torch.nn.Parameter):
        copied = torch.nn.Parameter(copied, requires_grad=tensor.requires_grad)
    copied.requires_grad_(tensor.requires_grad)
    copied.__dict__.update(tensor.__dict__)
    return copied
