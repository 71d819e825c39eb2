"""A file on a server: what it is now, and its download in parts that a later run goes on with."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from ropeway.runtime.errors import TemporaryError, full_disk_explained
from ropeway.runtime.manifest import digest_of

_BLOCK_BYTES = 1 << 20


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, at most `size` of them, none at the end."""


@dataclass(frozen=True, slots=True)
class Remote:
    """One version of a file on a server.

    Attributes:
        open_from: Opens this version's bytes from an offset on; yields (stream, the offset they really begin at).
    """

    name: str  # its address as messages and manifests show it: nothing in it is secret
    facts: Mapping[str, object]  # what the server says of this version; other bytes mean other facts
    size_bytes: int | None  # its length, or None where the server does not say
    open_from: Callable[[int], AbstractContextManager[tuple[Readable, int]]]


def download(remote: Remote, work: Path) -> Path:
    """Return the file, whole, below `work`; parts of it that are there from an earlier try are not asked for again.

    Raises:
        TemporaryError: The connection ended early or the disk is full: another run goes on from there.
    """
    folder = work / digest_of([remote.name, remote.facts])[:16]
    target = folder / PurePosixPath(remote.name.partition("?")[0]).name
    if target.is_file():
        return target
    partial = target.with_name(f"{target.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    had = partial.stat().st_size if partial.is_file() else 0
    size = remote.size_bytes
    if size is None or had != size or not size:
        _append(remote, partial, had if size is not None and had < size else 0)
    if size is not None and (got := partial.stat().st_size) != size:
        raise TemporaryError(
            f"sources: {remote.name}: the connection ended after {got:,} of {size:,} bytes. Run it again: it goes on "
            "from there"
        )
    partial.replace(target)
    return target


def _append(remote: Remote, partial: Path, start: int) -> None:
    # The disk's errors are explained inside: to the opener an OSError means a broken connection.
    mode = "r+b" if partial.is_file() else "wb"
    with (
        remote.open_from(start) as (stream, begin),
        full_disk_explained(f"sources: {remote.name}", kept=f"what came so far is kept in {partial.parent}"),
        partial.open(mode) as file,
    ):
        file.truncate(begin)
        file.seek(begin)
        for block in _blocks(stream, None if remote.size_bytes is None else remote.size_bytes - begin):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())  # a power cut must not leave a whole length of zeros


def _blocks(stream: Readable, left: int | None) -> Iterator[bytes]:
    """Yield what comes, no more than was promised: a server that sends without end fills no disk."""
    while block := stream.read(_BLOCK_BYTES if left is None else min(_BLOCK_BYTES, left)):
        yield block
        left = None if left is None else left - len(block)
