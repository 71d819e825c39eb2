"""The door to where versions are kept: a small `Store` whose one write is put-if-absent, and the folder behind `file://`.

Nothing is overwritten, so a reader needs no lock and a writer that dies leaves only garbage. Of N writers of one key
exactly one wins; logs of numbers and aliases stand on that alone (`registry/log.py`).
"""

import errno
import hashlib
import os
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from ropeway.errors import AbsentError, ConfigError, DataError, TemporaryError
from ropeway.manifest import sync_folder

BLOCK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 16 << 20  # `get` reads whole JSON documents; weights go through `open_stream`
MAX_KEY_BYTES = 240  # some S3 servers refuse more than 255 (SeaweedFS 4.48), and the bucket's prefix comes on top
_PARTIAL = ".partial"
# ASCII only, and no part starts with a dot: `..`, NUL, backslash and hidden files cannot be spelled.
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Store(ABC):
    """Immutable objects under plain keys. Every method raises DataError for a key that is not plain."""

    url: str

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
    def list_keys(self, prefix: str) -> list[str]:
        """Return every key that starts with `prefix` (a folder ending in `/`, or empty for all), sorted."""

    @abstractmethod
    def list_folders(self, prefix: str) -> list[str]:
        """Return the names directly below the folder `prefix` that have keys below them, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object if it is there. For collecting garbage and for a publisher's own intent, nothing else."""


