"""Collect garbage: what no version needs and no publish under way counts on, once it is older than a grace period.

A collector and a publisher cannot miss each other: the publisher leaves its intent and then looks for a collection; the
collector announces itself and then looks for intents. So one of them sees the other: the publisher steps back, or the
collector leaves what the intent names alone.
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
    tombstone_key,
)
from ropeway.registry.log import find_head, verify_log
from ropeway.registry.publishing import COLLECTION_TTL, attached_files
from ropeway.registry.version_manifest import load_version_manifest
from ropeway.runtime.errors import AbsentError, TemporaryError
from ropeway.runtime.manifest import canonical_json
from ropeway.storage import IncompleteUpload, Store, StoredObject

# Keys of a kind that may be removed: events and tombstones never are.
_COLLECTABLE = re.compile(rf"blobs/sha256/|{INTENTS}|{COLLECTIONS}|models/[^/]+/(heads/|manifests/[^/]+$)")
COLLECTION_TIMEOUT = COLLECTION_TTL / 2
INTENT_TTL = timedelta(hours=24)  # however short the grace: a publish that takes longer has died


@dataclass(frozen=True, slots=True)
class Garbage:
    """What a collection removes.

    Attributes:
        young: Objects that nobody needs either, but younger than the grace period.
    """

    entries: tuple[StoredObject, ...]
    incomplete_uploads: tuple[IncompleteUpload, ...]
    young: int

    @property
    def bytes(self) -> int:
        """The size of what is removed."""
        return sum(entry.bytes for entry in self.entries)


def plan_collection(
    entries: Iterable[StoredObject],
    incomplete_uploads: Iterable[IncompleteUpload],
    needed: Collection[str],
    *,
    before: datetime,
) -> Garbage:
    """Return what to remove: collectable, not needed, last changed before a moment."""
    idle = [entry for entry in entries if _COLLECTABLE.match(entry.key) and _needs(entry.key) not in needed]
    old = tuple(entry for entry in idle if entry.modified_at < before)
    return Garbage(
        old, tuple(upload for upload in incomplete_uploads if upload.started_at < before), len(idle) - len(old)
    )


def find_garbage(store: Store, *, grace: timedelta, withdrawn: bool) -> Garbage:
    """Return what a collection would remove now. Nothing is removed.

    What is younger than `grace` stays; with `withdrawn` the blobs go too that only withdrawn versions need.

    Raises:
        RegistryError: No registry there, or a version's manifest is missing: what it needs cannot be known.
        DataError: A manifest or an event is damaged: likewise.
    """
    check_registry(store)
    now = datetime.now(UTC)
    before = now - grace
    entries = store.list_entries("")  # listed before what is needed is read: what comes later is young
    # This collection's announcement, and those of others under way.
    announced = (entry for entry in entries if entry.key.startswith(COLLECTIONS))
    needed = {entry.key for entry in announced if entry.modified_at > now - COLLECTION_TTL}
    # Intents before versions: an intent is removed once its version has a number.
    needed |= _reachable_from_intents(store, entries, min(before, now - INTENT_TTL))
    needed |= _reachable_from_versions(store, withdrawn=withdrawn)
    return plan_collection(entries, store.list_incomplete_uploads(), needed, before=before)


def collect(store: Store, *, grace: timedelta, withdrawn: bool) -> Garbage:
    """Remove what `find_garbage` finds, announced to publishers; return what was removed."""
    announcement = collection_key(uuid.uuid4().hex)
    started = datetime.now(UTC)
    store.put_if_absent(announcement, canonical_json({"at": started.isoformat(timespec="seconds")}))
    try:
        found = find_garbage(store, grace=grace, withdrawn=withdrawn)
        # Manifests first: a death in the middle must not leave one whose blobs are gone.
        for entry in sorted(found.entries, key=lambda entry: (not entry.key.startswith("models/"), entry.key)):
            if datetime.now(UTC) - started > COLLECTION_TIMEOUT:
                raise TemporaryError(
                    f"{store.url}: stopped after {COLLECTION_TIMEOUT}; what is left is for the next. Repeat it"
                )
            store.delete(entry.key)
        for upload in found.incomplete_uploads:
            store.remove_incomplete_upload(upload)
    finally:
        store.delete(announcement)
    return found


def _reachable_from_versions(store: Store, *, withdrawn: bool) -> set[str]:
    needed: set[str] = set()
    for name in list_models(store):
        versions, *others = (verify_log(store, log) for log in model_logs(store, name))
        needed |= {key for events in (versions, *others) if (key := find_head(store, events))}
        for event in versions:
            digest = str(event["digest"])
            needed.add(manifest_key(name, digest))
            if withdrawn and store.exists(tombstone_key(name, digest)):
                continue
            files = [*load_version_manifest(store, name, digest).files, *attached_files(event)]
            needed |= {blob_key(file.sha256) for file in files}
    return needed


def _reachable_from_intents(store: Store, entries: Sequence[StoredObject], before: datetime) -> set[str]:
    """Return what publishes under way count on, and their intents; one older than `before` is of a dead publish."""
    needed: set[str] = set()
    listed = {entry.key: entry for entry in entries if entry.key.startswith(INTENTS)}
    for key in store.list_keys(INTENTS):  # again: a publisher may have come since
        if key in listed and listed[key].modified_at < before:
            continue
        with suppress(AbsentError, ValueError, KeyError, TypeError):
            intent = json.loads(store.get(key))
            needed |= {key, manifest_key(intent["name"], intent["digest"]), *intent["blobs"]}
    return needed


def _needs(key: str) -> str:
    """Return the key that must be needed for this one to be: a signature's is its manifest."""
    return f"{key.rsplit('.', 2)[0]}.json" if key.endswith(".sig") else key
