"""Fetch a package into a folder: nothing appears under its final name before every byte was hashed."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ropeway.registry.layout import blob_key
from ropeway.registry.rules import PackageFile, check_content, scan_folder
from ropeway.registry.version_manifest import VersionManifest
from ropeway.runtime.errors import AbsentError, ConfigError, DataError, RegistryError, TemporaryError
from ropeway.runtime.manifest import FileFacts, check_file, sync_folder
from ropeway.storage import BLOCK_BYTES, TRANSFER_BYTES, Store


@dataclass(frozen=True, slots=True)
class PullResult:
    """A version on this machine; `created` is False when it was there already, whole and equal."""

    name: str
    digest: str
    folder: Path
    created: bool


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """How much of a version was hashed and found right, its attachments included."""

    name: str
    digest: str
    files: int
    bytes: int


def fetch_package(store: Store, core: VersionManifest, target: Path) -> PullResult:
    """Return `target`, a version's folder, every byte verified; see `Version.pull`."""
    target = target.absolute()
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise RegistryError(f"{target}: expected a folder or nothing there, found a link or a file. Choose another")
    if target.is_dir() and any(target.iterdir()):
        _check_same(core, target)
        return PullResult(core.name, core.digest, target, created=False)
    with _partial_folder(target, core) as partial:
        for file in core.files:
            fetch_file(store, file, partial / file.path)
        if strays := sorted(set(scan_folder(partial)) - {file.path for file in core.files}):
            raise DataError(f"{partial}: {strays[0]} is none of the version's files. Pull again")
        _rename_when_complete(partial, target)
    return PullResult(core.name, core.digest, target, created=True)


def _check_same(core: VersionManifest, target: Path) -> None:
    try:
        check_folder(core, target)
    except DataError as error:
        raise RegistryError(
            f"{target}: holds something other than {core.name} {core.digest[:12]}…, and is left as it is ({error}). "
            "Choose another folder, or remove it"
        ) from None


def check_folder(core: VersionManifest, folder: Path) -> None:
    """Raise DataError unless a folder holds exactly a version's files."""
    if extra := sorted(set(scan_folder(folder)) - {file.path for file in core.files}):
        raise DataError(f"{folder}: {extra[0]} is not in the version ({len(extra)} such files)")
    for file in core.files:
        facts = FileFacts(sha256=file.sha256, bytes=file.bytes)
        check_file(folder / file.path, facts, remedy="Pull the version again into another folder")


@contextmanager
def _partial_folder(target: Path, core: VersionManifest) -> Iterator[Path]:
    """Yield the locked folder in which a pull of this version to this place is put together; it may hold a part.

    Data that turns out wrong takes the folder with it; any other failure leaves it for the next pull.
    """
    partial = target.with_name(f".{target.name}.{core.digest[:16]}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = _lock_folder(partial)
        try:
            there = sum((partial / path).stat().st_size for path in scan_folder(partial))
            free = shutil.disk_usage(partial).free
            if core.total_bytes - there > free:
                raise ConfigError(
                    f"{target}: {core.name} {core.digest[:12]}… needs {core.total_bytes - there:,} bytes more, "
                    f"{free:,} are free. Choose another disk"
                )
            yield partial
        except DataError:
            shutil.rmtree(partial)
            raise
        finally:
            with suppress(OSError):
                partial.rmdir()  # only if nothing was fetched
            os.close(lock)
    except OSError as error:
        raise ConfigError(f"{target}: {error.strerror} ({error.filename}). Correct it and pull again") from None


def _lock_folder(folder: Path) -> int:
    """Return a handle that holds the folder's lock until it is closed, by us or by the kernel when we die."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), folder.stat()):  # else its holder renamed it before we had the lock
            return handle
    os.close(handle)
    raise TemporaryError(f"{folder}: another process is pulling the same version here. Repeat when it has ended")


def fetch_file(store: Store, file: PackageFile, path: Path) -> None:
    """Bring one file to `path`: what an earlier pull left of it is hashed, the rest is streamed and hashed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b") as local:
        digest = hashlib.sha256()
        while block := local.read(BLOCK_BYTES):
            digest.update(block)
        kept_bytes = local.tell()
        right = _fetch_rest(store, file, local, digest)
        if not right and kept_bytes:  # the part was not a part of this file
            local.seek(0)
            local.truncate()
            right = _fetch_rest(store, file, local, hashlib.sha256())
        if not right:
            raise DataError(
                f"{store.url}: the blob of {file.path} is not what its version says ({file.bytes:,} bytes, sha256 "
                f"{file.sha256[:12]}…); nothing was kept. `ropeway registry verify` lists what is damaged"
            )
        local.flush()
        os.fsync(local.fileno())
    check_content(path, file.path)


def _fetch_rest(store: Store, file: PackageFile, local: BinaryIO, digest: "hashlib._Hash") -> bool:
    """Append to `local` what is missing of a file; return whether the whole is right."""
    if (missing_bytes := file.bytes - local.tell()) > 0:
        try:
            with store.open_stream(blob_key(file.sha256), start_byte=local.tell()) as stream:
                while block := stream.read(min(TRANSFER_BYTES, missing_bytes)):
                    digest.update(block)
                    local.write(block)
                    store.on_bytes(len(block))
                    missing_bytes -= len(block)
        except AbsentError:
            raise DataError(f"{store.url}: the blob of {file.path} ({file.sha256[:12]}…) is missing") from None
    return missing_bytes == 0 and digest.hexdigest() == file.sha256


def _rename_when_complete(partial: Path, target: Path) -> None:
    """Give a whole folder its name, in one rename that survives a power cut."""
    for place, _, _ in os.walk(partial):
        sync_folder(Path(place))
    try:
        partial.rename(target)  # an empty folder is replaced; one that filled meanwhile is not
    except OSError as error:
        raise RegistryError(f"{target}: {error.strerror}; somebody put something there meanwhile") from None
    sync_folder(target.parent)
