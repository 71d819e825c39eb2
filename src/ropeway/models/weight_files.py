"""Which files transformers reads a model's weights from: only safetensors in the model's own folder are accepted.

`transformers_weights` in a config, an adapter's config and an index can each name other files, which no digest of the
folder covers; with both a single file and an index, transformers reads the first and this project the second.
Source: transformers 5.24, `modeling_utils.py`, `auto_factory.py` and `utils/hub.py`.
"""

from collections.abc import Collection
from pathlib import Path

from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.json_text import parse_json

ADAPTER = "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMED_ELSEWHERE = "transformers_weights"


def check_weight_files(folder: Path) -> None:
    """Raise DataError if a folder is an adapter, or its index of weights is not one of files in the folder alone."""
    if fault := find_adapter([path.name for path in folder.iterdir()]):
        raise DataError(f"{folder}: {fault}")
    if (folder / INDEX).is_file():
        read_weight_map(folder / INDEX)
        if (folder / SINGLE).exists():
            raise DataError(f"{folder}: has {SINGLE} and {INDEX}, so it is ambiguous which weights to load; remove one")


def find_adapter(names: Collection[str]) -> str:
    """Return why files with these names are not a complete model; empty if none is the config of an adapter."""
    if ADAPTER not in {name.casefold() for name in names}:
        return ""
    return (
        f"has {ADAPTER}, so it is an adapter (LoRA), not a complete model. Merge it into its base model (peft's "
        "merge_and_unload, then save_pretrained to a new folder) and use that folder"
    )


def check_weights_name(named: object, *, where: str) -> None:
    """Raise ConfigError if a config's `transformers_weights`, None where it states none, names a file of weights."""
    if named is not None:
        raise ConfigError(
            f"{where}: {NAMED_ELSEWHERE} names the file of the weights, expected {SINGLE} or the files of {INDEX}. "
            "Remove it, and rename the file"
        )


def read_weight_map(index: Path) -> dict[str, str]:
    """Return tensor -> its file, from an index of weights.

    Raises:
        DataError: It is not JSON with a `weight_map` to safetensors in the index's own folder.
    """
    try:
        placed = parse_json(index.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        placed = None
    if not isinstance(placed, dict):
        raise DataError(
            f"{index}: expected JSON with a weight_map of tensors to files; download, pull or package it again"
        )
    for tensor, file in placed.items():
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith(".safetensors"):
            raise DataError(
                f"{index}: its weight_map places {tensor!r:.100} in {file!r:.100}, which is outside of this folder or "
                "no .safetensors file; move all files into it"
            )
    return placed
