"""Pull a version and verify one: nothing is used, nor appears under its final name, before every byte was hashed."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ropeway.registry.aliases import resolve
from ropeway.registry.blobs import blob_fault
from ropeway.registry.core import Core, load_core
from ropeway.registry.layout import blob_key, model_logs, read_reference, tombstone_key
from ropeway.registry.log import verify_log
from ropeway.registry.publishing import attached_files, is_withdrawn
from ropeway.registry.rules import PackageFile, check_content, scan_folder
from ropeway.registry.signing import check_policy
from ropeway.runtime.errors import AbsentError, ConfigError, DataError, RegistryError, TemporaryError
from ropeway.runtime.manifest import check_file, sync_folder
from ropeway.storage import BLOCK_BYTES, TRANSFER_BYTES, Store


@dataclass(frozen=True, slots=True)
class Pulled:
    """A version on this machine; `created` is False when it was there already, whole and equal."""

    name: str
    digest: str
    folder: Path
    created: bool


@dataclass(frozen=True, slots=True)
class Verified:
    """How much of a version was hashed and found right, its attachments included."""

    name: str
    digest: str
    files: int
    bytes: int


def pull(store: Store, reference: str, target: Path) -> Pulled:
    """Return a version's folder, `target`, every byte verified. It appears whole, or not at all.

    A pull that was killed leaves `.<target>.<digest>.partial` beside it; the next one continues there.

    Args:
        store: Where from.
        reference: `NAME@ALIAS`, `NAME@v3` or `NAME@DIGEST`.
        target: The folder to make. If it exists it must be empty or hold exactly that version.

    Raises:
        RegistryError: No such version, it is withdrawn, or `target` holds something else.
        DataError: A manifest or a blob is not what it should be, or a path breaks a rule; nothing is left behind.
        TemporaryError: Another process is pulling it to the same place.
        ConfigError: The disk cannot hold it.
    """
    name, core = _load_allowed(store, reference)
    target = target.absolute()
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise RegistryError(f"{target}: expected a folder or nothing there, found a link or a file. Choose another")
    if target.is_dir() and any(target.iterdir()):
        _check_same(core, target)
        return Pulled(name, core.digest, target, created=False)
    with _partial_folder(target, core) as partial:
        for file in core.files:
            fetch_file(store, file, partial / file.path)
        if strays := sorted(set(scan_folder(partial)) - {file.path for file in core.files}):
            raise DataError(f"{partial}: {strays[0]} is none of the version's files. Pull again")
        _settle(partial, target)
    return Pulled(name, core.digest, target, created=True)


def verify(store: Store, reference: str) -> Verified:
    """Re-hash a version's manifest, every blob and every attachment, read every log whole; return how much that was.

    Raises:
        RegistryError: No such version, or it is withdrawn.
        DataError: All faults, one per line.
    """
    name, core = _load_allowed(store, reference)
    versions, *_ = [verify_log(store, log) for log in model_logs(store, name)]
    attached = [file for event in versions if event["digest"] == core.digest for file in attached_files(event)]
    files = [*core.files, *attached]
    if faults := [f"  {fault}" for file in files if (fault := blob_fault(store, file, rehash=True))]:
        raise DataError(
            "\n".join(
                [
                    f"{store.url}: {reference} ({core.digest[:12]}…) is damaged; do not use it:",
                    *faults,
                    "Remove the damaged blobs from the store and publish the same package again",
                ]
            )
        )
    return Verified(name, core.digest, len(files), sum(file.bytes for file in files))


def verify_folder(store: Store, reference: str, folder: Path) -> Verified:
    """Re-hash a pulled folder against the registry's manifest; nothing may be missing, added, changed or linked.

    Raises:
        RegistryError: No such version, or it is withdrawn.
        DataError: The folder is not exactly that version.
    """
    name, core = _load_allowed(store, reference)
    if not folder.is_dir():
        raise DataError(f"{folder}: no folder there. `ropeway registry pull {reference} --to {folder}` makes it")
    _check_whole(core, folder)
    return Verified(name, core.digest, len(core.files), core.total_bytes)


def _load_allowed(store: Store, reference: str) -> tuple[str, Core]:
    """Return the name and core a reference means: digest, manifest's hash, rules, tombstone, signature policy."""
    name, digest = read_reference(reference).name, resolve(store, reference)
    core = load_core(store, name, digest)
    if is_withdrawn(store, name, digest):
        raise RegistryError(
            f"{reference} ({digest[:12]}…) is withdrawn: {store.url} holds {tombstone_key(name, digest)}. "
            "Choose another version"
        )
    check_policy(store, core)
    return name, core


def _check_same(core: Core, target: Path) -> None:
    try:
        _check_whole(core, target)
    except DataError as error:
        raise RegistryError(
            f"{target}: holds something other than {core.name} {core.digest[:12]}…, and is left as it is ({error}). "
            "Choose another folder, or remove it"
        ) from None


def _check_whole(core: Core, folder: Path) -> None:
    """Raise DataError unless a folder holds exactly a version's files."""
    if extra := sorted(set(scan_folder(folder)) - {file.path for file in core.files}):
        raise DataError(f"{folder}: {extra[0]} is not in the version ({len(extra)} such files)")
    for file in core.files:
        facts = {"sha256": file.sha256, "bytes": file.bytes}
        check_file(folder / file.path, facts, remedy="Pull the version again into another folder")


@contextmanager
def _partial_folder(target: Path, core: Core) -> Iterator[Path]:
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


def _settle(partial: Path, target: Path) -> None:
    """Give a whole folder its name, in one rename that survives a power cut."""
    for place, _, _ in os.walk(partial):
        sync_folder(Path(place))
    try:
        partial.rename(target)  # an empty folder is replaced; one that filled meanwhile is not
    except OSError as error:
        raise RegistryError(f"{target}: {error.strerror}; somebody put something there meanwhile") from None
    sync_folder(target.parent)
