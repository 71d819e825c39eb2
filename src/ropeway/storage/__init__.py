"""Object stores of the registry: `Store`, whose only write is put-if-absent, on a folder or on S3.

Objects are never overwritten, so readers need no lock and a crashed writer leaves only garbage. Of N writers of one key
exactly one succeeds; the logs of versions and aliases depend only on this (`registry/log.py`).
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from ropeway.runtime.errors import ConfigError, NotFoundError
from ropeway.storage.folder import FileStore
from ropeway.storage.interface import (
    BLOCK_BYTES,
    MAX_DOCUMENT_BYTES,
    TRANSFER_BYTES,
    IncompleteUpload,
    Store,
    StoredObject,
)

__all__ = [
    "BLOCK_BYTES",
    "MAX_DOCUMENT_BYTES",
    "TRANSFER_BYTES",
    "FileStore",
    "IncompleteUpload",
    "NotFoundError",
    "Store",
    "StoredObject",
    "open_store",
]


def open_store(url: str) -> Store:
    """Return the store at a URL without connecting to it; raise ConfigError unless it is file:///… or s3://….

    >>> open_store("file:///srv/registry").url
    'file:///srv/registry'
    >>> open_store("s3://models/registry").url
    's3://models/registry'
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # of the host, e.g. an unclosed bracket
        parts = urlsplit("")
    if parts.scheme == "s3":
        from ropeway.storage.s3 import S3Store

        return S3Store(url)
    path = unquote(parts.path)
    local = parts.scheme == "file" and parts.netloc in ("", "localhost") and not (parts.query or parts.fragment)
    if not local or not path.startswith("/") or "\0" in path:
        shown = url.rpartition("@")[2]  # the part before an @ can be a secret
        raise ConfigError(
            f"registry {shown[:200]!r}: expected file:///absolute/path or s3://bucket/prefix. Correct --registry or "
            "ROPEWAY_REGISTRY"
        )
    try:
        is_other = Path(path).exists() and not Path(path).is_dir()
    except OSError as error:  # a name that is too long
        raise ConfigError(f"registry {url[:200]!r}: {error.strerror}. Correct --registry or ROPEWAY_REGISTRY") from None
    if is_other:
        raise ConfigError(f"registry {url!r}: expected a folder, found a file. Correct --registry or ROPEWAY_REGISTRY")
    return FileStore(Path(path))
