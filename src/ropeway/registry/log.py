"""An append-only log of small JSON events, numbered from 1 without a hole, on nothing but put-if-absent.

Versions, aliases and reviews are such logs. Whoever writes event n has read the log up to n - 1: if another writer was
faster, the put fails and the writer reads on and decides again. So facts that a plan checks (this digest has no number
yet, the alias is where I think it is) hold when its event is written.

A reader finds the end of a log by its head: an object, written after each event, that lists the digests of all events
so far. A head is a hint. The event that it names must exist and the next must not; its digests are used only if they
hash to what that event says. Otherwise the log is listed and read. See docs/decisions/0011-registry-heads.md.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, overload

from ropeway.registry.layout import Log, is_digest
from ropeway.runtime.errors import AbsentError, DataError
from ropeway.runtime.manifest import canonical_json
from ropeway.storage import MAX_DOCUMENT_BYTES, Store

Event = Mapping[str, Any]
_EVENT_NAME = re.compile(r"([0-9]{8})\.json")
# Of an event: the sha256 of the head that lists it and all before it; absent where an old Ropeway wrote it.
_HEAD = "head"


@dataclass(frozen=True, slots=True)
class AppendResult:
    """Where an event stands in its log, and whether this call wrote it."""

    number: int
    event: Event
    created: bool


class Events(Sequence[Event]):
    """A log's events, each read when it is first looked at, all that are missing at once when they are gone through."""

    def __init__(self, store: Store, log: Log, count: int, hint: str | None = None) -> None:
        """Stand for the first `count` events; `hint` is the key of the head that was found, right or wrong."""
        self._store, self.log, self._count, self.hint = store, log, count, hint
        self._read: dict[int, Event] = {}
        self._digests: list[str] = []

    def __len__(self) -> int:
        """Return how many there are."""
        return self._count

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> list[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | list[Event]:
        """Return one event or several, as a list would."""
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(self._count))]
        number = range(1, self._count + 1)[index]
        self._fetch([number])
        return _facts(self._read[number])

    def __iter__(self) -> Iterator[Event]:
        """Go through all, oldest first."""
        self._fetch(range(1, self._count + 1))
        return (_facts(self._read[number]) for number in range(1, self._count + 1))

    @property
    def digests(self) -> list[str]:
        """The digest of each event, oldest first: from the head as far as it is verified, else from the events."""
        if not self._digests:
            self._digests = self._read_head()
        later = range(len(self._digests) + 1, self._count + 1)
        self._fetch(later)
        self._digests += [self._read[number]["digest"] for number in later]
        return self._digests[: self._count]

    def extended_to(self, count: int) -> "Events":
        """Return these and the next, `count` in all."""
        longer = Events(self._store, self.log, count, self.hint)
        longer._read, longer._digests = self._read, self._digests
        return longer

    def check_heads(self) -> None:
        """Read every event; raise DataError unless each that names a head names that of the events up to it."""
        running = hashlib.sha256()
        for number, event in enumerate(self, 1):
            running.update(_head_document([event["digest"]]))
            if self._read[number].get(_HEAD, running.hexdigest()) != running.hexdigest():
                raise DataError(
                    f"{self._store.url}: {self.log.key(number)} does not continue the events before it: one of them "
                    "was changed. Restore the log from a copy of the registry"
                )

    def _read_head(self) -> list[str]:
        """Return the digests that the head lists; none unless they are those that its event was written after."""
        number = self.log.head_number(self.hint)
        if not 0 < number <= self._count:
            return []
        document = b""
        with suppress(AbsentError, DataError):
            document = self._store.get(self.log.head_key(number))
        self._fetch([number])
        event, digests = self._read[number], document.decode(errors="replace").split()
        right = event.get(_HEAD) == hashlib.sha256(document).hexdigest()
        return digests if right and len(digests) == number and digests[-1] == event["digest"] else []

    def _fetch(self, numbers: Sequence[int]) -> None:
        missing = [number for number in numbers if number not in self._read]
        documents = self._store.get_many([self.log.key(number) for number in missing])
        for number, document in zip(missing, documents, strict=True):
            self._read[number] = _parse_event(document, self._store, self.log, number)


