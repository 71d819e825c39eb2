"""Limits on YAML: a few lines of aliases or of merges (`<<`) can stand for billions of values.

Whatever walks over the parsed file (validation, a copy, a message) would visit each of them. An alias counts as all the
values of its anchor, so the count is that of the file without aliases.
"""

import re
from collections.abc import Iterable

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    ScalarEvent,
)
from ruamel.yaml.nodes import Node

MAX_DEPTH = 100  # nested lists and mappings; a profile needs 5
MAX_VALUES = 1_000_000  # keys, lists and mappings included; `forget` of 100,000 records has 100,000
MAX_BYTES = 16 << 20
MAX_DIGITS = 1000  # characters of a number; Python refuses to print an integer of more than 4,300 digits
_NUMBER = re.compile(r"[-+0-9a-fA-FoxX_.:]+")  # what some YAML reads as a number


class LimitError(MarkedYAMLError):  # type: ignore[misc]  # ruamel has no types
    """A file is beyond the limits; it may still be YAML."""


def load_yaml(data: bytes) -> object:
    """Return the value of YAML 1.2, parsed with libyaml: 35 ms for 11 kB, where DVC's own reader takes 124 ms.

    Raises:
        YAMLError: It is not YAML, or beyond the limits.
        ValueError: A number has too many digits.
    """
    check_limits(data)
    return YAML(typ="safe").load(data)


def check_limits(data: bytes) -> None:
    """Raise YAMLError unless bytes are YAML 1.2 within the limits; no value is built."""
    if len(data) > MAX_BYTES:
        raise LimitError(problem=f"{len(data):,} bytes, expected {MAX_BYTES:,} at most")
    check_events(YAML(typ="safe").parse(data))


class BoundedComposer(Composer):
    """Composer of ruamel's own parser that stops at the limits."""

    def __init__(self, loader: object = None) -> None:
        """Count from 0."""
        super().__init__(loader=loader)
        self._counter = _Counter()

    def compose_document(self) -> Node | None:
        """Compose a document, unless it is of another version of YAML."""
        if isinstance(event := self.parser.peek_event(), DocumentStartEvent):
            check_version(event)
        node: Node | None = super().compose_document()
        return node

    def compose_node(self, parent: Node | None, index: object) -> Node | None:
        """Compose a node, unless it is beyond a limit."""
        event = self.parser.peek_event()
        self._counter.begin(event)
        node: Node | None = super().compose_node(parent, index)
        if isinstance(event, CollectionStartEvent):
            self._counter.end()
        return node


def check_events(events: Iterable[Event]) -> None:
    """Raise MarkedYAMLError if the events of a parser are beyond the limits; for parsers without a composer."""
    counter = _Counter()
    for event in events:
        if isinstance(event, CollectionEndEvent):
            counter.end()
        elif isinstance(event, DocumentStartEvent):
            check_version(event)
        elif isinstance(event, AliasEvent | ScalarEvent | CollectionStartEvent):
            counter.begin(event)


def check_version(event: DocumentStartEvent) -> None:
    """Raise MarkedYAMLError for a document of YAML 1.1, whose numbers to base 60 take quadratic time."""
    if event.version not in (None, (1, 2)):
        raise _error(event, f"expected YAML 1.2, found {'.'.join(map(str, event.version))}")


class _Counter:
    """Counts the values of a file as if every alias were written out."""

    def __init__(self) -> None:
        self._values = 0
        self._sizes: dict[str, int] = {}  # anchor -> values; 0 while the anchor's own value is open
        self._open: list[tuple[str | None, int]] = []  # (anchor, values before it) of each open list or mapping

    def begin(self, event: Event) -> None:
        """Count a scalar, an alias, or the start of a list or mapping."""
        anchor: str | None = getattr(event, "anchor", None)
        if isinstance(event, ScalarEvent) and len(event.value) > MAX_DIGITS and _NUMBER.fullmatch(event.value):
            raise _error(event, f"expected a number of at most {MAX_DIGITS} characters, found {len(event.value):,}")
        if isinstance(event, AliasEvent):
            size = self._sizes.get(anchor or "", 1)  # an unknown anchor is the composer's error
            if not size:
                raise _error(event, f"the value of &{anchor} contains itself")
        else:
            size = 1
            if anchor is not None:
                self._sizes[anchor] = 0 if isinstance(event, CollectionStartEvent) else 1
        if isinstance(event, CollectionStartEvent):
            self._open.append((anchor, self._values))
        self._values += size
        if self._values > MAX_VALUES:
            raise _error(event, f"expected at most {MAX_VALUES:,} values, those of aliases included, found more")
        if len(self._open) > MAX_DEPTH:
            raise _error(event, f"expected at most {MAX_DEPTH} nested lists or mappings, found more")

    def end(self) -> None:
        """Close the innermost list or mapping."""
        anchor, before = self._open.pop()
        if anchor is not None:
            self._sizes[anchor] = self._values - before


def _error(event: Event, problem: str) -> LimitError:
    return LimitError(problem=problem, problem_mark=event.start_mark)
