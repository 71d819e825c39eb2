"""Find and hash the local files that paths or globs name; symbolic links out of the workspace are refused."""

import glob
import json
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from ropeway.runtime.errors import ConfigError
from ropeway.runtime.manifest import file_sha256, write_json
from ropeway.stages.fetch.formats import COMPRESSED, FORMATS, check_format, is_archive, split_members
from ropeway.stages.fetch.patterns import check_splits, is_glob
from ropeway.stages.fetch.saved_folders import add_states, find_saved, without_splits_file

_ENTRY_ITEMS = 2  # of the digest cache: size, times and inode; sha256
_CACHE = (".dvc", "cache")  # DVC can link a workspace's files to it
_TICK_NS = 2_000_000_000  # coarsest timestamp resolution of a file system in use: FAT


def find_files(patterns: list[str], root: Path, splits: Sequence[str] = ()) -> dict[str, Path]:
    """Return the files that these paths or globs match: path relative to `root` -> file, sorted.

    A folder that `datasets` saved stands for its files. Of a pattern of an archive's members, this is the archive.

    A pattern may name a folder outside the workspace (an absolute path, or `..`). A symbolic link is followed if its
    target is in the workspace or in the outside folder that the pattern names. Any other link is refused, because the
    file that is read would not be the one in `paths`. So is one to a hidden file, or into a hidden folder but DVC's
    cache: a folder of somebody else's data could have links to `.env` or `.dvc/config.local`.

    Raises:
        ConfigError: A pattern matches no file, files of several splits that `splits` does not name, or something that
            is not a readable regular file of a supported format.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        outer, _ = _split_pattern(pattern, root)
        allowed = _allowed_folders(outer, root)
        files: dict[str, Path] = {}
        for name in _match(outer, root):
            files |= _list_files(name, root, outer, allowed)
        if not files:
            raise ConfigError(f"sources: '{pattern}' matches no file in {root}; add the file or correct `paths`")
        for name in files:
            check_format(name)
        check_splits(pattern, without_splits_file(files), splits)
        found |= files
    return dict(sorted(add_states(found).items()))


def find_members(patterns: list[str], root: Path) -> dict[str, list[str] | None]:
    """Return which members to read of the archives that patterns match: path -> patterns of members, None for all."""
    found: dict[str, list[str] | None] = {}
    for pattern in patterns:
        outer, inner = _split_pattern(pattern, root)
        for name in _match(outer, root):
            add_members(found, os.path.normpath(name), inner)
    return found


def add_members(found: dict[str, list[str] | None], name: str, inner: str | None) -> None:
    """Add a pattern of an archive's members, or None for all of them, to those of `find_members`."""
    known = found.get(name, [])
    if is_archive(name):
        found[name] = None if inner is None or known is None else [*known, inner]


def _split_pattern(pattern: str, root: Path) -> tuple[str, str | None]:
    """Return (pattern of files, pattern of members); a folder may have the name of an archive."""
    outer, inner = split_members(pattern)
    return (pattern, None) if (root / outer).is_dir() else (outer, inner)


def _match(pattern: str, root: Path) -> list[str]:
    return sorted(glob.glob(pattern, root_dir=root, recursive=True))  # noqa: PTH207 - absolute patterns too


def _list_files(name: str, root: Path, pattern: str, allowed: tuple[Path, ...]) -> dict[str, Path]:
    """Return the files that a matched name stands for: itself, the files of a saved folder, or none.

    Raises:
        ConfigError: It is another folder that the pattern names, or no regular file.
    """
    path = root / name
    if _is_regular_file(path, root, allowed):
        return {os.path.normpath(name): path}
    if saved := find_saved(path):
        for file in saved:
            _is_regular_file(file, root, allowed)
        return {os.path.normpath(name / file.relative_to(path)): file for file in saved}
    if path.suffix in (*FORMATS, *COMPRESSED) or not is_glob(pattern):
        raise ConfigError(
            f"sources: {path} is a folder; name its files, e.g. {pattern.rstrip('/')}/*.jsonl (it is not one that "
            "`datasets` saved, which has a state.json or dataset_dict.json)"
        )
    return {}


def digest_files(files: dict[str, Path], cache: Path) -> dict[str, str]:
    """Return each file's sha256; a file is hashed again only if its size, times or inode differ from `cache` (JSON).

    Raises:
        ConfigError: This user has no permission to read a file.
    """
    before = _load_digests(cache)
    known = dict(before)
    found, now = {}, time.time_ns()
    for name, path in files.items():
        stat_ = path.stat()
        key = [stat_.st_size, stat_.st_mtime_ns, stat_.st_ctime_ns, stat_.st_ino]
        cached = known.get(str(path))
        if not cached or cached[0] != key:
            cached = [key, _digest_file(path)]
        # A file changed within the last clock tick may change again without a new timestamp: do not cache its digest.
        if now - stat_.st_ctime_ns > _TICK_NS:
            known[str(path)] = cached
        found[name] = str(cached[1])
    if known != before:
        write_json(cache, known)
    return found


def _load_digests(cache: Path) -> dict[str, list[object]]:
    try:
        known = json.loads(cache.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {path: entry for path, entry in entries if isinstance(entry, list) and len(entry) == _ENTRY_ITEMS}


def _digest_file(path: Path) -> str:
    try:
        return file_sha256(path)
    except PermissionError as error:
        raise ConfigError(
            f"sources: {path}: cannot be read ({error.strerror}); give this user read permission"
        ) from None


def _is_regular_file(path: Path, root: Path, allowed: tuple[Path, ...]) -> bool:
    """Return whether a path is a regular file; False for a folder.

    Raises:
        ConfigError: It is anything else, or a link to a file outside the allowed folders or to a hidden one.
    """
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise ConfigError(f"sources: {path} is a broken link ({error}); correct or remove it") from None
    if stat.S_ISDIR(mode):
        return False
    if not stat.S_ISREG(mode):
        raise ConfigError(
            f"sources: {path} is a pipe, a socket or a device, not a regular file; copy its data to a file"
        )
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise ConfigError(
            f"sources: {path} is a link to {real}, outside the workspace; name {real} itself in `paths`, or copy it"
        )
    stated, top = Path(os.path.normpath(path)), root.resolve()
    if stated.is_relative_to(root):
        stated = top / stated.relative_to(root)
    if real != stated and any(_is_hidden(real, folder) for folder in allowed):
        raise ConfigError(
            f"sources: {path} is a link to {real}, which is hidden and may hold secrets; remove the link, or copy the "
            "file if it is data"
        )
    return True


def _is_hidden(file: Path, folder: Path) -> bool:
    """Return whether a file in a folder has a hidden part below it, other than DVC's cache."""
    inner = file.relative_to(folder).parts if file.is_relative_to(folder) else ()
    return any(part.startswith(".") for part in inner) and inner[: len(_CACHE)] != _CACHE


def _allowed_folders(pattern: str, root: Path) -> tuple[Path, ...]:
    """Return the folders that a pattern's files must be in: the workspace, and the outside folder that it names."""
    parts = Path(pattern).parts
    fixed = next((at for at, part in enumerate(parts) if is_glob(part)), len(parts) - 1)
    place = Path(os.path.normpath(root.joinpath(*parts[:fixed])))
    inside = place.is_relative_to(os.path.normpath(root))
    return (root.resolve(),) if inside else (root.resolve(), place.resolve())
