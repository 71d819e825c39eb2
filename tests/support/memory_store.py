"""A store in memory: publishing to it takes milliseconds, because no disk has to be waited for.

Its listings can be out of date while reads are right, and its clock can be set: what a store and a network may do.
"""

import hashlib
import io
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from ropeway.storage import IncompleteUpload, NotFoundError, Store, StoredObject


class MemoryStore(Store):
    """Objects by key. Of one thread.

    Attributes:
        listed: What listings show, from `freeze_listing` until `thaw_listing`; None: what there is.
        clock_offset: How far the store's clock is from this machine's.
    """

    def __init__(self) -> None:
        self.url = "memory:"
        self.objects: dict[str, bytes] = {}
        self.times: dict[str, datetime] = {}
        self.listed: dict[str, StoredObject] | None = None
        self.clock_offset = timedelta()

    def freeze_listing(self) -> None:
        """From now on show this state in every listing, whatever is written or deleted."""
        self.listed = self._current()

    def thaw_listing(self) -> None:
        """Show what there is again."""
        self.listed = None

    def _current(self) -> dict[str, StoredObject]:
        return {key: StoredObject(key, len(data), self.times[key]) for key, data in self.objects.items()}

    def _shown(self) -> dict[str, StoredObject]:
        return self._current() if self.listed is None else self.listed

    def put_if_absent(self, key: str, data: bytes | Path, *, sha256: str | None = None) -> bool:
        body = data if isinstance(data, bytes) else data.read_bytes()
        assert sha256 in (None, hashlib.sha256(body).hexdigest())
        if key in self.objects:
            return False
        self.objects[key], self.times[key] = body, self.now()
        return True

    def get(self, key: str) -> bytes:
        if key not in self.objects:
            raise NotFoundError(f"{self.url} no object {key}")
        return self.objects[key]

    def open_stream(self, key: str, *, start_byte: int = 0) -> BinaryIO:
        return io.BytesIO(self.get(key)[start_byte:])

    def exists(self, key: str) -> bool:
        return key in self.objects

    def size(self, key: str) -> int:
        return len(self.get(key))

    def modified_at(self, key: str) -> datetime:
        self.get(key)
        return self.times[key]

    def now(self) -> datetime:
        return datetime.now(UTC) + self.clock_offset

    def list_entries(self, prefix: str) -> list[StoredObject]:
        return sorted((one for key, one in self._shown().items() if key.startswith(prefix)), key=lambda one: one.key)

    def list_names(self, prefix: str, start: str) -> list[str]:
        names = (key.removeprefix(prefix) for key in self._shown() if key.startswith(prefix + start))
        return sorted(name for name in names if "/" not in name)

    def list_folders(self, prefix: str) -> list[str]:
        names = {key.removeprefix(prefix) for key in self._shown() if key.startswith(prefix)}
        return sorted({name.partition("/")[0] for name in names if "/" in name})

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def list_incomplete_uploads(self) -> list[IncompleteUpload]:
        return []

    def remove_incomplete_upload(self, upload: IncompleteUpload) -> None:
        raise AssertionError(upload)
