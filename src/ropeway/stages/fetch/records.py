"""Objects of published schemas to records, strictly: what does not fit is refused with a counted reason."""

import math
import re
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from ropeway.data.raw_records import Record, RecordKind
from ropeway.models.conversation import Conversation
from ropeway.runtime.errors import ConfigError
from ropeway.stages.fetch.values import UnreadableError

_ROLES = {"user": 0, "human": 0, "assistant": 1, "gpt": 1}
_SHOWN_NAME = 40  # characters of a name in a reason
_LONGEST_NAME = 100  # characters; a longer one is counted by its beginning
_ID = re.compile(r"(?i)(\w+_)?(id|uuid|guid|idx)|index|__index_level_\d+__")  # the last: of pandas
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_columns(rows: str, columns: dict[str, str]) -> None:
    """Raise ConfigError unless `columns` maps names that this kind of rows has."""
    kind = ROW_KINDS[rows]
    known = [*kind.required, *kind.optional, *kind.of_turn]
    if unknown := sorted(set(columns) - set(known)):
        raise ConfigError(f"sources: columns: {unknown} mean nothing in rows of kind {rows}; known are {known}")


def required_columns(rows: str, columns: dict[str, str]) -> list[str]:
    """Return the file's columns that every record of a kind of rows has."""
    return [columns.get(name, name) for name in ROW_KINDS[rows].required]


def find_unused(value: object, rows: str, columns: dict[str, str]) -> dict[str, bool]:
    """Return the fields of a readable record that carry something and are not read: name -> whether a turn has it.

    What is null or empty carries nothing; ids name a record or turn and are no part of it; `weight: 1` is usual.
    """
    kind = ROW_KINDS[rows]
    row = _Row(value, kind, columns)
    asked = {row.column(name) for name in kind.required}
    asked |= {column for name in kind.optional if (column := row.optional_column(name))}
    found = dict.fromkeys(_carrying(value, asked), False)
    if kind.of_turn and isinstance(value, dict):
        read = {row.column(name) for name in kind.of_turn}
        for turn in value[row.column(kind.required[0])]:
            found |= dict.fromkeys(_carrying(turn, read), True)
    return found


def check_ignored(unused: dict[str, bool], ignored: list[str]) -> None:
    """Raise UnreadableError for the first field that carries something and is not among the ignored ones."""
    if "*" in ignored:
        return
    for name, of_turn in unused.items():
        if name not in ignored:
            raise UnreadableError(f"unused field {name[:_SHOWN_NAME]!r}" + (" of a turn" if of_turn else ""))


def _carrying(fields: object, read: Container[str]) -> Iterator[str]:
    """Yield the names of fields that are not read and carry something."""
    for name, value in fields.items() if isinstance(fields, dict) else ():
        if name in read or value is None or value in ("", [], {}) or (isinstance(value, float) and math.isnan(value)):
            continue
        if (name == "weight" and value == 1) or (_ID.fullmatch(name) and isinstance(value, str | int)):
            continue
        yield _plain_name(name)


def _plain_name(name: str) -> str:
    """Return a field's name as it can be counted, written and printed: one line, capped, no lone surrogate.

    >>> _plain_name("tags")
    'tags'
    """
    plain = name if name.isprintable() else name.encode("unicode_escape", "backslashreplace").decode()
    return plain if len(plain) <= _LONGEST_NAME else f"{plain[:_LONGEST_NAME]}…"


def to_record(value: object, rows: str, columns: dict[str, str]) -> Record:
    """Return the record in an object.

    Raises:
        UnreadableError: It does not fit; the message is the reason.
    """
    kind = ROW_KINDS[rows]
    return kind.read(_Row(value, kind, columns))


