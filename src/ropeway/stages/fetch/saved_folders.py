"""Folders that the library `datasets` writes with `save_to_disk`: arrow files, and a state.json that lists them.

Source: folders written by datasets 5.2. Versions before 2.0 could also write an indices mapping, which selects and
orders the rows of the arrow files; such a folder is refused.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from ropeway.runtime.errors import ConfigError
from ropeway.runtime.json_text import parse_json
from ropeway.stages.fetch.decompress import InputFile, open_decompressed

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
METADATA = (STATE, INFO, SPLITS)
_MAX_BYTES = 64 << 20  # of a metadata file; one that lists a million arrow files has about 50 MB


def find_saved(folder: Path) -> list[Path] | None:
    """Return the metadata and arrow files of a saved folder, also of one with several splits; None if it is not one.

    Raises:
        ConfigError: It has an indices mapping, or lists a file that does not exist.
    """
    if (splits := read_splits(folder / SPLITS)) is not None:
        found = [(split, find_saved(folder / split)) for split in splits]
        if lost := [split for split, files in found if files is None]:
            raise ConfigError(f"sources: {folder / SPLITS} lists the split '{lost[0]}', which is no saved folder")
        return [folder / SPLITS, *(path for _, files in found for path in files or ())]
    if (names := _read_names(folder)) is None:
        return None
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(f"sources: {folder / STATE} lists {name}, which does not exist; copy the whole folder")
    return [folder / STATE, *(folder / name for name in names)]


def is_metadata(path: Path) -> bool:
    """Return whether a file is metadata of a saved folder, which has no records."""
    if path.name == SPLITS:
        return read_splits(path) is not None
    return path.name in METADATA and _read_names(path.parent) is not None


def without_splits_file(names: Iterable[str]) -> list[str]:
    """Return these names without those of dataset_dict.json, which belongs to no split."""
    return [name for name in names if PurePosixPath(name).name != SPLITS]


def add_states(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return these files, by name, and the state.json of every saved folder from which one of them is.

    Raises:
        ConfigError: The folder has an indices mapping, or an arrow file is not one of its data files.
    """
    found = dict(files)
    arrow = {name: path for name, path in files.items() if path.suffix == ".arrow"}
    listed = {folder: _read_names(folder) for folder in {path.parent for path in arrow.values()}}
    for name, path in arrow.items():
        if (names := listed[path.parent]) is not None:
            check_listed(path.parent / STATE, names, [path.name])
            found[os.path.join(os.path.dirname(name), STATE)] = path.parent / STATE  # noqa: PTH118, PTH120 - a name
    return found


def read_state(file: InputFile) -> list[str] | None:
    """Return the names of the arrow files that a state.json lists; None if it is not that of a saved folder.

    Raises:
        ConfigError: Their rows are selected by an indices mapping.
    """
    with open_decompressed(file) as stream:
        state = _parse(stream.read(_MAX_BYTES))
    if not isinstance(state, dict) or not isinstance(listed := state.get("_data_files"), list):
        return None
    if any(value for key, value in state.items() if key.startswith("_indices")):
        raise ConfigError(
            f"sources: {file}: an indices mapping selects rows of the arrow files, which Ropeway does not apply; save "
            "the dataset again after Dataset.flatten_indices()"
        )
    names = [str(one.get("filename")) if isinstance(one, dict) else "" for one in listed]
    if wrong := [name for name in names if PurePosixPath(name).name != name or not name.endswith(".arrow")]:
        raise ConfigError(f"sources: {file}: lists '{wrong[0]}', expected names of .arrow files beside it")
    return names


def read_splits(path: Path) -> list[str] | None:
    """Return the splits that a dataset_dict.json lists; None if there is no such file."""
    value = _parse(path.read_bytes()[:_MAX_BYTES]) if path.is_file() else None
    splits = value.get("splits") if isinstance(value, dict) else None
    is_plain = isinstance(splits, list) and all(isinstance(one, str) and Path(one).name == one for one in splits)
    return splits if is_plain else None


def check_listed(state: object, names: Iterable[str], found: Iterable[str]) -> None:
    """Raise ConfigError if an arrow file beside a state.json is not one that it lists."""
    if more := sorted(set(found) - set(names)):
        raise ConfigError(
            f"sources: {more[0]} is not one of the data files that {state} lists, so it may be a cache of `datasets`; "
            "name the folder instead of its files"
        )


def _read_names(folder: Path) -> list[str] | None:
    return read_state(InputFile.of(folder / STATE)) if (folder / STATE).is_file() else None


def _parse(data: bytes) -> object:
    try:
        return parse_json(data)
    except ValueError:
        return None
