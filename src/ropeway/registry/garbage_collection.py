"""Garbage collection: delete objects that no version and no running publish references, after a grace period.

A publisher writes its intent and then checks for a running collection; a collector writes its collection marker and
then reads the intents. So at least one of them sees the other: the publisher aborts, or the collector keeps the objects
that the intent lists. Both read keys that are known in advance, since a listing can be out of date. For the same reason
models and versions are found by reading their numbered logs. A listing that leaves out objects only keeps garbage.

No object that is needed is deleted because a clock is wrong. Ages are differences of times of the store's clock. An
intent that looks expired is only deleted, and its objects are kept until a later collection: a publisher that is alive
after all finds its intent gone and stops before its version has a number. A collection that finds its marker gone, or
its time used up by one of two clocks, stops.
"""

import re
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial

from ropeway.registry.layout import (
    COLLECTION_MARKER,
    COLLECTIONS,
    INTENT_SLOTS,
    INTENTS,
    blob_key,
    check_registry,
    intent_key,
    manifest_key,
    tombstones_folder,
)
from ropeway.registry.log import find_head, read_events, verify_log
from ropeway.registry.names import all_models, model_logs, register_listed
from ropeway.registry.publishing import COLLECTION_TTL, attached_files, listed_blobs
from ropeway.registry.version_manifest import load_version_manifests
from ropeway.runtime.errors import NotFoundError, TemporaryError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.manifest import canonical_json
from ropeway.storage import IncompleteUpload, Store, StoredObject

# Keys that may be deleted. Events and tombstones are never deleted.
_COLLECTABLE = re.compile(rf"blobs/sha256/|{INTENTS}|{COLLECTIONS}|models/[^/]+/(heads/|manifests/[^/]+$)")
# Unfinished uploads of a registry: of blobs, of the probe of a store in S3, and all of a store in a folder.
_OWN_UPLOADS = re.compile(r"blobs/sha256/|\.probe$|\.partial/")
COLLECTION_TIMEOUT = COLLECTION_TTL / 2
_RECHECK_SECONDS = 1.0  # how often a collection looks whether its marker is in place
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
    uploads = tuple(
        upload for upload in incomplete_uploads if _OWN_UPLOADS.match(upload.name) and upload.started_at < before
    )
    return Garbage(old, uploads, len(unreferenced) - len(old))


def find_garbage(store: Store, *, grace: timedelta, withdrawn: bool, is_verified: bool = False) -> Garbage:
    """Return what a collection would delete now; delete nothing.

    Objects younger than `grace` are kept. `withdrawn` includes blobs that only withdrawn versions reference. What a
    version references is taken from its event, which is half the reads; with `is_verified`, as a collection needs it,
    from its manifest, whose sha256 is checked.

    Raises:
        RegistryError: There is no registry, or a manifest that must be read is missing, so its references are unknown.
        DataError: An event, or a manifest that was read, is damaged, so the references are unknown.
    """
    check_registry(store)
    now = store.now()
    before = now - grace
    entries = store.list_entries("")  # listed before the references are read: newer objects are in the grace period
    # The markers of this collection and of others that are running.
    markers = (entry for entry in entries if entry.key.startswith(COLLECTIONS))
    referenced = {entry.key for entry in markers if entry.modified_at > now - COLLECTION_TTL} | {COLLECTION_MARKER}
    # Read intents before versions: an intent is deleted after its version has a number.
    referenced |= _referenced_by_intents(store, min(before, now - INTENT_TTL))
    referenced |= _referenced_by_versions(store, withdrawn=withdrawn, is_verified=is_verified)
    return plan_collection(entries, store.list_incomplete_uploads(), referenced, before=before)


def collect(store: Store, *, grace: timedelta, withdrawn: bool) -> Garbage:
    """Delete what `find_garbage` returns while a collection marker blocks publishes; return what was deleted.

    Raises:
        TemporaryError: Another collection is running, this one took too long, or its marker was removed.
    """
    check_registry(store)
    with _running_collection(store) as collection:
        register_listed(store)
        found = find_garbage(store, grace=grace, withdrawn=withdrawn, is_verified=True)
        # Manifests first: an interrupted collection must not leave a manifest without its blobs.
        for entry in sorted(found.entries, key=lambda entry: (not entry.key.startswith("models/"), entry.key)):
            collection.check()
            store.delete(entry.key)
        for upload in found.incomplete_uploads:
            collection.check()
            store.remove_incomplete_upload(upload)
    return found


