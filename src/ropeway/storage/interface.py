"""The store interface: operations, valid keys and listed objects."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, TypeVar

from ropeway.runtime.errors import DataError

BLOCK_BYTES = 1 << 20
TRANSFER_BYTES = 8 << 20  # of streams: fewer switches between the hashing thread and the read-ahead threads
MAX_DOCUMENT_BYTES = 16 << 20  # limit of `get`, for JSON documents; weights are read by `open_stream`
Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_KEY_BYTES = 240  # some S3 servers reject more than 255 (SeaweedFS 4.48), which includes the prefix
# ASCII only, no part starts with a dot: excludes `..`, NUL, backslash and hidden files.
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object in a listing; `modified_at` is by the clock of the store."""

    key: str
    bytes: int
    modified_at: datetime


@dataclass(frozen=True, slots=True)
class IncompleteUpload:
    """An upload that did not finish, or still runs: a file in `.partial/`, or an S3 multipart upload.

    Attributes:
        token: Identifies the upload to the store, for `remove_incomplete_upload`.
    """

    name: str
    started_at: datetime
    token: str


class Store(ABC):
    """A store of immutable objects. Every method raises DataError for an invalid key."""

    url: str
    on_bytes: Callable[[int], None] = staticmethod(lambda _: None)
    """Progress callback with the number of bytes just stored; readers of a stream call it themselves."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes | Path, *, sha256: str | None = None) -> bool:
        """Create an object; return True if this call created it, False if it exists. Never overwrites.

        Args:
            key: The key: a relative path with `/` between its parts.
            data: The bytes, or the path of a file.
            sha256: The expected hash. The data is hashed during the upload and discarded if it does not match.

        Raises:
            DataError: The hash does not match: the file changed during the upload.
            TemporaryError: The store is full or unavailable; a retry can succeed.
            ConfigError: The store is not writable.
        """

    @abstractmethod
    def get(self, key: str) -> bytes:
        """Return a document; raise NotFoundError if it does not exist, DataError above `MAX_DOCUMENT_BYTES`."""

    def get_many(self, keys: Sequence[str]) -> list[bytes]:
        """Return several documents, in the order of the keys."""
        return self.run_each(self.get, keys)

    def run_each(self, act: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Return `act` of each item, in their order; in parallel where each is a round trip. Calls must not nest."""
        return [act(item) for item in items]

    @abstractmethod
    def open_stream(self, key: str, *, start_byte: int = 0) -> BinaryIO:
        """Return a stream of an object from `start_byte`; raise NotFoundError if it does not exist."""

    def read_range(self, key: str, start_byte: int, count: int) -> bytes:
        """Return `count` bytes of an object from `start_byte`, fewer at its end; NotFoundError if it does not exist."""
        with self.open_stream(key, start_byte=start_byte) as stream:
            return stream.read(count)

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether an object exists."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Return the size of an object in bytes; raise NotFoundError if it does not exist."""

    @abstractmethod
    def modified_at(self, key: str) -> datetime:
        """Return when an object was created, by the clock of the store; raise NotFoundError if it does not exist."""

    @abstractmethod
    def now(self) -> datetime:
        """Return the time by the clock of the store, to compare with the times of its objects."""

    @abstractmethod
    def list_entries(self, prefix: str) -> list[StoredObject]:
        """Return all objects under `prefix` (a folder ending in `/`, or empty for all), sorted by key."""

    def list_keys(self, prefix: str) -> list[str]:
        """Return the keys of all objects under `prefix`, sorted."""
        return [entry.key for entry in self.list_entries(prefix)]

    @abstractmethod
    def list_names(self, prefix: str, start: str) -> list[str]:
        """Return the names directly in the folder `prefix` that begin with `start`, sorted; no other key is listed."""

    def first_key(self, prefix: str) -> str | None:
        """Return the first key under the folder `prefix` in sort order, or None; one request for any number of keys."""
        return next(iter(self.list_keys(prefix)), None)

    @abstractmethod
    def list_folders(self, prefix: str) -> list[str]:
        """Return the names of the subfolders of the folder `prefix`, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object if it exists. Only for garbage, intents, collection markers and heads."""

    @abstractmethod
    def list_incomplete_uploads(self) -> list[IncompleteUpload]:
        """Return the incomplete uploads, oldest first, including those of running writes."""

    @abstractmethod
    def remove_incomplete_upload(self, upload: IncompleteUpload) -> None:
        """Remove an incomplete upload if it still exists."""


def check_key(key: str) -> None:
    """Raise DataError unless `key` is a relative, normalized path of plain ASCII parts within `MAX_KEY_BYTES`."""
    if len(key) > MAX_KEY_BYTES or not _KEY.fullmatch(key) or any(part.endswith(".") for part in key.split("/")):
        raise DataError(
            f"store key {key[:80]!r}: expected parts of A-Z a-z 0-9 . _ - joined by '/', no part empty or with a "
            f"dot at its start or end, {MAX_KEY_BYTES} characters at most"
        )


def check_prefix(prefix: str) -> None:
    """Raise DataError unless `prefix` is empty or a valid folder ending in `/`."""
    if prefix and not prefix.endswith("/"):
        raise DataError(f"store prefix {prefix[:80]!r}: expected a folder that ends in '/'")
    if prefix:
        check_key(prefix[:-1])


def hash_mismatch_error(what: object, found: str, expected: str) -> DataError:
    """Return the error for data whose sha256 is not the expected one."""
    return DataError(
        f"{what}: sha256 is {found[:12]}…, expected {expected[:12]}…; it changed during the upload. No object was "
        "created; create the file again"
    )
