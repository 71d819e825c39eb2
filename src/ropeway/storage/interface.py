"""What every store can do, the keys it takes, and what it says of what it holds."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from ropeway.runtime.errors import DataError

BLOCK_BYTES = 1 << 20
TRANSFER_BYTES = 8 << 20  # of streams: fewer turns between the hashing thread and those that read ahead
MAX_DOCUMENT_BYTES = 16 << 20  # `get` reads whole JSON documents; weights go through `open_stream`
MAX_KEY_BYTES = 240  # some S3 servers refuse more than 255 (SeaweedFS 4.48), and the bucket's prefix comes on top
# ASCII only, and no part starts with a dot: `..`, NUL, backslash and hidden files cannot be spelled.
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as a listing shows it; the time is the store's."""

    key: str
    bytes: int
    modified_at: datetime


@dataclass(frozen=True, slots=True)
class IncompleteUpload:
    """What a writer that died left aside: a file in `.partial/`, or an unfinished multipart upload.

    The store needs `token` to remove it.
    """

    name: str
    started_at: datetime
    token: str


class Store(ABC):
    """Immutable objects under plain keys. Every method raises DataError for a key that is not plain."""

    url: str
    on_bytes: Callable[[int], None] = staticmethod(lambda _: None)
    """Told how many bytes were stored just now; whoever reads a stream tells it itself. For progress bars."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes | Path, *, sha256: str | None = None) -> bool:
        """Return True when this call created `key`, False when it was there before; nothing is overwritten.

        Args:
            key: Where; relative, `/` between parts.
            data: The bytes, or the file that holds them.
            sha256: What the bytes must hash to. They are hashed on the way and never become visible if they do not.

        Raises:
            DataError: The bytes hash to something else: the file changed under the writer.
            TemporaryError: The store is full or away; the same call may work later.
            ConfigError: The store cannot be written to as it stands.
        """

    @abstractmethod
    def get(self, key: str) -> bytes:
        """Return a document of at most `MAX_DOCUMENT_BYTES`; raise AbsentError, or DataError when it is larger."""

    def get_many(self, keys: Sequence[str]) -> list[bytes]:
        """Return several documents, in order."""
        return [self.get(key) for key in keys]

    @abstractmethod
    def open_stream(self, key: str, *, start_byte: int = 0) -> BinaryIO:
        """Return an open stream of the object's bytes from `start_byte` on; raise AbsentError."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether the store holds `key`."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Return an object's bytes; raise AbsentError."""

    @abstractmethod
    def list_entries(self, prefix: str) -> list[StoredObject]:
        """Return every object whose key starts with `prefix` (a folder ending in `/`, or empty for all), by key."""

    def list_keys(self, prefix: str) -> list[str]:
        """Return the keys of `list_entries`."""
        return [entry.key for entry in self.list_entries(prefix)]

    def first_key(self, prefix: str) -> str | None:
        """Return the first key below the folder `prefix`, by name, or None: one request, however many there are."""
        return next(iter(self.list_keys(prefix)), None)

    @abstractmethod
    def list_folders(self, prefix: str) -> list[str]:
        """Return the names directly below the folder `prefix` that have keys below them, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object if it is there. For garbage, a publisher's own intent and hints, nothing else."""

    @abstractmethod
    def list_incomplete_uploads(self) -> list[IncompleteUpload]:
        """Return what unfinished writes left aside, oldest first; a write under way is among them."""

    @abstractmethod
    def remove_incomplete_upload(self, upload: IncompleteUpload) -> None:
        """Remove one if it is still there."""


def check_key(key: str) -> None:
    """Raise DataError unless `key` is relative, normalised, of plain ASCII parts and short enough."""
    if len(key) > MAX_KEY_BYTES or not _KEY.fullmatch(key) or any(part.endswith(".") for part in key.split("/")):
        raise DataError(
            f"store key {key[:80]!r}: expected parts of A-Z a-z 0-9 . _ - joined by '/', none empty or starting or "
            f"ending with a dot, {MAX_KEY_BYTES} characters at most"
        )


def check_prefix(prefix: str) -> None:
    """Raise DataError unless `prefix` is empty or a plain folder ending in `/`."""
    if prefix and not prefix.endswith("/"):
        raise DataError(f"store prefix {prefix[:80]!r}: expected a folder, ending in '/'")
    if prefix:
        check_key(prefix[:-1])


def wrong_hash(what: object, found: str, expected: str) -> DataError:
    """Return the error for bytes that are not those their writer announced."""
    return DataError(
        f"{what}: sha256 is {found[:12]}…, expected {expected[:12]}…; it changed while it was being stored. Nothing "
        "was stored under its name; make it again"
    )
