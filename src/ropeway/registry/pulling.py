"""Pull a package into a folder, which gets its final name only after every byte is verified."""

import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from ropeway.registry.layout import blob_key
from ropeway.registry.rules import PackageFile, check_content, scan_folder
from ropeway.registry.version_manifest import VersionManifest
from ropeway.runtime.errors import ConfigError, DataError, NotFoundError, RegistryError, TemporaryError, disk_error
from ropeway.runtime.manifest import FileFacts, check_file, make_folder, sync_folder, sync_folders
from ropeway.storage import BLOCK_BYTES, TRANSFER_BYTES, Store

_FOLDER_MODE = 0o775  # of the new folder, less the umask
StatementTrust = Literal["trusted", "not trusted", "not checked", "none"]


@dataclass(frozen=True, slots=True)
class PullResult:
    """A pulled version; `created` is False if the folder already contained the complete version."""

    name: str
    digest: str
    folder: Path
    created: bool


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The files and bytes of a version that were hashed and verified, including attachments.

    Attributes:
        provenance: Whether a trusted key signed the provenance statement; `not checked` without a signature policy or
            for a pulled folder, `none` if the version has no statement.
    """

    name: str
    digest: str
    files: int
    bytes: int
    provenance: StatementTrust = "not checked"


def fetch_package(store: Store, manifest: VersionManifest, target: Path) -> PullResult:
    """Pull a version into `target` and verify every byte; see `Version.pull`."""
    target = target.absolute()
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise RegistryError(f"{target}: expected a folder or a new path, found a link or a file. Choose another path")
    if target.is_dir() and any(target.iterdir()):
        _check_same(manifest, target)
        return PullResult(manifest.name, manifest.digest, target, created=False)
    with _partial_folder(target, manifest) as partial:
        for file in manifest.files:
            fetch_file(store, file, partial / file.path)
        if unexpected := sorted(set(scan_folder(partial)) - {file.path for file in manifest.files}):
            raise DataError(f"{partial}: {unexpected[0]} is not a file of the version. Pull again")
        _rename_when_complete(partial, target)
    return PullResult(manifest.name, manifest.digest, target, created=True)


def _check_same(manifest: VersionManifest, target: Path) -> None:
    try:
        check_folder(manifest, target)
    except DataError as error:
        raise RegistryError(
            f"{target}: expected an empty folder or exactly {manifest.name} {manifest.digest[:12]}…; it was not "
            f"changed ({error}). Choose another folder, or delete it"
        ) from None


def check_folder(manifest: VersionManifest, folder: Path) -> None:
    """Raise DataError unless a folder contains exactly the files of a version."""
    if extra := sorted(set(scan_folder(folder)) - {file.path for file in manifest.files}):
        raise DataError(
            f"{folder}: {extra[0]} is not in the version ({len(extra)} extra files). Remove them, or "
            "pull into another folder"
        )
    for file in manifest.files:
        facts = FileFacts(sha256=file.sha256, bytes=file.bytes)
        check_file(folder / file.path, facts, remedy="Pull the version again into another folder")


@contextmanager
def _partial_folder(target: Path, manifest: VersionManifest) -> Iterator[Path]:
    """Yield the locked partial folder of this version and target; it can have files of an interrupted pull.

    Corrupt data deletes the folder. After any other failure it stays, and the next pull resumes from it.
    """
    partial = target.with_name(f".{target.name}.{manifest.digest[:16]}.partial")
    try:
        created = _create_folder(partial)
        lock = _lock_folder(partial)
        try:
            if not created:
                _check_owner(partial, os.fstat(lock))
            present_bytes = sum((partial / path).stat().st_size for path in scan_folder(partial))
            free = shutil.disk_usage(partial).free
            if (missing_bytes := manifest.total_bytes - present_bytes) > free:
                raise ConfigError(
                    f"{target}: the disk has {free:,} bytes free, {manifest.name} {manifest.digest[:12]}… needs "
                    f"{missing_bytes:,} more. Free space, or choose another disk"
                )
            yield partial
        except DataError:
            shutil.rmtree(partial)
            raise
        finally:
            with suppress(OSError):
                partial.rmdir()  # succeeds only if nothing was fetched
            os.close(lock)
    except OSError as error:
        raise disk_error(error) or ConfigError(
            f"{error.filename or target}: {error.strerror}. Correct the cause and pull again"
        ) from None


def _create_folder(folder: Path) -> bool:
    """Create a folder that only its owner and group can write; return False if it exists."""
    make_folder(folder.parent)
    try:
        folder.mkdir(mode=_FOLDER_MODE)
    except FileExistsError:
        return False
    return True


def _check_owner(folder: Path, facts: os.stat_result) -> None:
    """Raise RegistryError unless this user owns a folder and others cannot write to it.

    Its name can be predicted: in a folder such as /tmp another user could create it, and change the pulled files later.
    """
    if facts.st_uid != os.geteuid() or facts.st_mode & stat.S_IWOTH:
        raise RegistryError(
            f"{folder}: owned by user {facts.st_uid} with mode {stat.S_IMODE(facts.st_mode):o}, expected user "
            f"{os.geteuid()} and no write permission for others. Delete it, or pull to a path in a folder of your own"
        )


def _lock_folder(folder: Path) -> int:
    """Return a file descriptor that holds the lock on a folder until it is closed or the process ends."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), folder.stat()):  # else another pull renamed it before we got the lock
            return handle
    os.close(handle)
    raise TemporaryError(
        f"{folder}: another process is pulling the same version to this path. Run the command again after it ends"
    )


