"""Casts and shards the exported weights, with one shard in memory at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ropeway.models.architectures import EMBEDDING, HEAD
from ropeway.models.open_model import DTYPES, is_finite
from ropeway.models.weight_files import INDEX, SINGLE, read_weight_map
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import write_json
from ropeway.runtime.progress import track

# dtype -> its name in safetensors. Source: its format's README, v0.5.
STORED = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}


@dataclass(frozen=True, slots=True)
class WrittenWeights:
    """Number of parameters written, and their size."""

    parameters: int
    bytes: int


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Return tensor names by shard, in order; only a tensor larger than `limit` has a larger shard.

    >>> plan_shards({"a": 3, "b": 4, "c": 9, "d": 1}, 8)
    [['a', 'b'], ['c'], ['d']]
    """
    shards: list[list[str]] = []
    full = limit
    for name, size in sizes.items():
        if full + size > limit:
            shards.append([])
            full = 0
        shards[-1].append(name)
        full += size
    return shards


def name_shards(count: int) -> list[str]:
    """Return the file names that transformers expects for `count` shards."""
    return [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def write_weights(source: Path, target: Path, *, dtype: str, max_shard_bytes: int, tied: bool) -> WrittenWeights:
    """Write the weights of `source` to `target`, cast and sharded, with an index if there is more than one shard.

    A file is larger than `max_shard_bytes` only if it has a single larger tensor. A head that is `tied` to the
    embedding is not stored.

    Raises:
        DataError: A value does not fit the dtype, or a tied head differs from its embedding.
    """
    files = locate_tensors(source)
    if tied and HEAD in files:
        _check_tied(files)
        del files[HEAD]
    counts = {name: _count(path, name) for name, path in sorted(files.items())}
    width = DTYPES[dtype].itemsize
    shards = plan_shards({name: count * width for name, count in counts.items()}, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for file, names in track(list(zip(name_shards(len(shards)), shards, strict=True)), "files of weights"):
        save_file({name: _cast(files[name], name, dtype) for name in names}, target / file, metadata={"format": "pt"})
        (target / file).chmod(0o644)  # safetensors 0.8 leaves it to its owner alone
        weight_map |= dict.fromkeys(names, file)
    written = WrittenWeights(sum(counts.values()), sum(counts.values()) * width)
    if len(shards) > 1:
        write_json(target / INDEX, {"metadata": {"total_size": written.bytes}, "weight_map": weight_map})
    return written


def locate_tensors(folder: Path) -> dict[str, Path]:
    """Return tensor name -> its file in a folder.

    Raises:
        DataError: The folder has no safetensors, or its index is not one of files in the folder.
    """
    index = folder / INDEX
    if index.is_file():
        return {name: folder / file for name, file in read_weight_map(index).items()}
    if not (folder / SINGLE).is_file():
        raise DataError(f"{folder}: expected {SINGLE} or {INDEX}, found neither. Run `dvc repro train`")
    try:
        with safe_open(folder / SINGLE, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), folder / SINGLE)
    except SafetensorError as error:
        raise _unreadable(folder / SINGLE, error) from None


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a valid safetensors file ({error}); pull or package it again")


def read_dtypes(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (tensor, stored dtype) of a file; only its header is read.

    Raises:
        DataError: It is not a valid safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                yield name, tensors.get_slice(name).get_dtype()
    except SafetensorError as error:
        raise _unreadable(path, error) from None


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Return one tensor of a file."""
    with safe_open(path, framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor


def _count(path: Path, name: str) -> int:
    with safe_open(path, framework="pt") as tensors:
        shape: list[int] = tensors.get_slice(name).get_shape()
    return torch.Size(shape).numel()


def _cast(path: Path, name: str, dtype: str) -> torch.Tensor:
    tensor = read_tensor(path, name)
    cast: torch.Tensor = tensor.to(DTYPES[dtype]).contiguous()
    if not is_finite(cast):
        worst = tensor.abs().max().item()
        raise DataError(
            f"{path}: {name} has values up to {worst:g}, the maximum of {dtype} is "
            f"{torch.finfo(DTYPES[dtype]).max:g}. Set package.dtype to bf16 or fp32, or train again if the value is "
            "not finite"
        )
    return cast


def _check_tied(files: Mapping[str, Path]) -> None:
    """Raise DataError unless head and embedding are equal: ZeRO-2 exports both (transformers 5.24, DeepSpeed 0.19)."""
    head, embedding = (read_tensor(files[name], name) for name in (HEAD, EMBEDDING))
    if not torch.equal(head, embedding):
        raise DataError(
            f"{files[HEAD]}: config.json ties {HEAD} to {EMBEDDING}, but they differ by up to "
            f"{(head.float() - embedding.float()).abs().max().item():g}; a loader would drop one of them. Train again"
        )
