"""Files of the workspace that paths or globs name: regular ones, and none that a link leads astray to."""

import glob
import os
import stat
from pathlib import Path

from ropeway.errors import ConfigError
from ropeway.fetch.files import FORMATS, check_format
from ropeway.fetch.opening import COMPRESSED
from ropeway.manifest import file_sha256

_MAGIC = "*?["


def find_files(patterns: list[str], root: Path) -> dict[str, Path]:
    """Return the files that these paths or globs name, by the name they have below `root`, sorted.

    A pattern may name a place outside (an absolute path, or `..`). A symbolic link is followed when it ends below the
    workspace, or below the place outside that the pattern itself names; else it is refused, since what stands in
    `paths` would not be what is read.

    Raises:
        ConfigError: A pattern names no file, or something that is not a readable regular file of a known format.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        names = sorted(glob.glob(pattern, root_dir=root, recursive=True))  # noqa: PTH207 - absolute patterns too
        allowed = _allowed(pattern, root)
        files = {os.path.normpath(name): root / name for name in names if _is_wanted(root / name, pattern, allowed)}
        if not files:
            raise ConfigError(f"sources: '{pattern}' names no file below {root}; put it there or mend `paths`")
        for name in files:
            check_format(name)
        found |= files
    return dict(sorted(found.items()))


def digest_file(path: Path) -> str:
    """Return a file's sha256; raise ConfigError when this user may not read it."""
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
        raise ConfigError(f"sources: {path} is a link that leads nowhere ({error}); mend or remove it") from None
    if stat.S_ISDIR(mode):
        if path.suffix in (*FORMATS, *COMPRESSED) or not any(sign in pattern for sign in _MAGIC):
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
    fixed = next((at for at, part in enumerate(parts) if any(sign in part for sign in _MAGIC)), len(parts) - 1)
    place = Path(os.path.normpath(root.joinpath(*parts[:fixed])))
    inside = place.is_relative_to(os.path.normpath(root))
    return (root.resolve(),) if inside else (root.resolve(), place.resolve())
