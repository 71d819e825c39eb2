"""Garbage collection: delete objects that no version and no running publish references, after a grace period.

A publisher writes its intent and then checks for a running collection; a collector writes its collection marker and
then reads the intents. So at least one of them sees the other: the publisher aborts, or the collector keeps the objects
that the intent lists.
"""

import json
import re
import uuid
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from ropeway.registry.layout import (
    COLLECTIONS,
    INTENTS,
    blob_key,
    check_registry,
    collection_key,
    list_models,
    manifest_key,
    model_logs,
    tombstones_folder,
)
from ropeway.registry.log import find_head, read_events, verify_log
from ropeway.registry.publishing import COLLECTION_TTL, attached_files
from ropeway.registry.version_manifest import load_version_manifests
from ropeway.runtime.errors import NotFoundError, TemporaryError
from ropeway.runtime.manifest import canonical_json
from ropeway.storage import IncompleteUpload, Store, StoredObject

# Keys that may be deleted. Events and tombstones are never deleted.
_COLLECTABLE = re.compile(rf"blobs/sha256/|{INTENTS}|{COLLECTIONS}|models/[^/]+/(heads/|manifests/[^/]+$)")
COLLECTION_TIMEOUT = COLLECTION_TTL / 2
INTENT_TTL = timedelta(hours=24)  # even with a shorter grace period: a publish this old is dead


@dataclass(frozen=True, slots=True)
class Garbage:
    """The objects and incomplete uploads that a collection deletes.

    Attributes:
        in_grace_period: Number of unreferenced objects that are kept because they are within the grace period.
    """

    entries: tuple[StoredObject, ...]
    incomplete_uploads: tuple[IncompleteUpload, ...]
    in_grace_period: int

    @property
    def bytes(self) -> int:
        """The total size of the objects."""
        return sum(entry.bytes for entry in self.entries)


def plan_collection(
    entries: Iterable[StoredObject],
    incomplete_uploads: Iterable[IncompleteUpload],
    referenced: Collection[str],
    *,
    before: datetime,
) -> Garbage:
    """Return what to delete: collectable, unreferenced and last modified before the cutoff `before`."""
    unreferenced = [
        entry for entry in entries if _COLLECTABLE.match(entry.key) and _referenced_key(entry.key) not in referenced
    ]
    old = tuple(entry for entry in unreferenced if entry.modified_at < before)
    return Garbage(
        old, tuple(upload for upload in incomplete_uploads if upload.started_at < before), len(unreferenced) - len(old)
    )


def find_garbage(store: Store, *, grace: timedelta, withdrawn: bool) -> Garbage:
    """Return what a collection would delete now; delete nothing.

    Objects younger than `grace` are kept. `withdrawn` includes blobs that only withdrawn versions reference.

    Raises:
        RegistryError: There is no registry, or the manifest of a version is missing, so its references are unknown.
        DataError: A manifest or an event is damaged, so the references are unknown.
    """
    check_registry(store)
    now = datetime.now(UTC)
    before = now - grace
    entries = store.list_entries("")  # listed before the references are read: newer objects are in the grace period
    # The markers of this collection and of others that are running.
    markers = (entry for entry in entries if entry.key.startswith(COLLECTIONS))
    referenced = {entry.key for entry in markers if entry.modified_at > now - COLLECTION_TTL}
    # Read intents before versions: an intent is deleted after its version has a number.
    referenced |= _referenced_by_intents(store, entries, min(before, now - INTENT_TTL))
    referenced |= _referenced_by_versions(store, withdrawn=withdrawn)
    return plan_collection(entries, store.list_incomplete_uploads(), referenced, before=before)


def collect(store: Store, *, grace: timedelta, withdrawn: bool) -> Garbage:
    """Delete what `find_garbage` returns while a collection marker blocks publishes; return what was deleted."""
    marker = collection_key(uuid.uuid4().hex)
    started = datetime.now(UTC)
    store.put_if_absent(marker, canonical_json({"at": started.isoformat(timespec="seconds")}))
    try:
        found = find_garbage(store, grace=grace, withdrawn=withdrawn)
        # Manifests first: an interrupted collection must not leave a manifest without its blobs.
        for entry in sorted(found.entries, key=lambda entry: (not entry.key.startswith("models/"), entry.key)):
            if datetime.now(UTC) - started > COLLECTION_TIMEOUT:
                minutes = COLLECTION_TIMEOUT.total_seconds() / 60
                raise TemporaryError(
                    f"{store.url}: garbage collection stopped at its limit of {minutes:g} minutes. Run it "
                    "again to delete the rest"
                )
            store.delete(entry.key)
        for upload in found.incomplete_uploads:
            store.remove_incomplete_upload(upload)
    finally:
        store.delete(marker)
    return found


def _referenced_by_versions(store: Store, *, withdrawn: bool) -> set[str]:
    referenced: set[str] = set()
    for name in list_models(store):
        first, *others = model_logs(store, name)
        versions = verify_log(store, first)
        # Only versions reference objects. Of the other logs a valid head is kept, and their events are not read.
        logs = (versions, *(read_events(store, log) for log in others))
        referenced |= {key for events in logs if (key := find_head(store, events))}
        referenced |= {manifest_key(name, digest) for digest in versions.digests}
        tombstones = set(store.list_names(tombstones_folder(name), "")) if withdrawn else set[str]()
        kept = [event for event in versions if f"{event['digest']}.json" not in tombstones]
        manifests = load_version_manifests(store, name, [event["digest"] for event in kept])
        for event, manifest in zip(kept, manifests, strict=True):
            referenced |= {blob_key(file.sha256) for file in (*manifest.files, *attached_files(event))}
    return referenced


def _referenced_by_intents(store: Store, entries: Sequence[StoredObject], before: datetime) -> set[str]:
    """Return the keys that running publishes reference, and their intents; intents older than `before` are expired."""
    referenced: set[str] = set()
    listed = {entry.key: entry for entry in entries if entry.key.startswith(INTENTS)}
    for key in store.list_keys(INTENTS):  # listed again: a publish may have started since
        if key in listed and listed[key].modified_at < before:
            continue
        with suppress(NotFoundError, ValueError, KeyError, TypeError):
            intent = json.loads(store.get(key))
            referenced |= {key, manifest_key(intent["name"], intent["digest"]), *intent["blobs"]}
    return referenced


def _referenced_key(key: str) -> str:
    """Return the key that keeps this one alive: the manifest for a signature, otherwise the key itself."""
    return f"{key.rsplit('.', 2)[0]}.json" if key.endswith(".sig") else key