def open_store(url: str) -> Store:
    """Return the store a URL names. Nothing is created or contacted yet.

    >>> open_store("file:///srv/registry").url
    'file:///srv/registry'

    Raises:
        ConfigError: Not `file:///absolute/path`.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3":
        raise ConfigError(f"registry {url}: this version keeps its registry in a folder only. Use file:///some/folder")
    path = unquote(parts.path)
    local = parts.scheme == "file" and parts.netloc in ("", "localhost") and not (parts.query or parts.fragment)
    if not local or not path.startswith("/") or "\0" in path:
        raise ConfigError(f"registry {url!r}: expected file:///absolute/path. Correct --registry or ROPEWAY_REGISTRY")
    if Path(path).exists() and not Path(path).is_dir():
        raise ConfigError(f"registry {url!r}: expected a folder, found a file. Correct --registry or ROPEWAY_REGISTRY")
    return FileStore(Path(path))


def check_key(key: str) -> None:
    """Raise DataError unless `key` is relative, normalised, of plain ASCII parts and short enough."""
    if len(key) > MAX_KEY_BYTES or not _KEY.fullmatch(key) or any(part.endswith(".") for part in key.split("/")):
        raise DataError(
            f"store key {key[:80]!r}: expected parts of A-Z a-z 0-9 . _ - joined by '/', none empty or starting or "
            f"ending with a dot, {MAX_KEY_BYTES} characters at most"
        )


class FileStore(Store):
    """A folder. A key is a file that appears whole, by a hard link from `.partial/`, which fails if it exists."""

    def __init__(self, root: Path) -> None:
        """Keep objects below `root`, which the first write creates."""
        self.root = root.absolute()
        self.url = self.root.as_uri()

    def put_if_absent(self, key: str, data: bytes | Path, *, sha256: str | None = None) -> bool:
        """Write aside, fsync, link: a kill at any moment leaves at most a file in `.partial/`."""
        target = self._path(key)
        if isinstance(data, Path) and not data.is_file():
            raise DataError(f"{data}: expected a file to store as {key}, found none. Make it again")
        with self._explained(key):
            if target.exists():
                sync_folder(target.parent)  # its writer may have died before doing so; ours must not outlive it
                return False
            partial = self.root / _PARTIAL / uuid.uuid4().hex
            self._make_folder(partial.parent)
            try:
                found = _write_new(partial, data)
                if sha256 is not None and found != sha256:
                    raise DataError(
                        f"{data if isinstance(data, Path) else key}: sha256 is {found[:12]}…, expected {sha256[:12]}…; "
                        "it changed while it was being stored. Nothing was stored under its name; make it again"
                    )
                return self._link(partial, target)
            finally:
                partial.unlink(missing_ok=True)

    def get(self, key: str) -> bytes:
        """Read a document."""
        with self.open_stream(key) as stream, self._explained(key):
            data = stream.read(MAX_DOCUMENT_BYTES + 1)
        if len(data) > MAX_DOCUMENT_BYTES:
            raise DataError(f"{self.url}: {key} is larger than {MAX_DOCUMENT_BYTES:,} bytes; no document here is")
        return data

    def open_stream(self, key: str, *, start_byte: int = 0) -> BinaryIO:
        """Open the file."""
        path = self._path(key)
        with self._explained(key):
            stream = path.open("rb")
            stream.seek(start_byte)
            return stream

    def exists(self, key: str) -> bool:
        """Ask the file system."""
        path = self._path(key)
        with self._explained(key):
            return path.is_file()

    def size(self, key: str) -> int:
        """Ask the file system."""
        path = self._path(key)
        with self._explained(key):
            return path.stat().st_size

    def list_keys(self, prefix: str) -> list[str]:
        """Walk the folder; what starts with a dot (`.partial/`) is not a key."""
        folder = self._folder(prefix)
        keys: list[str] = []
        with self._explained(prefix):
            for place, folders, files in os.walk(folder):
                folders[:] = [name for name in folders if not name.startswith(".")]
                keys += [Path(place, name).relative_to(self.root).as_posix() for name in files if name[0] != "."]
        return sorted(keys)

    def list_folders(self, prefix: str) -> list[str]:
        """Read one folder."""
        folder = self._folder(prefix)
        with self._explained(prefix):
            if not folder.is_dir():
                return []
            return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")

    def delete(self, key: str) -> None:
        """Unlink; empty folders stay, since another writer may be about to use them."""
        path = self._path(key)
        with self._explained(key):
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        check_key(key)
        return self.root / key

    def _folder(self, prefix: str) -> Path:
        if not prefix:
            return self.root
        if not prefix.endswith("/"):
            raise DataError(f"store prefix {prefix[:80]!r}: expected a folder, ending in '/'")
        return self._path(prefix[:-1])

    def _link(self, partial: Path, target: Path) -> bool:
        self._make_folder(target.parent)
        try:
            os.link(partial, target)
        except FileExistsError:
            return False
        finally:
            sync_folder(target.parent)
        return True

    def _make_folder(self, folder: Path) -> None:
        """Create a folder and make each new level durable, else a power cut could take a whole log with it."""
        if folder.is_dir():
            return
        if folder != self.root:
            self._make_folder(folder.parent)
        folder.mkdir(parents=folder == self.root, exist_ok=True)
        sync_folder(folder.parent)

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Translate the file system's errors into decisions."""
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise AbsentError(f"{self.url}: holds no {key}") from None
        except OSError as error:
            if error.errno in _FULL:
                raise TemporaryError(
                    f"{self.url}: the disk is full ({error.strerror}); free space and repeat the command"
                ) from None
            raise ConfigError(
                f"{self.url}: {error.strerror} at {key}. The registry's folder must be readable, writable and on a "
                "file system with hard links; correct it, or name another by ROPEWAY_REGISTRY"
            ) from None


def _write_new(path: Path, data: bytes | Path) -> str:
    """Write a new file, read-only and on disk when this returns; return its sha256."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        if isinstance(data, bytes):
            digest.update(data)
            file.write(data)
        else:
            with data.open("rb") as source:
                while block := source.read(BLOCK_BYTES):
                    digest.update(block)
                    file.write(block)
        file.flush()
        os.fchmod(file.fileno(), os.fstat(file.fileno()).st_mode & 0o444)  # a slip of an editor must not reach it
        os.fsync(file.fileno())
    return digest.hexdigest()
