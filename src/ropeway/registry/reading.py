"""Read small files of a version without pulling it: those of its package, and those kept beside it."""

from typing import Any

from ropeway.registry.blobs import read_blob
from ropeway.registry.rules import PackageFile
from ropeway.storage import Store


def read_version_file(store: Store, version: dict[str, Any], name: str) -> bytes | None:
    """Return one file's bytes, hashed; None when the version has no such file.

    Args:
        store: Where it is.
        version: As `describe_version` returns it.
        name: A path in the package, else the name of an attachment.

    Raises:
        DataError: As in `read_blob`.
    """
    facts = version["files"].get(name) or version["attachments"].get(name)
    return None if facts is None else read_blob(store, PackageFile(name, facts["sha256"], facts["bytes"]))