def fetch_file(store: Store, file: PackageFile, path: Path) -> None:
    """Download one file to `path`: hash the part from an interrupted pull, then stream and hash the rest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b") as local:
        digest = hashlib.sha256()
        while block := local.read(BLOCK_BYTES):
            digest.update(block)
        kept_bytes = local.tell()
        matches = _fetch_rest(store, file, local, digest)
        if not matches and kept_bytes:  # the part was not from this file
            local.seek(0)
            local.truncate()
            matches = _fetch_rest(store, file, local, hashlib.sha256())
        if not matches:
            raise DataError(
                f"{store.url}: the blob of {file.path} does not match its version (expected {file.bytes:,} bytes, "
                f"sha256 {file.sha256[:12]}…), so it was not used. `ropeway registry verify NAME@VERSION` lists the "
                "damaged blobs and how to repair them"
            )
        local.flush()
        os.fsync(local.fileno())
    check_content(path, file.path)


def _fetch_rest(store: Store, file: PackageFile, local: BinaryIO, digest: "hashlib._Hash") -> bool:
    """Append the missing bytes of a file to `local`; return whether the complete file matches its sha256."""
    if (missing_bytes := file.bytes - local.tell()) > 0:
        try:
            with store.open_stream(blob_key(file.sha256), start_byte=local.tell()) as stream:
                while block := stream.read(min(TRANSFER_BYTES, missing_bytes)):
                    digest.update(block)
                    local.write(block)
                    store.on_bytes(len(block))
                    missing_bytes -= len(block)
        except NotFoundError:
            raise DataError(
                f"{store.url}: the blob of {file.path} ({file.sha256[:12]}…) is missing. Publish the package "
                "again, which stores it"
            ) from None
    return missing_bytes == 0 and digest.hexdigest() == file.sha256


def _rename_when_complete(partial: Path, target: Path) -> None:
    """Rename a complete folder to its final name; the rename is atomic and durable."""
    sync_folders(partial)
    try:
        partial.rename(target)  # replaces an empty folder; fails if it got files since
    except OSError as error:
        if told := disk_error(error):
            raise told from None
        raise RegistryError(
            f"{target}: {error.strerror}; another process created files there during the pull. Choose another folder"
        ) from None
    sync_folder(target.parent)
