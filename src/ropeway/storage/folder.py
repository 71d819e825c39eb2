"""The store for `file:///…`: a folder, where each object is a file created atomically by a hard link."""

import hashlib
import io
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from ropeway.runtime.errors import ConfigError, DataError, NotFoundError, TemporaryError, is_disk_full
from ropeway.runtime.manifest import make_folder, sync_folder
from ropeway.storage.interface import (
    BLOCK_BYTES,
    MAX_DOCUMENT_BYTES,
    IncompleteUpload,
    Store,
    StoredObject,
    check_key,
    check_prefix,
    hash_mismatch_error,
)

_PARTIAL = ".partial"


class FileStore(Store):
    """A store in a folder. A hard link from `.partial/` creates each file atomically and fails if it exists."""

    def __init__(self, root: Path) -> None:
        """Store objects in the folder `root`, which the first write creates."""
        self.root = root.absolute()
        self.url = self.root.as_uri()

    def put_if_absent(self, key: str, data: bytes | Path, *, sha256: str | None = None) -> bool:
        """Write to `.partial/`, fsync, link. A kill at any time leaves at most a file in `.partial/`."""
        target = self._path(key)
        if isinstance(data, Path) and not data.is_file():
            raise DataError(f"{data}: expected a file to store as {key}, found none. Create it again")
        with self._translate_errors(key):
            if target.exists():
                sync_folder(target.parent)  # its writer can have died before this sync; our later objects depend on it
                return False
            partial = self.root / _PARTIAL / uuid.uuid4().hex
            make_folder(partial.parent)
            try:
                found = _write_new(partial, data, self.on_bytes)
                if sha256 is not None and found != sha256:
                    raise hash_mismatch_error(data if isinstance(data, Path) else key, found, sha256)
                return self._link(partial, target)
            finally:
                partial.unlink(missing_ok=True)

    def get(self, key: str) -> bytes:
        """Read the file."""
        with self.open_stream(key) as stream, self._translate_errors(key):
            data = stream.read(MAX_DOCUMENT_BYTES + 1)
        if len(data) > MAX_DOCUMENT_BYTES:
            raise DataError(f"{self.url}: {key} is larger than a document can be, {MAX_DOCUMENT_BYTES:,} bytes")
        return data

    def open_stream(self, key: str, *, start_byte: int = 0) -> BinaryIO:
        """Open the file."""
        path = self._path(key)
        with self._translate_errors(key):
            stream = io.BufferedReader(_File(path, lambda: self._translate_errors(key)))
            stream.seek(start_byte)
            return stream

    def exists(self, key: str) -> bool:
        """Ask the file system."""
        path = self._path(key)
        with self._translate_errors(key):
            return path.is_file()

    def size(self, key: str) -> int:
        """Ask the file system."""
        path = self._path(key)
        with self._translate_errors(key):
            return path.stat().st_size

    def modified_at(self, key: str) -> datetime:
        """Ask the file system."""
        path = self._path(key)
        with self._translate_errors(key):
            return datetime.fromtimestamp(path.stat().st_mtime, UTC)

    def now(self) -> datetime:
        """Return the time of this machine; a file server's clock can differ, so no decision depends on it alone."""
        return datetime.now(UTC)

    def list_entries(self, prefix: str) -> list[StoredObject]:
        """Walk the folder. Names that start with a dot (`.partial/`) are not keys."""
        entries: list[StoredObject] = []
        with self._translate_errors(prefix):
            for place, folders, files in os.walk(self._folder(prefix)):
                folders[:] = [name for name in folders if not name.startswith(".")]
                for name in files:
                    with suppress(FileNotFoundError):  # deleted after the folder was listed
                        entries += [_entry(Path(place, name), self.root)] if name[0] != "." else []
        return sorted(entries, key=lambda entry: entry.key)

    def list_names(self, prefix: str, start: str) -> list[str]:
        """Read one folder; no file of it is looked at."""
        folder = self._folder(prefix)
        with self._translate_errors(prefix):
            names = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208 - a Path for each of 10,000 names
        return sorted(name for name in names if name.startswith(start) and name[0] != ".")

    def list_folders(self, prefix: str) -> list[str]:
        """List one folder."""
        folder = self._folder(prefix)
        with self._translate_errors(prefix):
            if not folder.is_dir():
                return []
            return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")

    def delete(self, key: str) -> None:
        """Unlink the file. Empty folders stay, because another writer can be about to use them."""
        path = self._path(key)
        with self._translate_errors(key):
            path.unlink(missing_ok=True)

    def list_incomplete_uploads(self) -> list[IncompleteUpload]:
        """List `.partial/`."""
        with self._translate_errors(_PARTIAL):
            found = [_entry(path, self.root) for path in (self.root / _PARTIAL).glob("*")]
        uploads = [IncompleteUpload(entry.key, entry.modified_at, entry.key) for entry in found]
        return sorted(uploads, key=lambda upload: upload.started_at)

    def remove_incomplete_upload(self, upload: IncompleteUpload) -> None:
        """Unlink the file."""
        with self._translate_errors(upload.name):
            (self.root / _PARTIAL / Path(upload.token).name).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        check_key(key)
        return self.root / key

    def _folder(self, prefix: str) -> Path:
        check_prefix(prefix)
        return self.root / prefix

    def _link(self, partial: Path, target: Path) -> bool:
        make_folder(target.parent)
        try:
            os.link(partial, target)
        except FileExistsError:
            return False
        except FileNotFoundError:
            raise TemporaryError(
                f"{self.url}: a garbage collection removed an unfinished write, which looked old. Compare the clocks "
                "of the machines, then run the command again"
            ) from None
        finally:
            sync_folder(target.parent)
        return True

    @contextmanager
    def _translate_errors(self, key: str) -> Iterator[None]:
        """Translate errors of the file system into Ropeway errors."""
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise NotFoundError(f"{self.url}: no object {key}") from None
        except OSError as error:
            if is_disk_full(error):
                raise TemporaryError(
                    f"{self.url}: the disk is full ({error.strerror}). Free space, then run the command again"
                ) from None
            raise ConfigError(
                f"{self.url}: {error.strerror} at {key}. The registry folder must be readable, writable and on a file "
                "system with hard links. Fix it, or set ROPEWAY_REGISTRY to another folder"
            ) from None


