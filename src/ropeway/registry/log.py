"""An append-only log of JSON events, numbered from 1 without gaps. Its only write primitive is put-if-absent.

Versions, aliases and reviews are logs. A writer of event n has read events 1 to n - 1. If another writer creates event
n first, the put fails and the writer reads the new event and plans again. So what a plan checks (the digest has no
number, the alias points to the expected version) is still true when its event is written.

A reader finds the end of a log by its head: an object, written after each event, with the digests of all events so far.
A head is a hint. It is used only if its last event exists and the next one does not; its digests are used only if their
sha256 is the one in that event. Otherwise the log is listed and read. See docs/decisions/0011-registry-heads.md.

An event also contains a seal: the sha256 of the event before it, as stored, and of all its own fields, so a change of
any field is found: of the event itself when it is read, of an earlier one by `verify_log`. It has no key: a writer of
the store can compute it again for an event and all later ones. Events of an older Ropeway have none and stay valid.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, overload

from ropeway.registry.layout import Log, is_digest
from ropeway.runtime.errors import DataError, NotFoundError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.manifest import canonical_json
from ropeway.storage import MAX_DOCUMENT_BYTES, Store

Event = Mapping[str, Any]
_EVENT_NAME = re.compile(r"([0-9]{8})\.json")
# Field of an event: the sha256 of the head up to and including it; absent in events of an older Ropeway.
_HEAD_FIELD = "head"
_SEAL_FIELD = "seal"  # {format, previous, sha256}; absent in events of an older Ropeway
_SEAL_FORMAT = "ropeway-seal/1"
_INTERNAL = (_HEAD_FIELD, _SEAL_FIELD)


@dataclass(frozen=True, slots=True)
class AppendResult:
    """An event, its number in the log, and whether this call wrote it."""

    number: int
    event: Event
    created: bool


@dataclass(frozen=True, slots=True)
class LogPage:
    """A part of a log, oldest first.

    Attributes:
        total: Number of events in the whole log.
        first: Number of the first event of the page; also the value of `before` for the page before this one.
        events: The facts of each event of the page.
    """

    total: int
    first: int
    events: list[dict[str, Any]]


class Events(Sequence[Event]):
    """The events of a log, read lazily: each on first access, all missing ones at once on iteration."""

    def __init__(self, store: Store, log: Log, count: int, hint: str | None = None) -> None:
        """Represent the first `count` events; `hint` is the key of the head that was found, not yet verified."""
        self._store, self.log, self._count, self.hint = store, log, count, hint
        self._read: dict[int, Event] = {}
        self._hashes: dict[int, str] = {}  # sha256 of the stored bytes of each event that was read
        self._digests: list[str] = []

    def __len__(self) -> int:
        """Return the number of events."""
        return self._count

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> list[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | list[Event]:
        """Return one event, or a list for a slice."""
        if isinstance(index, slice):
            numbers = range(*index.indices(self._count))
            self._fetch([number + 1 for number in numbers])
            return [self[number] for number in numbers]
        number = range(1, self._count + 1)[index]
        self._fetch([number])
        return _public_fields(self._read[number])

    def __iter__(self) -> Iterator[Event]:
        """Iterate over all events, oldest first."""
        self._fetch(range(1, self._count + 1))
        return (_public_fields(self._read[number]) for number in range(1, self._count + 1))

    def about(self, digests: Collection[str]) -> list[Event]:
        """Return the events of these digests, oldest first; with a head no other event is read."""
        numbers = [number for number, digest in enumerate(self.digests, 1) if digest in digests]
        self._fetch(numbers)
        return [_public_fields(self._read[number]) for number in numbers]

    @property
    def digests(self) -> list[str]:
        """The digest of each event, oldest first; from the verified head, and from the events after it."""
        if not self._digests:
            self._digests = self._read_head()
        later = range(len(self._digests) + 1, self._count + 1)
        self._fetch(later)
        self._digests += [self._read[number]["digest"] for number in later]
        return self._digests[: self._count]

    def extended_to(self, count: int) -> "Events":
        """Return the first `count` events of the log, reusing those already read."""
        longer = Events(self._store, self.log, count, self.hint)
        longer._read, longer._hashes, longer._digests = self._read, self._hashes, self._digests
        return longer

    def check_chain(self) -> None:
        """Read every event; raise DataError unless the head hash and the seal of each match the events before it."""
        running = hashlib.sha256()
        for number, event in enumerate(self, 1):
            running.update(_head_document([event["digest"]]))
            stored, link = self._read[number], self.link(number)
            head = stored.get(_HEAD_FIELD, running.hexdigest())
            previous = stored[_SEAL_FIELD]["previous"] if _SEAL_FIELD in stored else link
            if (head, previous) != (running.hexdigest(), link):
                raise DataError(
                    f"{self._store.url}: {self.log.key(number)} does not match the events before it: an event was "
                    "changed. Restore the log from a backup of the registry"
                )

    def link(self, number: int) -> str | None:
        """Return the sha256 of the event before event `number`, as stored; None for the first event."""
        if number == 1:
            return None
        self._fetch([number - 1])
        return self._hashes[number - 1]

    def _read_head(self) -> list[str]:
        """Return the digests in the head; an empty list unless they match the hash in the head's last event."""
        number = self.log.head_number(self.hint)
        if not 0 < number <= self._count:
            return []
        document = b""
        with suppress(NotFoundError, DataError):
            document = self._store.get(self.log.head_key(number))
        self._fetch([number])
        event, digests = self._read[number], document.decode(errors="replace").split()
        right = event.get(_HEAD_FIELD) == hashlib.sha256(document).hexdigest()
        return digests if right and len(digests) == number and digests[-1] == event["digest"] else []

    def _fetch(self, numbers: Sequence[int]) -> None:
        missing = [number for number in numbers if number not in self._read]
        documents = self._store.get_many([self.log.key(number) for number in missing])
        for number, document in zip(missing, documents, strict=True):
            self._read[number] = _parse_event(document, self._store, self.log, number)
            self._hashes[number] = hashlib.sha256(document).hexdigest()