@dataclass(slots=True)
class _Collection:
    """A running collection: its marker, and how long it has run by two clocks.

    A monotonic clock does not count the time for which a machine sleeps, and a wall clock can be set.
    """

    store: Store
    document: bytes
    _began: tuple[float, float] = field(default_factory=lambda: (time.monotonic(), time.time()))
    _seen: tuple[float, float] = (0.0, 0.0)

    def check(self) -> None:
        """Raise TemporaryError unless this collection may delete: within its time, and its marker is in place."""
        now = (time.monotonic(), time.time())
        if (
            max(abs(at - begin) for at, begin in zip(now, self._began, strict=True))
            > COLLECTION_TIMEOUT.total_seconds()
        ):
            minutes = COLLECTION_TIMEOUT.total_seconds() / 60
            raise TemporaryError(
                f"{self.store.url}: garbage collection stopped at its limit of {minutes:g} minutes, or a clock was set "
                "meanwhile. Run it again to delete the rest"
            )
        if max(abs(at - seen) for at, seen in zip(now, self._seen, strict=True)) > _RECHECK_SECONDS:
            if not self.is_ours():
                raise TemporaryError(
                    f"{self.store.url}: garbage collection stopped: {COLLECTION_MARKER} was removed, because a publish "
                    "or another collection took it for dead. Compare the clocks of the machines, then run it again"
                )
            self._seen = now

    def is_ours(self) -> bool:
        """Return whether the marker is the one of this collection."""
        try:
            return self.store.get(COLLECTION_MARKER) == self.document
        except NotFoundError:
            return False


@contextmanager
def _running_collection(store: Store) -> Iterator[_Collection]:
    """Hold the marker; a marker that is older than `COLLECTION_TTL` is of a dead collection and is replaced."""
    facts = {"id": uuid.uuid4().hex, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    collection = _Collection(store, canonical_json(facts))
    if not store.put_if_absent(COLLECTION_MARKER, collection.document):
        with suppress(NotFoundError):
            started = store.modified_at(COLLECTION_MARKER)
            if started > store.now() - COLLECTION_TTL:
                raise TemporaryError(
                    f"{store.url}: another garbage collection has been running since {started:%H:%M:%S} UTC; nothing "
                    "was deleted. Run the command again later"
                )
        store.delete(COLLECTION_MARKER)
        if not store.put_if_absent(COLLECTION_MARKER, collection.document):
            raise TemporaryError(f"{store.url}: another garbage collection has just begun. Run the command again later")
    try:
        yield collection
    finally:
        if collection.is_ours():
            store.delete(COLLECTION_MARKER)


def _referenced_by_versions(store: Store, *, withdrawn: bool, is_verified: bool) -> set[str]:
    referenced: set[str] = set()
    for name in all_models(store):
        first, *others = model_logs(store, name)
        versions = verify_log(store, first)
        # Only versions reference objects. Of the other logs a valid head is kept, and their events are not read.
        logs = (versions, *(read_events(store, log) for log in others))
        referenced |= {key for events in logs if (key := find_head(store, events))}
        referenced |= {manifest_key(name, digest) for digest in versions.digests}
        tombstones = set(store.list_names(tombstones_folder(name), "")) if withdrawn else set[str]()
        kept = [event for event in versions if f"{event['digest']}.json" not in tombstones]
        unlisted: list[str] = []
        for event in kept:
            referenced |= {blob_key(file.sha256) for file in attached_files(event)}
            if is_verified or (listed := listed_blobs(event)) is None:
                unlisted.append(event["digest"])
            else:
                referenced |= {blob_key(digest) for digest in listed}
        for manifest in load_version_manifests(store, name, unlisted):
            referenced |= {blob_key(file.sha256) for file in manifest.files}
    return referenced


def _referenced_by_intents(store: Store, before: datetime) -> set[str]:
    """Return the keys that publishes reference, and their intents, except those older than `before`.

    The objects of an expired intent are kept: this collection deletes the intent alone.
    """
    referenced: set[str] = set()
    slots = [intent_key(slot) for slot in range(INTENT_SLOTS)]
    others = [key for key in store.list_keys(INTENTS) if key not in slots]  # of an older Ropeway
    for key, document, at in store.run_each(partial(_read_intent, store), [*slots, *others]):
        referenced |= {key} if at >= before else set()
        with suppress(ValueError, KeyError, TypeError):
            intent = parse_json(document)
            referenced |= {manifest_key(intent["name"], intent["digest"]), *intent["blobs"]}
    return referenced


def _read_intent(store: Store, key: str) -> tuple[str, bytes, datetime]:
    """Return the key, document and time of an intent; an empty document if there is none."""
    with suppress(NotFoundError):
        return key, store.get(key), store.modified_at(key)
    return key, b"", datetime.max.replace(tzinfo=UTC)


def _referenced_key(key: str) -> str:
    """Return the key that keeps this one alive: the manifest for a signature, otherwise the key itself."""
    return f"{key.rsplit('.', 2)[0]}.json" if key.endswith(".sig") else key
