"""Files of the workspace that paths or globs name: regular ones, and none that a link leads astray to."""

import glob
import json
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from ropeway.runtime.errors import ConfigError
from ropeway.runtime.manifest import file_sha256, write_json
from ropeway.stages.fetch.decompress import COMPRESSED
from ropeway.stages.fetch.files import READERS, check_format
from ropeway.stages.fetch.patterns import check_splits, is_glob

_ENTRY_ITEMS = 2  # of the digest cache: size, times and inode; sha256
_TICK_NS = 2_000_000_000  # the coarsest clock of a file system in use, FAT's


def find_files(patterns: list[str], root: Path, splits: Sequence[str] = ()) -> dict[str, Path]:
    """Return the files that these paths or globs name, by the name they have below `root`, sorted.

    A pattern may name a place outside (an absolute path, or `..`). A symbolic link is followed when it ends below the
    workspace, or below the place outside that the pattern itself names; else it is refused, since what stands in
    `paths` would not be what is read.

    Raises:
        ConfigError: A pattern names no file, files of several splits that `splits` does not name, or something that is
            not a readable regular file of a known format.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        names = sorted(glob.glob(pattern, root_dir=root, recursive=True))  # noqa: PTH207 - absolute patterns too
        allowed = _allowed(pattern, root)
        files = {os.path.normpath(name): root / name for name in names if _is_wanted(root / name, pattern, allowed)}
        if not files:
            raise ConfigError(f"sources: '{pattern}' names no file below {root}; put it there or correct `paths`")
        for name in files:
            check_format(name)
        check_splits(pattern, files, splits)
        found |= files
    return dict(sorted(found.items()))


def digest_files(files: dict[str, Path], cache: Path) -> dict[str, str]:
    """Return each file's sha256, hashed only where size, times or inode are not those that `cache` (JSON) remembers.

    Raises:
        ConfigError: This user may not read a file.
    """
    before = _load_digests(cache)
    known = dict(before)
    found, now = {}, time.time_ns()
    for name, path in files.items():
        stat_ = path.stat()
        key = [stat_.st_size, stat_.st_mtime_ns, stat_.st_ctime_ns, stat_.st_ino]
        remembered = known.get(str(path))
        if not remembered or remembered[0] != key:
            remembered = [key, _digest_file(path)]
        # A file that was touched just now may be written once more within one tick of its clock: hash it again.
        if now - stat_.st_ctime_ns > _TICK_NS:
            known[str(path)] = remembered
        found[name] = str(remembered[1])
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
        raise ConfigError(f"sources: {path}: cannot be read ({error.strerror}); let this user read it") from None


def _is_wanted(path: Path, pattern: str, allowed: tuple[Path, ...]) -> bool:
    """Return False for a folder that a glob passes by; raise ConfigError for anything else that is no file."""
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise ConfigError(f"sources: {path} is a link that leads nowhere ({error}); correct or remove it") from None
    if stat.S_ISDIR(mode):
        if path.suffix in (*READERS, *COMPRESSED) or not is_glob(pattern):
            raise ConfigError(f"sources: {path} is a folder; name its files, as in {pattern.rstrip('/')}/*.jsonl")
        return False
    if not stat.S_ISREG(mode):
        raise ConfigError(f"sources: {path} is a pipe, a socket or a device, not a file; copy its data into a file")
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise ConfigError(
            f"sources: {path} is a link to {real}, outside the workspace; name {real} itself in `paths`, or copy it"
        )
    return True


def _allowed(pattern: str, root: Path) -> tuple[Path, ...]:
    """Return where a pattern's files must really be: in the workspace, or in the place outside that it spells out."""
    parts = Path(pattern).parts
    fixed = next((at for at, part in enumerate(parts) if is_glob(part)), len(parts) - 1)
    place = Path(os.path.normpath(root.joinpath(*parts[:fixed])))
    inside = place.is_relative_to(os.path.normpath(root))
    return (root.resolve(),) if inside else (root.resolve(), place.resolve())
