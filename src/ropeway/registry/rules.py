"""Rules for the files of a package: plain relative paths, allowed suffixes, size limits, no pickles.

Publish and pull check the same rules, because a registry is not trusted.
Source of the requirement: mlflow/mlflow#7166 (traversal through artifact paths), #12256 (loading a model ran a pickle).
"""

import codecs
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ropeway.models.weight_files import ADAPTER
from ropeway.runtime.errors import DataError

MAX_FILES = 4096
MAX_PATH_CHARACTERS = 200
MAX_DEPTH = 8
MAX_WEIGHTS_BYTES = 64 << 30  # per shard; Ropeway writes shards of 5 GB at most. Also of an index of records
MAX_OTHER_BYTES = 512 << 20  # tokenizer.json of a 128k vocabulary is 17 MB
MAX_PACKAGE_BYTES = 4 << 40  # 405 billion bf16 parameters are 0.8 TB
_HEAD_BYTES = 4096
INDEX_SUFFIX = ".index"
_HeadCheck = Callable[[bytes, int], bool]
_PNG = b"\x89PNG\r\n\x1a\n"
# One path component: ASCII, no dot at either end. Excludes `..`, drive letters, streams, hidden files, NUL, homoglyphs.
_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_-])?")
_COMMANDS = "dvc.yaml"  # DVC runs the stages of every such file in a workspace
# Windows opens a device for these names, with any suffix.
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PackageFile:
    """One file of a version: its path in the package, separated by `/`, its sha256 and its size in bytes."""

    path: str
    sha256: str
    bytes: int


def check_files(files: Iterable[PackageFile], *, attached: bool = False) -> None:
    """Raise DataError unless every path, suffix and size is allowed and no two paths conflict.

    `attached`: of attachments, which may also have the suffix of an index of records; a package may not.
    """
    files = tuple(files)
    if not 0 < len(files) <= MAX_FILES:
        raise DataError(f"package: {len(files):,} files, expected 1 to {MAX_FILES:,}")
    for file in files:
        check_path(file.path, ATTACHED_SUFFIXES if attached else SUFFIXES)
        most = MAX_WEIGHTS_BYTES if file.path.endswith((".safetensors", INDEX_SUFFIX)) else MAX_OTHER_BYTES
        if not 0 <= file.bytes <= most:
            raise DataError(f"package: {file.path} has {file.bytes:,} bytes, expected {most:,} at most")
    if (total := sum(file.bytes for file in files)) > MAX_PACKAGE_BYTES:
        raise DataError(f"package: {total:,} bytes in total, expected {MAX_PACKAGE_BYTES:,} at most")
    _check_conflicts([file.path for file in files])


def check_path(path: str, suffixes: Mapping[str, _HeadCheck] | None = None) -> None:
    """Raise DataError unless a path is relative, normalized, plain and has an allowed suffix; default: of a package."""
    allowed = SUFFIXES if suffixes is None else suffixes
    parts = path.split("/")
    if len(path) > MAX_PATH_CHARACTERS or len(parts) > MAX_DEPTH:
        raise DataError(
            f"package path {path[:80]!r}: {len(path)} characters in {len(parts)} parts, "
            f"expected {MAX_PATH_CHARACTERS} and {MAX_DEPTH} at most"
        )
    for part in parts:
        if not _PART.fullmatch(part) or _DEVICES.fullmatch(part):
            raise DataError(
                f"package path {path!r}: the part {part!r} is not allowed; expected a relative path of "
                "A-Z a-z 0-9 . _ -, no part starting or ending with a dot"
            )
    if parts[-1].casefold() == ADAPTER:
        raise DataError(f"package path {path!r}: an adapter, expected a complete model. Merge it into its base model")
    if parts[-1].casefold() == _COMMANDS:
        raise DataError(f"package path {path!r}: can have commands, which DVC runs in a workspace. Remove it")
    if _suffix(path) not in allowed:
        raise DataError(f"package path {path!r}: suffix {_suffix(path)!r}, expected one of {' '.join(sorted(allowed))}")


def _suffix(path: str) -> str:
    return Path(path).suffix


def _check_conflicts(paths: list[str]) -> None:
    """Raise DataError for two paths that can be one file on some file system, or a file that is also a folder."""
    by_casefold: dict[str, tuple[str, bool]] = {}
    for path in paths:
        parts = path.split("/")
        for depth in range(1, len(parts) + 1):
            current = ("/".join(parts[:depth]), depth == len(parts))
            first = by_casefold.setdefault(current[0].casefold(), current)
            if first is not current and (first != current or current[1]):
                raise DataError(
                    f"package: the paths {first[0]!r} and {current[0]!r} conflict: duplicate, file and folder of one "
                    "name, or different only in case. Rename one"
                )


def scan_folder(folder: Path) -> list[str]:
    """Return the sorted paths of all files in a package folder; checks every entry and follows no link.

    Raises:
        DataError: An entry is neither a folder nor a regular file, or its path is not allowed.
    """
    found: list[str] = []
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                path = Path(entry.path).relative_to(folder).as_posix()
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    pending.append(Path(entry.path))
                elif stat.S_ISREG(mode):
                    check_path(path)
                    found.append(path)
                else:
                    kind = "a link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
                    raise DataError(f"{folder}: {path!r} is {kind}; a package has only regular files. Replace it")
    return sorted(found)


def check_content(path: Path, name: str, *, attached: bool = False) -> None:
    """Raise DataError unless the first bytes of a file match the suffix of `name`; rejects a renamed pickle."""
    checks = ATTACHED_SUFFIXES if attached else SUFFIXES
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not checks[_suffix(name)](head, path.stat().st_size):
        raise DataError(
            f"{path}: the first bytes {head[:8]!r} are not those of a {_suffix(name)} file; a package has only "
            "safetensors, JSON, text and image files"
        )


def _is_safetensors(head: bytes, size: int) -> bool:
    """Source: safetensors README, v0.5: 8 bytes little-endian length of a JSON header, which starts with `{`."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _is_text(head: bytes, size: int) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=size <= len(head))
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _is_sentencepiece(head: bytes, size: int) -> bool:
    r"""A protobuf that starts with field 1, which is `\n`; Llama 3 has a text file named `tokenizer.model`."""
    return head[:1] == b"\n" or _is_text(head, size)


def _is_png(head: bytes, size: int) -> bool:
    return size > len(_PNG) and head.startswith(_PNG)


def _is_record_index(head: bytes, _size: int) -> bool:
    from ropeway.data.record_index import MAGIC  # with numpy, which few commands need

    return head.startswith(MAGIC)


# The allowed suffixes, and the check of the first bytes for each.
SUFFIXES: dict[str, _HeadCheck] = {
    ".safetensors": _is_safetensors,
    ".model": _is_sentencepiece,
    ".png": _is_png,
    **dict.fromkeys((".json", ".txt", ".md", ".jinja", ".svg", ".html", ".yaml", ".csv", ".lock"), _is_text),
}
ATTACHED_SUFFIXES: dict[str, _HeadCheck] = {**SUFFIXES, INDEX_SUFFIX: _is_record_index}
