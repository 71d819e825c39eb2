"""The store for `file:///…`: a folder, where each object is a file created atomically by a hard link.

No symbolic link below the root is followed: another writer of the folder could point one at other files, which a
collection would delete. Each folder is opened relative to its parent, so a link is refused also if it appears later.
"""

import errno
import hashlib
import io
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from ropeway.runtime.errors import ConfigError, DataError, NotFoundError, TemporaryError, is_disk_full
from ropeway.runtime.manifest import make_folder
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
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a named pipe would block forever
_ABSENT = (FileNotFoundError, NotADirectoryError)


class FileStore(Store):
    """A store in a folder. A hard link from `.partial/` creates each file atomically and fails if it exists.

    Every method raises DataError for a key whose path has a symbolic link below the root; the root can be one.
    """

    def __init__(self, root: Path) -> None:
        """Store objects in the folder `root`, which the first write creates."""
        self.root = root.absolute()
        self.url = self.root.as_uri()

    def put_if_absent(self, key: str, data: bytes | Path, *, sha256: str | None = None) -> bool:
        """Write to `.partial/`, fsync, link. A kill at any time leaves at most a file in `.partial/`."""
        folder, name = _split(key)
        if isinstance(data, Path) and not data.is_file():
            raise DataError(f"{data}: expected a file to store as {key}, found none. Create it again")
        with self._translate_errors(key):
            if self._is_stored(folder, name):
                return False
            with self._open_folder(_PARTIAL, create=True) as partials:
                partial = uuid.uuid4().hex
                try:
                    found = _write_new(partials, partial, data, self.on_bytes)
                    if sha256 is not None and found != sha256:
                        raise hash_mismatch_error(data if isinstance(data, Path) else key, found, sha256)
                    with self._open_folder(folder, create=True) as handle:
                        return self._link(partials, partial, handle, name)
                finally:
                    with suppress(FileNotFoundError):
                        os.unlink(partial, dir_fd=partials)

    def get(self, key: str) -> bytes:
        """Read the file."""
        with self.open_stream(key) as stream, self._translate_errors(key):
            data = stream.read(MAX_DOCUMENT_BYTES + 1)
        if len(data) > MAX_DOCUMENT_BYTES:
            raise DataError(f"{self.url}: {key} is larger than a document can be, {MAX_DOCUMENT_BYTES:,} bytes")
        return data

    def open_stream(self, key: str, *, start_byte: int = 0) -> BinaryIO:
        """Open the file."""
        folder, name = _split(key)
        with self._translate_errors(key), self._open_folder(folder) as place:
            handle = self._open(place, name, key, _FILE_FLAGS)
            mode = os.fstat(handle).st_mode
            if not stat.S_ISREG(mode):
                os.close(handle)
                if stat.S_ISDIR(mode):
                    raise FileNotFoundError
                raise DataError(f"{self.url}: {key} is not a regular file. Delete it")
            stream = io.BufferedReader(_File(handle, lambda: self._translate_errors(key)))
            stream.seek(start_byte)
            return stream

    def exists(self, key: str) -> bool:
        """Ask the file system."""
        folder, name = _split(key)
        with self._translate_errors(key), suppress(*_ABSENT), self._open_folder(folder) as place:
            return stat.S_ISREG(self._stat(place, name, key).st_mode)
        return False

    def size(self, key: str) -> int:
        """Ask the file system."""
        folder, name = _split(key)
        with self._translate_errors(key), self._open_folder(folder) as place:
            return self._stat(place, name, key).st_size

    def modified_at(self, key: str) -> datetime:
        """Ask the file system."""
        folder, name = _split(key)
        with self._translate_errors(key), self._open_folder(folder) as place:
            return datetime.fromtimestamp(self._stat(place, name, key).st_mtime, UTC)

    def now(self) -> datetime:
        """Return the time of this machine; a file server's clock can differ, so no decision depends on it alone."""
        return datetime.now(UTC)

    def list_entries(self, prefix: str) -> list[StoredObject]:
        """Walk the folder. Names that start with a dot (`.partial/`) are not keys."""
        check_prefix(prefix)
        entries: list[StoredObject] = []
        folders = [prefix]
        with self._translate_errors(prefix):
            while folders:
                place = folders.pop()
                with suppress(*_ABSENT), self._scan(place) as found:
                    for entry in found:
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(f"{place}{entry.name}/")
                        else:
                            with suppress(FileNotFoundError):  # deleted after the folder was listed
                                entries.append(_stored(f"{place}{entry.name}", entry.stat(follow_symlinks=False)))
        return sorted(entries, key=lambda entry: entry.key)

    def list_names(self, prefix: str, start: str) -> list[str]:
        """Read one folder; no file of it is looked at."""
        check_prefix(prefix)
        with self._translate_errors(prefix), suppress(*_ABSENT), self._open_folder(prefix) as place:
            names = os.listdir(place)  # noqa: PTH208 - of an open folder, which pathlib cannot list
            return sorted(name for name in names if name.startswith(start) and name[0] != ".")
        return []

    def list_folders(self, prefix: str) -> list[str]:
        """List one folder."""
        check_prefix(prefix)
        with self._translate_errors(prefix), suppress(*_ABSENT), self._scan(prefix) as found:
            return sorted(entry.name for entry in found if entry.is_dir(follow_symlinks=False))
        return []

    def delete(self, key: str) -> None:
        """Unlink the file. Empty folders stay, because another writer can be about to use them."""
        folder, name = _split(key)
        with self._translate_errors(key), suppress(*_ABSENT), self._open_folder(folder) as place:
            self._stat(place, name, key)
            os.unlink(name, dir_fd=place)

    def list_incomplete_uploads(self) -> list[IncompleteUpload]:
        """List `.partial/`."""
        uploads: list[IncompleteUpload] = []
        with self._translate_errors(_PARTIAL), suppress(*_ABSENT), self._scan(f"{_PARTIAL}/") as found:
            for entry in found:
                with suppress(FileNotFoundError):  # its upload ended
                    facts = _stored(f"{_PARTIAL}/{entry.name}", entry.stat(follow_symlinks=False))
                    uploads.append(IncompleteUpload(facts.key, facts.modified_at, facts.key))
        return sorted(uploads, key=lambda upload: upload.started_at)

    def remove_incomplete_upload(self, upload: IncompleteUpload) -> None:
        """Unlink the file."""
        with self._translate_errors(upload.name), suppress(*_ABSENT), self._open_folder(_PARTIAL) as place:
            os.unlink(Path(upload.token).name, dir_fd=place)

    def _link(self, partials: int, partial: str, folder: int, name: str) -> bool:
        try:
            os.link(partial, name, src_dir_fd=partials, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError:
            return False
        except FileNotFoundError:
            raise TemporaryError(
                f"{self.url}: a garbage collection removed an unfinished write, which looked old. Compare the clocks "
                "of the machines, then run the command again"
            ) from None
        finally:
            _sync(folder)
        return True

    def _is_stored(self, folder: str, name: str) -> bool:
        """Return whether a file exists; then sync its folder."""
        with suppress(*_ABSENT), self._open_folder(folder) as place:
            self._stat(place, name, f"{folder}{name}")
            _sync(place)  # its writer can have died before this sync; our later objects depend on it
            return True
        return False

    @contextmanager
    def _open_folder(self, folder: str, *, create: bool = False) -> Iterator[int]:
        """Yield a handle of a folder below the root, which is empty for the root; `create` creates missing ones.

        Raises:
            DataError: A component of the path is a symbolic link.
        """
        if create and not self.root.is_dir():
            make_folder(self.root)
        handle = os.open(self.root, _FOLDER_FLAGS)
        try:
            path = ""
            for part in folder.rstrip("/").split("/") if folder else ():
                path += part
                try:
                    inner = self._open(handle, part, path, _FOLDER_FLAGS | os.O_NOFOLLOW)
                except FileNotFoundError:
                    if not create:
                        raise
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=handle)
                    _sync(handle)  # each new level, so that a power failure cannot lose a whole log
                    inner = self._open(handle, part, path, _FOLDER_FLAGS | os.O_NOFOLLOW)
                os.close(handle)
                handle, path = inner, f"{path}/"
            yield handle
        finally:
            os.close(handle)

    @contextmanager
    def _scan(self, folder: str) -> Iterator[Iterator["os.DirEntry[str]"]]:
        """Yield the entries of a folder whose names do not start with a dot; a symbolic link raises DataError."""

        def check(entry: "os.DirEntry[str]") -> bool:
            if entry.name[0] == ".":
                return False
            if entry.is_symlink():
                raise self._link_error(f"{folder}{entry.name}")
            return True

        with self._open_folder(folder) as place, os.scandir(place) as found:
            yield filter(check, found)

    def _open(self, place: int, name: str, path: str, flags: int) -> int:
        """Open a name in an open folder; `path` is its path below the root, for the message."""
        try:
            return os.open(name, flags, dir_fd=place)
        except OSError as error:
            # Which of them a link gives differs between systems.
            if error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(place, name):
                raise self._link_error(path) from None
            raise

    def _stat(self, place: int, name: str, path: str) -> os.stat_result:
        facts = os.stat(name, dir_fd=place, follow_symlinks=False)
        if stat.S_ISLNK(facts.st_mode):
            raise self._link_error(path)
        return facts

    def _link_error(self, path: str) -> DataError:
        return DataError(
            f"{self.url}: {path!r} is a symbolic link, which is not followed in a registry. Replace it by what it "
            "points to, or remove it"
        )

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

    def __init__(self, handle: int, translate: Callable[[], AbstractContextManager[None]]) -> None:
        """Take over an open file; `translate` gives the context in which it is read."""
        super().__init__(handle)
        self._translate = translate

    def readinto(self, buffer: Any) -> int | None:  # noqa: ANN401 - as the base class has it
        """Read into a buffer; return the number of bytes."""
        with self._translate():
            return super().readinto(buffer)

    def readall(self) -> bytes:
        """Return the rest of the file."""
        with self._translate():
            return super().readall()


def _split(key: str) -> tuple[str, str]:
    """Return the folder of a valid key, which ends in `/` or is empty, and the name in it."""
    check_key(key)
    folder, slash, name = key.rpartition("/")
    return folder + slash, name


def _stored(key: str, facts: os.stat_result) -> StoredObject:
    return StoredObject(key, facts.st_size, datetime.fromtimestamp(facts.st_mtime, UTC))


def _is_link(folder: int, name: str) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


def _sync(folder: int) -> None:
    """Make the entries of a folder durable; do nothing if the platform does not support it."""
    with suppress(OSError):
        os.fsync(folder)


def _write_new(folder: int, name: str, data: bytes | Path, on_bytes: Callable[[int], None]) -> str:
    """Write a new read-only file, synced to disk; return its sha256."""
    digest = hashlib.sha256()
    with os.fdopen(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder), "wb") as file:
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
