"""Open the index of a version's records, which is attached to it and named in its data_profile.json.

The data profile is part of the version, so its digest and signatures cover the index. Reads are ranges of the blob: a
lookup among 10 million records reads 0.2 MB.
"""

from ropeway.data.data_profile import FILE
from ropeway.data.record_index import RecordIndex
from ropeway.registry.layout import blob_key
from ropeway.registry.versions import Version
from ropeway.runtime.errors import DataError, NotFoundError
from ropeway.runtime.json_text import parse_json

NAME = "records.index"


def open_record_index(version: Version) -> RecordIndex:
    """Return the index of a version's records.

    Raises:
        NotFoundError: The version has none: an older Ropeway published it, or its blob was collected.
        DataError: It is not the index that the version's data profile names, or it is damaged.
    """
    attached = next((file for file in version.attachments if file.path == NAME), None)
    if attached is None:
        raise NotFoundError(f"{version} has no {NAME}: it was published before versions recorded one")
    stated = _read_stated(version)
    if stated != attached.sha256:
        raise DataError(
            f"{version}: its {NAME} has sha256 {attached.sha256[:12]}…, but {FILE} names {str(stated)[:12]}…. Do not "
            "rely on it; restore the registry from a backup"
        )
    key, store = blob_key(attached.sha256), version.store
    if (size := store.size(key)) != attached.bytes:
        raise DataError(f"{store.url}: {key} has {size:,} bytes, expected {attached.bytes:,}")
    return RecordIndex.open(lambda start, count: store.read_range(key, start, count), size, f"{version}: {NAME}")


def _read_stated(version: Version) -> object:
    try:
        profile = parse_json(version.read_file(FILE) or b"{}")
        return profile["record_index"]["sha256"]
    except (ValueError, KeyError, TypeError):
        return None
