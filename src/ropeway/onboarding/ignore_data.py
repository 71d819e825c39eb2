"""Has git ignore the data of a new profile, as `dvc add` does: DVC records it by digest, and git need not have it.

A local source or base that git neither has nor ignores counts as uncommitted, and the version of such a run cannot be
approved.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ropeway.config.edit import read_exact
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.git import ask_git
from ropeway.runtime.manifest import write_atomic

_MAGIC = re.compile(r"[*?[]")


@dataclass(frozen=True, slots=True)
class IgnoredData:
    """What git ignores from now on, and what it has already.

    Attributes:
        lines: (file relative to the workspace, line that was added to it).
        tracked: Paths of the profile of which git has files: every edit of them counts as uncommitted.
    """

    lines: tuple[tuple[str, str], ...] = ()
    tracked: tuple[str, ...] = ()

    @property
    def files(self) -> list[str]:
        """The files that were written, once each."""
        return list(dict.fromkeys(file for file, _ in self.lines))


def ignore_data(root: Path, paths: Iterable[str]) -> IgnoredData:
    """Add the paths and patterns of a profile to the .gitignore of the folder that they are in.

    Nothing is done outside git, or for a path that is outside the workspace, on another machine, ignored already, or
    tracked.
    """
    lines, tracked = [], []
    for path in dict.fromkeys(paths):
        place = PurePosixPath(path)
        if "://" in path or place.is_absolute() or ".." in place.parts or path in ("", ".") or not _in_git(root):
            continue
        if ask_git(root, "ls-files", "--", path):
            tracked.append(path)
        elif not _is_ignored(root, path):
            lines.append(_add_line(root, place))
    return IgnoredData(tuple(lines), tuple(tracked))


def _in_git(root: Path) -> bool:
    return ask_git(root, "rev-parse", "--is-inside-work-tree") == "true"


def _is_ignored(root: Path, path: str) -> bool:
    """Return whether git ignores everything at a path or pattern."""
    found = [one.relative_to(root).as_posix() for one in root.glob(path)] if _MAGIC.search(path) else [path]
    ignored = (ask_git(root, "check-ignore", "--", *found) or "").splitlines()
    return bool(found) and len(ignored) == len(found)


def _add_line(root: Path, place: PurePosixPath) -> tuple[str, str]:
    """Add a line to the .gitignore beside a path; of a pattern, beside its first part that is one.

    Raises:
        ConfigError: The .gitignore of the workspace is a link.
    """
    parts = place.parts
    at = next((number for number, part in enumerate(parts) if _MAGIC.search(part)), len(parts) - 1)
    if _is_linked(root, root.joinpath(*parts[:at], ".gitignore")):
        at = 0  # the folder is perhaps of somebody else: a link in it names no file that may be changed
    name = "/".join(parts[at:])
    line = "/" + (name if _MAGIC.search(name) else re.sub(r"([\\ ])", r"\\\1", name))
    file = PurePosixPath(*parts[:at], ".gitignore")
    path = root / file
    if _is_linked(root, path):
        raise ConfigError(
            f"{path}: is a link, which git does not follow and Ropeway does not write to. The profile was added; have "
            f"git ignore its data by the line {line} in .git/info/exclude"
        )
    text = read_exact(path) if path.is_file() else ""
    end = "" if not text or text.endswith("\n") else "\n"
    write_atomic(path, f"{text}{end}{line}\n".encode())
    return file.as_posix(), line


def _is_linked(root: Path, path: Path) -> bool:
    return path.is_symlink() or not path.parent.resolve().is_relative_to(root.resolve())