def append_event(
    store: Store, log: Log, plan: Callable[[Events], Event | int], *, known: Events | None = None
) -> AppendResult:
    """Return the event that `plan` asked for, written, or the earlier one that it pointed to.

    Args:
        store: Where.
        log: Which.
        plan: Pure: from all events so far to the next one, or to the number of the one that says it already; raises
            RegistryError to refuse. Called again whenever another writer was faster.
        known: The events as they were read some time ago; default: read now.
    """
    events = read_events(store, log) if known is None else known
    while True:
        planned = plan(events)
        if isinstance(planned, int):
            return AppendResult(planned, events[planned - 1], created=False)
        number = len(events) + 1
        head = _head_document([*events.digests, planned["digest"]])
        if store.put_if_absent(log.key(number), event_document({**planned, _HEAD: hashlib.sha256(head).hexdigest()})):
            store.put_if_absent(log.head_key(number), head)
            if events.hint:
                store.delete(events.hint)  # of an earlier event, or of none
            return AppendResult(number, planned, created=True)
        events = events.extended_to(number)


def event_document(event: Event) -> bytes:
    """Return the bytes of an event; raise DataError when JSON cannot say it or it is too long to be read again."""
    try:
        document = canonical_json(event)
    except (TypeError, ValueError) as error:
        raise DataError(f"registry event: expected what JSON can say: {error}") from None
    if len(document) > MAX_DOCUMENT_BYTES:
        raise DataError(f"registry event: {len(document):,} bytes, expected {MAX_DOCUMENT_BYTES:,} at most")
    return document


def read_events(store: Store, log: Log) -> Events:
    """Return all events, oldest first; they are read when they are looked at. The log is listed if no head is right.

    Raises:
        DataError: One is missing in the middle, of a log that had to be listed.
    """
    hint = store.first_key(log.heads)
    number = log.head_number(hint)
    events = Events(store, log, number, hint)
    if number:
        with suppress(AbsentError):
            events[-1]  # kept: whoever reads a log needs its last event
            if not store.exists(log.key(number + 1)):
                return events
    return events.extended_to(_count_events(store, log))


def verify_log(store: Store, log: Log) -> Events:
    """Return all events of a log, listed, read and verified; heads are not looked at.

    Raises:
        DataError: One is missing in the middle, is no event, or was changed after a later one was written.
    """
    events = Events(store, log, _count_events(store, log))
    events.check_heads()
    return events


def find_head(store: Store, events: Events) -> str | None:
    """Return the key of the head of all these events if it is there and right: any other head is garbage."""
    key = events.log.head_key(len(events))
    with suppress(AbsentError, DataError):
        if store.get(key) == _head_document(events.digests):
            return key
    return None


def read_event(store: Store, log: Log, number: int) -> Event:
    """Return one event; raise AbsentError when there is none of that number, DataError when it is damaged."""
    return _facts(_parse_event(store.get(log.key(number)), store, log, number))


def _parse_event(document: bytes, store: Store, log: Log, number: int) -> Event:
    try:
        event = json.loads(document)
        sound = isinstance(event, dict) and is_digest(event.get("digest"))
        sound = sound and all(isinstance(event.get(key, ...), kinds) for key, kinds in log.fields.items())
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        raise DataError(f"{store.url}: {log.key(number)} is not an event; restore it from a copy of the registry")
    return dict(event)


def _facts(event: Event) -> Event:
    """Return what an event says, without what it says of the log."""
    return {key: value for key, value in event.items() if key != _HEAD}


def _head_document(digests: Sequence[str]) -> bytes:
    """Return a head's bytes: one digest per line. So the hash of each event's head is one running hash."""
    return "".join(f"{digest}\n" for digest in digests).encode()


def _count_events(store: Store, log: Log) -> int:
    """Return how many events there are, by a listing of them all."""
    names = (key.removeprefix(log.folder) for key in store.list_keys(log.folder))
    listed = [int(match[1]) for name in names if (match := _EVENT_NAME.fullmatch(name))]
    count = 0
    while count < len(listed) and listed[count] == count + 1:
        count += 1
    # A folder read while others write may show a late entry and not an earlier one, so ask for the next by name.
    while store.exists(log.key(count + 1)):
        count += 1
    if listed and listed[-1] > count:
        raise DataError(
            f"{store.url}: {log.key(count + 1)} is missing though later events exist; restore it from a copy of the "
            "registry"
        )
    return count
