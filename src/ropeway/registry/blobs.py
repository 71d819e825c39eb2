"""Blobs: file contents stored under their sha256, and the integrity check that publish, verify and pull share."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ropeway.registry.layout import blob_key
from ropeway.registry.rules import PackageFile
from ropeway.runtime.errors import DataError, NotFoundError
from ropeway.storage import TRANSFER_BYTES, Store


def put_blobs(store: Store, files: Sequence[tuple[Path, PackageFile]]) -> int:
    """Store each file as a blob, then check each blob in the store; return how many the store did not have.

    Raises:
        DataError: A file changed during the upload, or a blob that already existed does not match its sha256.
    """
    created = [store.put_if_absent(blob_key(file.sha256), path, sha256=file.sha256) for path, file in files]
    for (_, file), new in zip(files, created, strict=True):
        # Blobs written by this call were hashed during the upload; only older ones can be corrupt.
        if fault := blob_fault(store, file, rehash=not new):
            raise DataError(
                f"{store.url}: {fault}. Nothing was published. Delete {blob_key(file.sha256)} from the store, then "
                "publish again"
            )
    return sum(created)


def blob_fault(store: Store, file: PackageFile, *, rehash: bool) -> str | None:
    """Return what is wrong with a file's blob, or None; `rehash` hashes every byte, else only the size is checked."""
    key = blob_key(file.sha256)
    try:
        if (size := store.size(key)) != file.bytes:
            return f"{file.path}: {key} has {size:,} bytes, expected {file.bytes:,}"
        if rehash and (found := _hash_blob(store, key)) != file.sha256:
            return f"{file.path}: {key} hashes to {found[:12]}…, not to the digest in its name"
    except NotFoundError:
        return f"{file.path}: {key} is missing"
    return None


def read_blob(store: Store, file: PackageFile) -> bytes:
    """Return the verified bytes of a small file, such as a report; raise DataError if the blob does not match."""
    try:
        data = store.get(blob_key(file.sha256))
    except NotFoundError:
        raise DataError(
            f"{store.url}: the blob of {file.path} ({file.sha256[:12]}…) is missing. Publish the package "
            "again, which stores it"
        ) from None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DataError(
            f"{store.url}: the blob of {file.path} does not match its sha256. `ropeway registry verify "
            "NAME@VERSION` lists the damaged blobs"
        )
    return data


def _hash_blob(store: Store, key: str) -> str:
    digest = hashlib.sha256()
    with store.open_stream(key) as stream:
        while block := stream.read(TRANSFER_BYTES):
            digest.update(block)
            store.on_bytes(len(block))
    return digest.hexdigest()
