"""Blobs: a file's bytes under their own sha256, and the one check of them that publish, verify and pull share."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ropeway.registry.layout import blob_key
from ropeway.registry.rules import PackageFile
from ropeway.runtime.errors import AbsentError, DataError
from ropeway.storage import TRANSFER_BYTES, Store


def put_blobs(store: Store, files: Sequence[tuple[Path, PackageFile]]) -> None:
    """Store each file's bytes, then re-check each blob in the store.

    Raises:
        DataError: A file changed on the way, or a blob that was there before is not what its name says.
    """
    created = [store.put_if_absent(blob_key(file.sha256), path, sha256=file.sha256) for path, file in files]
    for (_, file), new in zip(files, created, strict=True):
        # Bytes that this call wrote were hashed on the way; only older ones can have rotted since.
        if fault := blob_fault(store, file, rehash=not new):
            raise DataError(
                f"{store.url}: {fault}. Nothing was published; remove {blob_key(file.sha256)} from the store, then "
                "publish again"
            )


def blob_fault(store: Store, file: PackageFile, *, rehash: bool) -> str | None:
    """Return what is wrong with a file's blob, or None; `rehash` reads every byte, else sizes alone are compared."""
    key = blob_key(file.sha256)
    try:
        if (size := store.size(key)) != file.bytes:
            return f"the blob of {file.path} has {size:,} bytes, expected {file.bytes:,}"
        if rehash and (found := _hash_blob(store, key)) != file.sha256:
            return f"the blob of {file.path} hashes to {found[:12]}…, expected {file.sha256[:12]}…"
    except AbsentError:
        return f"the blob of {file.path} ({file.sha256[:12]}…) is missing"
    return None


def read_blob(store: Store, file: PackageFile) -> bytes:
    """Return a small file's bytes, verified, for reports and not weights; raise DataError when the blob is wrong."""
    try:
        data = store.get(blob_key(file.sha256))
    except AbsentError:
        raise DataError(f"{store.url}: the blob of {file.path} ({file.sha256[:12]}…) is missing") from None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DataError(f"{store.url}: the blob of {file.path} is not what its version says. `ropeway registry verify`")
    return data


def _hash_blob(store: Store, key: str) -> str:
    digest = hashlib.sha256()
    with store.open_stream(key) as stream:
        while block := stream.read(TRANSFER_BYTES):
            digest.update(block)
            store.on_bytes(len(block))
    return digest.hexdigest()
