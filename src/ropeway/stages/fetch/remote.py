"""Download a remote file; an interrupted download is kept and the next run resumes it."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from ropeway.runtime.boot import read_boot
from ropeway.runtime.errors import ConfigError, TemporaryError, full_disk_explained
from ropeway.runtime.manifest import digest_of
from ropeway.runtime.progress import StageProgress

_BLOCK_BYTES = 1 << 20
MAX_UNSTATED_BYTES = 64 << 30  # of a file whose server states no size: it may never end


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, at most `size`; empty at the end."""


@dataclass(frozen=True, slots=True)
class Remote:
    """One version of a file on a server.

    Attributes:
        open_from: Opens this version from an offset; yields (stream, the offset at which the stream really begins).
    """

    name: str  # its address without secrets, as messages and manifests show it
    facts: Mapping[str, object]  # what the server states, e.g. ETag; they change when the bytes change
    size_bytes: int | None  # None if the server does not state it
    open_from: Callable[[int], AbstractContextManager[tuple[Readable, int]]]


def download(remote: Remote, work: Path) -> Path:
    """Return the completely downloaded file in `work`; a partial download from an earlier run is resumed.

    Raises:
        TemporaryError: The connection ended early or the disk is full; the next run resumes the download.
        ConfigError: The server states no size and sends more than `MAX_UNSTATED_BYTES`.
    """
    folder = work / digest_of([remote.name, remote.facts])[:16]
    target = folder / PurePosixPath(remote.name.partition("?")[0]).name
    if target.is_file():
        return target
    # A machine that went down can leave the length of a file without its data, so only the same start of it resumes.
    partial = target.with_name(f"{target.name}.{digest_of(read_boot())[:8]}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.glob("*.partial"):
        if other != partial:
            print(f"sources: {remote.name}: the machine restarted, so the download starts again", flush=True)
            other.unlink()
    present = partial.stat().st_size if partial.is_file() else 0
    size = remote.size_bytes
    if size is None or present != size or not size:
        _download_from(remote, partial, present if size is not None and present < size else 0)
    if size is not None and (got := partial.stat().st_size) != size:
        raise TemporaryError(
            f"sources: {remote.name}: the connection ended after {got:,} of {size:,} bytes. Run the same command "
            "again; the download resumes there"
        )
    partial.replace(target)
    return target


def _download_from(remote: Remote, partial: Path, start: int) -> None:
    # Translate disk errors here: `open_from` translates any other OSError into a broken connection.
    mode = "r+b" if partial.is_file() else "wb"
    with (
        StageProgress("bytes", remote.size_bytes) as progress,
        remote.open_from(start) as (stream, begin),
        full_disk_explained(f"sources: {remote.name}", kept=f"the partial download is kept in {partial.parent}"),
        partial.open(mode) as file,
    ):
        file.truncate(begin)
        file.seek(begin)
        progress.skip(begin)
        for block in _read_blocks(stream, None if remote.size_bytes is None else remote.size_bytes - begin):
            if remote.size_bytes is None and file.tell() + len(block) > MAX_UNSTATED_BYTES:
                file.truncate(0)
                raise ConfigError(
                    f"sources: {remote.name}: the server states no size and sent more than "
                    f"{MAX_UNSTATED_BYTES >> 30} GiB; download the file yourself and name it in `paths`"
                )
            file.write(block)
            progress.advance(len(block))
        file.flush()
        os.fsync(file.fileno())  # after a power cut the file must not have its full length but zeros


def _read_blocks(stream: Readable, left: int | None) -> Iterator[bytes]:
    """Yield blocks up to the announced size, so that a server that sends too much cannot fill the disk."""
    while block := stream.read(_BLOCK_BYTES if left is None else min(_BLOCK_BYTES, left)):
        yield block
        left = None if left is None else left - len(block)
