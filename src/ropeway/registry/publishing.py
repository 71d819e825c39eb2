"""Publish a package: blobs, re-check, manifest, signature, number, in this order: a death leaves nothing dangling."""

import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ropeway.registry.blobs import put_blobs
from ropeway.registry.layout import (
    COLLECTIONS,
    blob_key,
    check_name_case,
    init_registry,
    intent_key,
    is_digest,
    manifest_key,
    package_key,
    versions_log,
)
from ropeway.registry.log import Event, Events, append_event, event_document, read_events
from ropeway.registry.rules import PackageFile, check_content, check_files
from ropeway.registry.signing import load_signer, sign
from ropeway.registry.version_manifest import (
    VersionManifest,
    build_version_manifest,
    load_version_manifest,
    package_digest,
)
from ropeway.runtime.errors import DataError, TemporaryError
from ropeway.runtime.manifest import canonical_json, file_sha256
from ropeway.storage import Store

COLLECTION_TTL = timedelta(hours=1)  # a collection ends after half of that: an older announcement is of one that died


@dataclass(frozen=True, slots=True)
class PublishResult:
    """A version as the registry holds it.

    Attributes:
        number: 1, 2, 3 … in the order of publishing.
        created: Whether this call gave it its number.
    """

    name: str
    digest: str
    number: int
    created: bool

    def __str__(self) -> str:
        """Return e.g. `laptop@v3`."""
        return f"{self.name}@v{self.number}"


def publish_package(
    store: Store,
    package_folder: Path,
    name: str,
    provenance: Mapping[str, object],
    attachments: Mapping[str, Path],
    pages: Path | None = None,
) -> PublishResult:
    """Return the version that a package is, published if it is not there yet; see `Artifact.publish`."""
    signer = load_signer()
    core, places = build_version_manifest(package_folder, pages, name)
    attached = _plan_attachments(attachments)
    record = {
        "digest": core.digest,
        "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "provenance": dict(provenance),
        "attachments": {file.path: {"sha256": file.sha256, "bytes": file.bytes} for _, file in attached},
    }
    event_document(record)  # refused now rather than after the weights have gone up
    check_name_case(store, name)
    init_registry(store)
    files = [(places[file.path], file) for file in core.files]
    versions = read_events(store, versions_log(name))
    if find_number(versions, core.digest) is None:
        files += attached
    with _publish_intent(store, core, [file for _, file in files]):
        put_blobs(store, files)
        store.put_if_absent(manifest_key(name, core.digest), core.document, sha256=core.digest)
        load_version_manifest(store, name, core.digest)  # an older manifest of that name may have rotted
        if signer:
            sign(store, core, signer)
        # A digest keeps the number it has; a new one gets the next.
        log = versions_log(name)
        numbered = append_event(store, log, lambda events: find_number(events, core.digest) or record, known=versions)
        if pages:  # last: a version without it is found by its own digest
            package = package_digest(package_folder, name)
            store.put_if_absent(package_key(name, package), canonical_json({"digest": core.digest}))
    return PublishResult(name, core.digest, numbered.number, created=numbered.created)


def find_number(versions: Events, digest: str) -> int | None:
    """Return the number of a digest in its artifact's log, or None while it has none."""
    return next((number for number, known in enumerate(versions.digests, 1) if known == digest), None)


def attached_files(record: Event) -> list[PackageFile]:
    """Return the attachments that a version's record names; raise DataError when it does not name them rightly."""
    files = []
    for name, facts in record["attachments"].items():
        if not (isinstance(facts, dict) and is_digest(facts.get("sha256")) and type(facts.get("bytes")) is int):
            raise DataError(f"version {record['digest'][:12]}…: attachment {name!r} has no sha256 or no size")
        files.append(PackageFile(name, facts["sha256"], facts["bytes"]))
    return files


def _plan_attachments(attachments: Mapping[str, Path]) -> list[tuple[Path, PackageFile]]:
    files = []
    for name, path in sorted(attachments.items()):
        if "/" in name or path.is_symlink() or not path.is_file():
            raise DataError(f"attachment {name!r}: expected a plain name and a regular file, found {path}")
        files.append((path, PackageFile(name, file_sha256(path), path.stat().st_size)))
    if files:
        check_files([file for _, file in files])
    for path, file in files:
        check_content(path, file.path)
    return files


@contextmanager
def _publish_intent(store: Store, core: VersionManifest, files: Iterable[PackageFile]) -> Iterator[None]:
    """Leave `intents/<id>.json` while a publish is under way: a collector of garbage must leave its blobs alone.

    A publish that died leaves its intent; it counts for as long as the collector's grace period.
    """
    key = intent_key(uuid.uuid4().hex)
    intent = {
        "name": core.name,
        "digest": core.digest,
        "blobs": sorted({blob_key(file.sha256) for file in files}),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store.put_if_absent(key, canonical_json(intent))
    _check_no_collection(store, key)
    yield
    store.delete(key)


def _check_no_collection(store: Store, intent: str) -> None:
    """Raise TemporaryError while garbage is collected: the collector may not have seen our intent."""
    since = datetime.now(UTC) - COLLECTION_TTL
    if under_way := [entry for entry in store.list_entries(COLLECTIONS) if entry.modified_at > since]:
        store.delete(intent)
        raise TemporaryError(
            f"{store.url}: garbage is being collected since {under_way[0].modified_at:%H:%M:%S} UTC; nothing was "
            "published. Repeat the command in a few minutes"
        )