class _File(io.FileIO):
    """A file whose errors while reading are those of the store."""

    def __init__(self, path: Path, translate: Callable[[], AbstractContextManager[None]]) -> None:
        """Open a file; `translate` gives the context in which it is read."""
        super().__init__(path)
        self._translate = translate

    def readinto(self, buffer: Any) -> int | None:  # noqa: ANN401 - as the base class has it
        """Read into a buffer; return the number of bytes."""
        with self._translate():
            return super().readinto(buffer)

    def readall(self) -> bytes:
        """Return the rest of the file."""
        with self._translate():
            return super().readall()


def _entry(path: Path, root: Path) -> StoredObject:
    facts = path.stat()
    return StoredObject(path.relative_to(root).as_posix(), facts.st_size, datetime.fromtimestamp(facts.st_mtime, UTC))


def _write_new(path: Path, data: bytes | Path, on_bytes: Callable[[int], None]) -> str:
    """Write a new read-only file, synced to disk; return its sha256."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        if isinstance(data, bytes):
            digest.update(data)
            file.write(data)
            on_bytes(len(data))
        else:
            with data.open("rb") as source:
                while block := source.read(BLOCK_BYTES):
                    digest.update(block)
                    file.write(block)
                    on_bytes(len(block))
        file.flush()
        os.fchmod(
            file.fileno(), os.fstat(file.fileno()).st_mode & 0o444
        )  # read-only: protects the object from accidental edits
        os.fsync(file.fileno())
    return digest.hexdigest()