def append_event(
    store: Store, log: Log, plan: Callable[[Events], Event | int], *, known: Events | None = None
) -> AppendResult:
    """Append the event that `plan` returns, or return the existing event that makes it unnecessary.

    Args:
        store: The store of the registry.
        log: The log to append to.
        plan: A pure function from all events so far to the next event, or to the number of an equivalent existing
            event; raises RegistryError to refuse. It is called again if another writer appended first.
        known: Events that were read earlier; by default they are read now.
    """
    events = read_events(store, log) if known is None else known
    while True:
        planned = plan(events)
        if isinstance(planned, int):
            return AppendResult(planned, events[planned - 1], created=False)
        number = len(events) + 1
        head = _head_document([*events.digests, planned["digest"]])
        if store.put_if_absent(log.key(number), event_document(seal_event(planned, head, events.link(number)))):
            store.put_if_absent(log.head_key(number), head)
            if events.hint and log.is_head(events.hint):
                store.delete(events.hint)  # the previous head, or an invalid one
            return AppendResult(number, planned, created=True)
        events = events.extended_to(number)


def seal_event(event: Event, head: bytes, previous: str | None) -> dict[str, Any]:
    """Return an event with the hash of its head and with its seal.

    Args:
        event: Its own fields.
        head: The head up to and including it.
        previous: The sha256 of the event before it, as stored; None for the first event of a log.
    """
    seal = {"format": _SEAL_FORMAT, "previous": previous}
    own = json.loads(event_document(event))  # as a reader gets them: JSON has no numbers as keys and no tuples
    unsealed = {**own, _HEAD_FIELD: hashlib.sha256(head).hexdigest(), _SEAL_FIELD: seal}
    return {**unsealed, _SEAL_FIELD: {**seal, "sha256": hashlib.sha256(event_document(unsealed)).hexdigest()}}


def event_document(event: Event) -> bytes:
    """Return the JSON bytes of an event; raise DataError if it is not JSON-serializable or too large."""
    try:
        document = canonical_json(event)
    except (TypeError, ValueError) as error:
        raise DataError(f"registry event: expected JSON-serializable values: {error}") from None
    if len(document) > MAX_DOCUMENT_BYTES:
        raise DataError(f"registry event: {len(document):,} bytes, expected {MAX_DOCUMENT_BYTES:,} at most")
    return document


