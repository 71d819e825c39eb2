"""An append-only log of small JSON events, numbered from 1 without a hole, on nothing but put-if-absent.

Versions and aliases are such logs. Whoever writes event n has read all n - 1 before it: if another writer was faster,
the put fails and the writer reads on and decides again. So facts that a plan checks (this digest has no number yet, the
alias is where I think it is) hold when its event is written.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from ropeway.registry.layout import Log, is_digest
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import canonical_json
from ropeway.storage import MAX_DOCUMENT_BYTES, Store

Event = Mapping[str, Any]
_ENTRY = re.compile(r"([0-9]{8})\.json")


@dataclass(frozen=True, slots=True)
class Appended:
    """Where an event stands in its log, and whether this call wrote it."""

    number: int
    event: Event
    created: bool


class Events(Sequence[Event]):
    """A log's events, each read when it is first looked at, all that are missing at once when they are gone through."""

    def __init__(self, store: Store, log: Log, count: int) -> None:
        """Stand for the first `count` events."""
        self._store, self._log, self._count = store, log, count
        self._read: dict[int, Event] = {}

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
        if number not in self._read:
            self._read[number] = read_event(self._store, self._log, number)
        return self._read[number]

    def __iter__(self) -> Iterator[Event]:
        """Go through all, oldest first."""
        missing = [number for number in range(1, self._count + 1) if number not in self._read]
        documents = self._store.get_many([self._log.key(number) for number in missing])
        for number, document in zip(missing, documents, strict=True):
            self._read[number] = _parse_event(document, self._store, self._log, number)
        return (self._read[number] for number in range(1, self._count + 1))

    def grown(self) -> "Events":
        """Return these and the next."""
        longer = Events(self._store, self._log, self._count + 1)
        longer._read = self._read
        return longer


def append_event(store: Store, log: Log, plan: Callable[[Sequence[Event]], Event | int]) -> Appended:
    """Return the event that `plan` asked for, written, or the earlier one that it pointed to.

    Args:
        store: Where.
        log: Which.
        plan: Pure: from all events so far to the next one, or to the number of the one that says it already; raises
            RegistryError to refuse. Called again whenever another writer was faster.
    """
    events = read_events(store, log)
    while True:
        planned = plan(events)
        if isinstance(planned, int):
            return Appended(planned, events[planned - 1], created=False)
        number = len(events) + 1
        if store.put_if_absent(log.key(number), event_document(planned)):
            return Appended(number, planned, created=True)
        events = events.grown()


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
    """Return all events, oldest first; they are read when they are looked at."""
    return Events(store, log, count_events(store, log))


def read_event(store: Store, log: Log, number: int) -> Event:
    """Return one event.

    Raises:
        AbsentError: There is none of that number.
        DataError: What is there is not an event of this log.
    """
    return _parse_event(store.get(log.key(number)), store, log, number)


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


def count_events(store: Store, log: Log) -> int:
    """Return how many events there are.

    Raises:
        DataError: One is missing in the middle: somebody removed it.
    """
    names = (key.removeprefix(log.folder) for key in store.list_keys(log.folder))
    listed = [int(match[1]) for name in names if (match := _ENTRY.fullmatch(name))]
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