@dataclass(frozen=True, slots=True)
class _Row:
    """An object, and under which names `columns` of params finds what its kind asks for."""

    value: object
    kind: "RowKind"
    columns: dict[str, str]

    def column(self, name: str) -> str:
        """Return the file's name of a column or field."""
        return self.columns.get(name, name)

    def optional_column(self, name: str) -> str | None:
        """Return the file's name of a column that may be missing; None where params would have to name it."""
        return self.columns.get(name, self.kind.system if name == "system" else name)

    def required(self) -> list[object]:
        """Return what every record of the kind has."""
        return [_field(self.value, self.column(name)) for name in self.kind.required]

    def optional(self, name: str) -> str:
        """Return a column's text; nothing where the column is not there, or null."""
        column = self.optional_column(name)
        found = self.value.get(column) if isinstance(self.value, dict) and column else None
        return "" if found is None else _text(found)

    def turns(self) -> tuple[str, Iterator[Iterator[object]]]:
        """Return (system message, the fields of each turn, read one by one)."""
        (turns,) = self.required()
        system = self.optional("system")
        if not isinstance(turns, list):
            raise UnreadableError("turns are not a list")
        names = [self.column(name) for name in self.kind.of_turn]
        return system, ((_field(turn, name) for name in names) for turn in turns)


def _read_text(row: _Row) -> str:
    return _text(*row.required())


def _read_alpaca(row: _Row) -> Conversation:
    parts, system = row.required(), row.optional("system")
    instruction, output = map(_text, parts)
    given = row.optional("input")
    return _talk([f"{instruction}\n\n{given}" if given else instruction, output], system)


def _read_pairs(row: _Row) -> Conversation:
    system, pairs = row.turns()
    return _talk([_text(part) for pair in pairs for part in pair], system)


def _read_roles(row: _Row) -> Conversation:
    system, turns = row.turns()
    return _dialogue([(role, _text(said)) for role, said in turns], system)


@dataclass(frozen=True, slots=True)
class RowKind:
    """One form of records in files."""

    read: Callable[[_Row], Record]  # returns the record, or raises UnreadableError
    required: tuple[str, ...]  # columns that every record has
    optional: tuple[str, ...] = ("system",)  # columns that may be missing or null
    of_turn: tuple[str, ...] = ()  # fields of one turn; the first required column is then the list of turns
    system: str | None = None  # the column read as `system` where `columns` names none
    holds: RecordKind = "conversation"  # what the records are


# `rows` of a source in params.yaml. A kind is added here and in the schema (`ropeway.config.params`).
ROW_KINDS = {
    "orca_chat": RowKind(_read_pairs, ("conversation",), of_turn=("input", "output"), system="instruction"),
    "messages": RowKind(_read_roles, ("messages",), of_turn=("role", "content")),
    "sharegpt": RowKind(_read_roles, ("conversations",), of_turn=("from", "value")),
    "alpaca": RowKind(_read_alpaca, ("instruction", "output"), ("input", "system")),
    "text": RowKind(_read_text, ("text",), (), holds="document"),
}


def _dialogue(said: list[tuple[object, str]], system: str) -> Conversation:
    """Return a conversation of (role, text), of which the first may be the system's."""
    if said and said[0][0] == "system":
        first = said.pop(0)[1]
        if system and first != system:
            raise UnreadableError("two system messages")
        system = first
    for at, (who, _) in enumerate(said):
        if not isinstance(who, str):
            raise UnreadableError("role is not text")
        if who not in _ROLES:  # e.g. `developer`, `tool` or `User`, which no template here has
            told = "system message not first" if who == "system" else f"unknown role {who[:_SHOWN_NAME]!r}"
            raise UnreadableError(told)
        if _ROLES[who] != at % 2:
            raise UnreadableError("roles out of order")
    return _talk([text for _, text in said], system)


def _field(value: object, name: str) -> object:
    if not isinstance(value, dict):
        raise UnreadableError("not an object")
    if name not in value:
        raise UnreadableError("missing column")
    return value[name]


def _text(value: object) -> str:
    if value is None:
        raise UnreadableError("null text")
    if not isinstance(value, str):
        raise UnreadableError("not text")
    if "\0" in value:
        raise UnreadableError("NUL")
    if not value.isascii() and _SURROGATE.search(value):
        raise UnreadableError("lone surrogate")
    return value


def _talk(turns: list[str], system: str) -> Conversation:
    if not turns:
        raise UnreadableError("no turns")
    if not all(turn.strip() for turn in turns):
        raise UnreadableError("empty turn")
    if len(turns) % 2:
        raise UnreadableError("turn without an answer")
    return Conversation(tuple(turns), system)
