"""A store in memory: publishing to it takes milliseconds, because no disk has to be waited for."""

import hashlib
import io
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from ropeway.storage import IncompleteUpload, NotFoundError, Store, StoredObject


class MemoryStore(Store):
    """Objects by key. Of one thread."""

    def __init__(self) -> None:
        self.url = "memory:"
        self.objects: dict[str, bytes] = {}
        self.times: dict[str, datetime] = {}

    def put_if_absent(self, key: str, data: bytes | Path, *, sha256: str | None = None) -> bool:
        body = data if isinstance(data, bytes) else data.read_bytes()
        assert sha256 in (None, hashlib.sha256(body).hexdigest())
        self.times.setdefault(key, datetime.now(UTC))
        return self.objects.setdefault(key, body) is body

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

    def list_entries(self, prefix: str) -> list[StoredObject]:
        keys = sorted(key for key in self.objects if key.startswith(prefix))
        return [StoredObject(key, len(self.objects[key]), self.times[key]) for key in keys]

    def list_names(self, prefix: str, start: str) -> list[str]:
        names = (key.removeprefix(prefix) for key in self.objects if key.startswith(prefix + start))
        return sorted(name for name in names if "/" not in name)

    def list_folders(self, prefix: str) -> list[str]:
        names = {key.removeprefix(prefix) for key in self.objects if key.startswith(prefix)}
        return sorted({name.partition("/")[0] for name in names if "/" in name})

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def list_incomplete_uploads(self) -> list[IncompleteUpload]:
        return []

    def remove_incomplete_upload(self, upload: IncompleteUpload) -> None:
        raise AssertionError(upload)
