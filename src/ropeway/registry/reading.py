"""Read small files of a version without pulling it: those of its package, and those kept beside it."""

import hashlib
from typing import Any

from ropeway.errors import AbsentError, DataError
from ropeway.registry.layout import blob_key
from ropeway.storage import Store

_MOST_BYTES = 64 << 20


def read_version_file(store: Store, version: dict[str, Any], name: str) -> bytes | None:
    """Return one file's bytes, hashed; None when the version has no such file.

    Args:
        store: Where it is.
        version: As `describe_version` returns it.
        name: A path in the package, else the name of an attachment.

    Raises:
        DataError: The blob is missing, or its bytes are not what the version says.
    """
    facts = version["files"].get(name) or version["attachments"].get(name)
    if facts is None:
        return None
    if facts["bytes"] > _MOST_BYTES:
        raise DataError(f"{store.url}: {name} has {facts['bytes']:,} bytes; pull the version to read it")
    try:
        with store.open_stream(blob_key(facts["sha256"])) as stream:
            data = stream.read(facts["bytes"] + 1)
    except AbsentError:
        raise DataError(f"{store.url}: the blob of {name} ({facts['sha256'][:12]}…) is missing") from None
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise DataError(f"{store.url}: the blob of {name} is not what its version says; `ropeway registry verify`")
    return data