def read_events(store: Store, log: Log) -> Events:
    """Return all events, oldest first, read lazily. Lists the log if it has no valid head.

    Raises:
        DataError: The log was listed and an event in the middle is missing.
    """
    hint = store.first_key(log.heads)
    number = log.head_number(hint)
    events = Events(store, log, number, hint)
    if number:
        with suppress(NotFoundError):
            events[-1]  # cached: every reader needs the last event
            if not store.exists(log.key(number + 1)):
                return events
    return events.extended_to(count_numbered(store, log.folder))


def verify_log(store: Store, log: Log) -> Events:
    """List, read and verify all events of a log, ignoring its heads; return them.

    Raises:
        DataError: An event is missing, malformed, or was changed after a later event was written.
    """
    events = Events(store, log, count_numbered(store, log.folder))
    events.check_chain()
    return events


def find_head(store: Store, events: Events) -> str | None:
    """Return the key of the head of all these events if it exists and is valid; every other head is garbage."""
    key = events.log.head_key(len(events))
    with suppress(NotFoundError, DataError):
        if store.get(key) == _head_document(events.digests):
            return key
    return None


def read_event(store: Store, log: Log, number: int) -> Event:
    """Return one event; raise NotFoundError if it does not exist, DataError if it is damaged."""
    return _public_fields(_parse_event(store.get(log.key(number)), store, log, number))


def _is_sealed(event: Event, document: bytes) -> bool:
    """Return whether a stored event has a seal of its own fields and is canonical JSON, or is older than seals.

    Other JSON of the same values, such as a key that occurs twice, has another sha256 in the seal of the next event.
    """
    if _SEAL_FIELD not in event:
        return True
    seal = event[_SEAL_FIELD]
    if not isinstance(seal, dict) or set(seal) != {"format", "previous", "sha256"} or seal["format"] != _SEAL_FORMAT:
        return False
    unsealed = {**event, _SEAL_FIELD: {key: seal[key] for key in ("format", "previous")}}
    return canonical_json(event) == document and hashlib.sha256(canonical_json(unsealed)).hexdigest() == seal["sha256"]


def _parse_event(document: bytes, store: Store, log: Log, number: int) -> Event:
    try:
        event = parse_json(document)
        valid = isinstance(event, dict) and is_digest(event.get("digest"))
        valid = valid and all(isinstance(event.get(key, ...), kinds) for key, kinds in log.fields.items())
        valid = valid and _is_sealed(event, document)
    except ValueError:
        valid = False
    if not valid:
        raise DataError(
            f"{store.url}: {log.key(number)} is not a valid event, or was changed after it was written; restore it "
            "from a backup of the registry. If a newer Ropeway wrote it, upgrade Ropeway"
        )
    return dict(event)


def _public_fields(event: Event) -> Event:
    """Return the fields of an event without the hash of its head and its seal."""
    return {key: value for key, value in event.items() if key not in _INTERNAL}


def _head_document(digests: Sequence[str]) -> bytes:
    """Return the bytes of a head: one digest per line, so that its hash can be updated per event."""
    return "".join(f"{digest}\n" for digest in digests).encode()


def count_numbered(store: Store, folder: str) -> int:
    """Return how many objects `00000001.json`, `00000002.json`, … a folder has; the listing is a hint.

    Raises:
        DataError: One of them is missing, but a later one exists.
    """
    names = (key.removeprefix(folder) for key in store.list_keys(folder))
    listed = [int(match[1]) for name in names if (match := _EVENT_NAME.fullmatch(name))]
    count = 0
    while count < len(listed) and listed[count] == count + 1:
        count += 1
    # A listing during concurrent writes can show a later event and miss an earlier one, so check the next key itself.
    while store.exists(f"{folder}{count + 1:08d}.json"):
        count += 1
    if listed and listed[-1] > count:
        raise DataError(
            f"{store.url}: {folder}{count + 1:08d}.json is missing but later ones exist; restore it from a backup of "
            "the registry"
        )
    return count
