"""Publish a package: blobs, check, manifest, signature, number. In this order a crash leaves only garbage."""

import secrets
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ropeway.registry.blobs import put_blobs
from ropeway.registry.layout import (
    COLLECTION_MARKER,
    COLLECTIONS,
    INTENT_SLOTS,
    INTENTS,
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
from ropeway.registry.names import register_model
from ropeway.registry.rules import PackageFile, check_content, check_files
from ropeway.registry.signing import Signer, load_signer, sign
from ropeway.registry.version_manifest import (
    VersionManifest,
    build_version_manifest,
    load_version_manifest,
    package_digest,
)
from ropeway.runtime.errors import DataError, NotFoundError, RopewayError, TemporaryError
from ropeway.runtime.manifest import canonical_json, file_sha256
from ropeway.storage import Store

BLOBS = "blobs"  # field of a version's event: the sha256 of each file; absent in events of an older Ropeway
COLLECTION_TTL = timedelta(hours=1)  # a collection stops after half of this: an older marker is of a dead one


@dataclass(frozen=True, slots=True)
class PublishResult:
    """A published version.

    Attributes:
        number: 1, 2, 3 … in the order of publishing.
        created: Whether this call created the version; False if it existed.
        blobs: Blobs that this call stored; the store had the others.
    """

    name: str
    digest: str
    number: int
    created: bool
    blobs: int

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
    """Publish a package as a version, or return the existing version; see `Artifact.publish`."""
    signer = load_signer()
    manifest, paths = build_version_manifest(package_folder, pages, name)
    attached = _plan_attachments(attachments)
    record = {
        "digest": manifest.digest,
        "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "provenance": dict(provenance),
        "attachments": {file.path: {"sha256": file.sha256, "bytes": file.bytes} for _, file in attached},
        BLOBS: sorted({file.sha256 for file in manifest.files}),
    }
    event_document(record)  # fail before the weights are uploaded
    check_name_case(store, name)
    init_registry(store)
    files = [(paths[file.path], file) for file in manifest.files]
    versions = read_events(store, versions_log(name))
    if not versions:
        register_model(store, name)
    if find_number(versions, manifest.digest) is None:
        files += attached
    with _publish_intent(store, manifest, [file for _, file in files]) as intent:
        blobs = _put_version(store, manifest, files, signer)
        intent.check()
        # An existing digest keeps its number; a new one gets the next number.
        log = versions_log(name)
        numbered = append_event(
            store, log, lambda events: find_number(events, manifest.digest) or record, known=versions
        )
        if pages:  # last: without it the version is still found by its own digest
            package = package_digest(package_folder, name)
            store.put_if_absent(package_key(name, package), canonical_json({"digest": manifest.digest}))
        if not intent.release():  # a collection removed it after the check, so it can have deleted our objects
            blobs += _put_version(store, manifest, files, signer)
    return PublishResult(name, manifest.digest, numbered.number, created=numbered.created, blobs=blobs)


def _put_version(
    store: Store, manifest: VersionManifest, files: Sequence[tuple[Path, PackageFile]], signer: Signer | None
) -> int:
    """Store what a version consists of, and check it; return how many blobs the store did not have."""
    blobs = put_blobs(store, files)
    store.put_if_absent(manifest_key(manifest.name, manifest.digest), manifest.document, sha256=manifest.digest)
    load_version_manifest(store, manifest.name, manifest.digest)  # an existing manifest can be corrupt
    if signer:
        sign(store, manifest, signer)
    return blobs


def find_number(versions: Events, digest: str) -> int | None:
    """Return the version number of a digest, or None if it has no version event."""
    return next((number for number, known in enumerate(versions.digests, 1) if known == digest), None)


def attached_files(record: Event) -> list[PackageFile]:
    """Return the attachments in a version event; raise DataError if an entry is malformed."""
    files = []
    for name, facts in record["attachments"].items():
        if not (isinstance(facts, dict) and is_digest(facts.get("sha256")) and type(facts.get("bytes")) is int):
            raise DataError(f"version {record['digest'][:12]}…: attachment {name!r} has no valid sha256 and size")
        files.append(PackageFile(name, facts["sha256"], facts["bytes"]))
    return files


def listed_blobs(record: Event) -> list[str] | None:
    """Return the sha256 of a version's files as its event lists them; None if it does not. The manifest decides."""
    listed = record.get(BLOBS)
    return listed if isinstance(listed, list) and all(is_digest(one) for one in listed) else None


def _plan_attachments(attachments: Mapping[str, Path]) -> list[tuple[Path, PackageFile]]:
    files = []
    for name, path in sorted(attachments.items()):
        if "/" in name or path.is_symlink() or not path.is_file():
            raise DataError(f"attachment {name!r}: expected a name without / and a regular file, found {path}")
        files.append((path, PackageFile(name, file_sha256(path), path.stat().st_size)))
    if files:
        check_files([file for _, file in files], attached=True)
    for path, file in files:
        check_content(path, file.path, attached=True)
    return files


@dataclass(frozen=True, slots=True)
class _Intent:
    """The entry of a running publish in a slot of `intents/`, by which garbage collection keeps its objects."""

    store: Store
    key: str
    document: bytes

    def is_ours(self) -> bool:
        """Return whether the slot has this intent; a collection that takes the publish for dead deletes it."""
        try:
            return self.store.get(self.key) == self.document
        except NotFoundError:
            return False

    def release(self) -> bool:
        """Delete the intent; return False if it was gone."""
        ours = self.is_ours()
        if ours:
            self.store.delete(self.key)
        return ours

    def check(self) -> None:
        """Raise TemporaryError unless the slot has this intent."""
        if not self.is_ours():
            raise self.lost_error()

    def lost_error(self) -> TemporaryError:
        """Return the error for a publish whose intent is gone."""
        return TemporaryError(
            f"{self.store.url}: a garbage collection took this publish for dead and removed its intent {self.key}; "
            "nothing was published. Compare the clocks of this machine, of the store and of the machine that "
            "collects, then run the command again"
        )


@contextmanager
def _publish_intent(store: Store, manifest: VersionManifest, files: Iterable[PackageFile]) -> Iterator[_Intent]:
    """Hold an intent until the caller releases it, so that garbage collection keeps its blobs.

    The intent of a killed publish expires after the grace period, 24 hours at least.
    """
    facts = {
        "id": uuid.uuid4().hex,
        "name": manifest.name,
        "digest": manifest.digest,
        "blobs": sorted({blob_key(file.sha256) for file in files}),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    intent = _take_slot(store, canonical_json(facts))
    try:
        _check_no_collection(store)
        yield intent
    except Exception as error:
        ours = True
        with suppress(RopewayError):  # the fault is raised; without this the slot stays taken until it expires
            ours = intent.release()
        if not ours:  # then the fault can be that a collection deleted our objects
            raise intent.lost_error() from error
        raise


def _take_slot(store: Store, document: bytes) -> _Intent:
    first = secrets.randbelow(INTENT_SLOTS)
    for slot in range(first, first + INTENT_SLOTS):
        key = intent_key(slot % INTENT_SLOTS)
        if store.put_if_absent(key, document):
            return _Intent(store, key, document)
    raise TemporaryError(
        f"{store.url}: all {INTENT_SLOTS} slots of {INTENTS} are taken by publishes that run, or that were killed in "
        "the last 24 hours. Run the command again later; `ropeway registry gc --apply` frees the slots of dead ones"
    )


def _check_no_collection(store: Store) -> None:
    """Raise TemporaryError while garbage collection runs: the collector may have read the intents before ours.

    The marker is read, not listed. The marker of a dead collection is deleted; if that collection is alive after all,
    it finds its marker gone and stops.
    """
    times = [entry.modified_at for entry in store.list_entries(COLLECTIONS) if entry.key != COLLECTION_MARKER]
    started = None
    with suppress(NotFoundError):
        started = store.modified_at(COLLECTION_MARKER)
        times.append(started)
    since = store.now() - COLLECTION_TTL if times else datetime.max.replace(tzinfo=UTC)
    if started and started <= since:
        store.delete(COLLECTION_MARKER)
    if running := [at for at in times if at > since]:
        raise TemporaryError(
            f"{store.url}: garbage collection has been running since {max(running):%H:%M:%S} UTC; nothing "
            "was published. Run the command again in a few minutes"
        )
