"""Convert objects of published schemas to records; an object that does not fit is refused with a counted reason."""

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
_MAX_NAME = 100  # characters; a longer name is truncated
_ID = re.compile(r"(?i)(\w+_)?(id|uuid|guid|idx)|index|__index_level_\d+__")  # the last one is written by pandas
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_columns(rows: str, columns: dict[str, str]) -> None:
    """Raise ConfigError unless `columns` maps only names that rows of this kind have."""
    kind = ROW_KINDS[rows]
    known = [*kind.required, *kind.optional, *kind.turn_fields]
    if unknown := sorted(set(columns) - set(known)):
        raise ConfigError(f"sources: columns: {unknown} are not columns of rows: {rows}; expected any of {known}")


def required_columns(rows: str, columns: dict[str, str]) -> list[str]:
    """Return the file's names of the columns that every record of this kind must have."""
    return [columns.get(name, name) for name in ROW_KINDS[rows].required]


def find_unused(value: object, rows: str, columns: dict[str, str]) -> dict[str, bool]:
    """Return the fields of a readable record that have a value and are not read: name -> whether it is of a turn.

    Null and empty fields, ids and `weight: 1` are not returned.
    """
    kind = ROW_KINDS[rows]
    row = _Row(value, kind, columns)
    asked = {row.column(name) for name in kind.required}
    asked |= {column for name in kind.optional if (column := row.optional_column(name))}
    found = dict.fromkeys(_iterate_unread_fields(value, asked), False)
    if kind.turn_fields and isinstance(value, dict):
        read = {row.column(name) for name in kind.turn_fields}
        for turn in value[row.column(kind.required[0])]:
            found |= dict.fromkeys(_iterate_unread_fields(turn, read), True)
    return found


def check_ignored(unused: dict[str, bool], ignored: list[str]) -> None:
    """Raise UnreadableError for the first unused field that is not in `ignored`."""
    if "*" in ignored:
        return
    for name, in_turn in unused.items():
        if name not in ignored:
            raise UnreadableError(f"unused field {name[:_SHOWN_NAME]!r}" + (" of a turn" if in_turn else ""))


def _iterate_unread_fields(fields: object, read: Container[str]) -> Iterator[str]:
    """Yield the names of fields that are not read and have a value."""
    for name, value in fields.items() if isinstance(fields, dict) else ():
        if name in read or value is None or value in ("", [], {}) or (isinstance(value, float) and math.isnan(value)):
            continue
        if (name == "weight" and value == 1) or (_ID.fullmatch(name) and isinstance(value, str | int)):
            continue
        yield _plain_name(name)


def _plain_name(name: str) -> str:
    """Return a field's name in printable form: one line, truncated, without lone surrogates.

    >>> _plain_name("tags")
    'tags'
    """
    plain = name if name.isprintable() else name.encode("unicode_escape", "backslashreplace").decode()
    return plain if len(plain) <= _MAX_NAME else f"{plain[:_MAX_NAME]}…"


def to_record(value: object, rows: str, columns: dict[str, str]) -> Record:
    """Return the record of an object.

    Raises:
        UnreadableError: The object does not fit the schema; the message is the reason.
    """
    kind = ROW_KINDS[rows]
    return kind.read(_Row(value, kind, columns))


@dataclass(frozen=True, slots=True)
class _Row:
    """An object, its kind of rows, and the names that `columns` of params.yaml maps."""

    value: object
    kind: "RowKind"
    columns: dict[str, str]

    def column(self, name: str) -> str:
        """Return the file's name of a column or field."""
        return self.columns.get(name, name)

    def optional_column(self, name: str) -> str | None:
        """Return the file's name of an optional column; None if it is read only when params.yaml maps it."""
        return self.columns.get(name, self.kind.system if name == "system" else name)

    def required(self) -> list[object]:
        """Return the values of the required columns."""
        return [_field(self.value, self.column(name)) for name in self.kind.required]

    def optional(self, name: str) -> str:
        """Return an optional column's text; empty if the column is missing or null."""
        column = self.optional_column(name)
        found = self.value.get(column) if isinstance(self.value, dict) and column else None
        return "" if found is None else _text(found)

    def turns(self) -> tuple[str, Iterator[Iterator[object]]]:
        """Return (system message, the fields of each turn)."""
        (turns,) = self.required()
        system = self.optional("system")
        if not isinstance(turns, list):
            raise UnreadableError("turns are not a list")
        names = [self.column(name) for name in self.kind.turn_fields]
        return system, ((_field(turn, name) for name in names) for turn in turns)


def _read_text(row: _Row) -> str:
    return _text(*row.required())


def _read_alpaca(row: _Row) -> Conversation:
    parts, system = row.required(), row.optional("system")
    instruction, output = map(_text, parts)
    given = row.optional("input")
    return _make_conversation([f"{instruction}\n\n{given}" if given else instruction, output], system)


def _read_pairs(row: _Row) -> Conversation:
    system, pairs = row.turns()
    return _make_conversation([_text(part) for pair in pairs for part in pair], system)


def _read_roles(row: _Row) -> Conversation:
    system, turns = row.turns()
    return _conversation_from_roles([(role, _text(said)) for role, said in turns], system)


@dataclass(frozen=True, slots=True)
class RowKind:
    """One schema of records in files."""

    read: Callable[[_Row], Record]  # returns the record, or raises UnreadableError
    required: tuple[str, ...]  # columns that every record has
    optional: tuple[str, ...] = ("system",)  # columns that may be missing or null
    turn_fields: tuple[str, ...] = ()  # fields of one turn; the first required column is then the list of turns
    system: str | None = None  # the column read as `system` where `columns` names none
    record_kind: RecordKind = "conversation"  # what the records are


# `rows` of a source in params.yaml. Add a kind here and in the schema (`ropeway.config.params`).
ROW_KINDS = {
    "orca_chat": RowKind(_read_pairs, ("conversation",), turn_fields=("input", "output"), system="instruction"),
    "messages": RowKind(_read_roles, ("messages",), turn_fields=("role", "content")),
    "sharegpt": RowKind(_read_roles, ("conversations",), turn_fields=("from", "value")),
    "alpaca": RowKind(_read_alpaca, ("instruction", "output"), ("input", "system")),
    "text": RowKind(_read_text, ("text",), (), record_kind="document"),
}


def _conversation_from_roles(said: list[tuple[object, str]], system: str) -> Conversation:
    """Return the conversation of these (role, text) pairs; the first may be the system message."""
    if said and said[0][0] == "system":
        first = said.pop(0)[1]
        if system and first != system:
            raise UnreadableError("two system messages")
        system = first
    for at, (who, _) in enumerate(said):
        if not isinstance(who, str):
            raise UnreadableError("role is not text")
        if who not in _ROLES:  # e.g. `developer`, `tool` or `User`, which the template does not have
            told = "system message not first" if who == "system" else f"unknown role {who[:_SHOWN_NAME]!r}"
            raise UnreadableError(told)
        if _ROLES[who] != at % 2:
            raise UnreadableError("roles out of order")
    return _make_conversation([text for _, text in said], system)


def _field(value: object, name: str) -> object:
    if not isinstance(value, dict):
        raise UnreadableError("not an object")
    if name not in value:
        raise UnreadableError(f"missing column {name!r}")
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


def _make_conversation(turns: list[str], system: str) -> Conversation:
    if not turns:
        raise UnreadableError("no turns")
    if not all(turn.strip() for turn in turns):
        raise UnreadableError("empty turn")
    if len(turns) % 2:
        raise UnreadableError("turn without an answer")
    return Conversation(tuple(turns), system)
