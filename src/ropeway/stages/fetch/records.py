"""Convert objects of published schemas to records; an object that does not fit is refused with a counted reason."""

import math
import re
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from itertools import chain

from ropeway.data.raw_records import Record, RecordKind
from ropeway.models.conversation import Conversation, Message
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.json_text import is_too_deep
from ropeway.stages.fetch.messages import OPTIONAL_FIELDS, check_order, read_message, read_tools
from ropeway.stages.fetch.texts import SHOWN_NAME, read_text
from ropeway.stages.fetch.values import UnreadableError, make_printable

_MAX_NAME = 100  # characters; a longer name is truncated
_ID = re.compile(r"(?i)(\w+_)?(id|uuid|guid|idx)|index|__index_level_\d+__")  # the last one is written by pandas


def check_columns(rows: str, columns: dict[str, str]) -> None:
    """Raise ConfigError unless `columns` maps only names that rows of this kind have."""
    kind = ROW_KINDS[rows]
    known = [*kind.required, *kind.optional, *kind.turn_fields, *kind.optional_turn_fields]
    if unknown := sorted(set(columns) - set(known)):
        raise ConfigError(f"sources: columns: {unknown} are not columns of rows: {rows}; expected any of {known}")


def required_columns(rows: str, columns: dict[str, str]) -> list[str]:
    """Return the file's names of the columns that every record of this kind must have."""
    return [columns.get(name, name) for name in ROW_KINDS[rows].required]


def find_unused(value: object, rows: str, columns: dict[str, str], ignored: Container[str] = ()) -> dict[str, bool]:
    """Return the fields of a readable record that have a value and are not read: name -> whether it is of a turn.

    Null and empty fields, ids and `weight: 1` are not returned. `ignored`: names that are not read either.
    """
    kind = ROW_KINDS[rows]
    row = _Row(value, kind, columns, ignored)
    asked = {row.column(name) for name in kind.required}
    asked |= {column for name in kind.optional if (column := row.optional_column(name))}
    found = dict.fromkeys(_iterate_unread_fields(value, asked), False)
    if kind.turn_fields and isinstance(value, dict):
        read = {row.column(name) for name in kind.turn_fields} | set(row.optional_turn_fields())
        lists = (value[row.column(name)] for name in kind.required)
        for turn in chain.from_iterable(one for one in lists if isinstance(one, list)):
            found |= dict.fromkeys(_iterate_unread_fields(turn, read), True)
    return found


def check_ignored(unused: dict[str, bool], ignored: list[str]) -> None:
    """Raise UnreadableError for the first unused field that is not in `ignored`."""
    if "*" in ignored:
        return
    for name, in_turn in unused.items():
        if name not in ignored:
            raise UnreadableError(f"unused field {name[:SHOWN_NAME]!r}" + (" of a turn" if in_turn else ""))


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
    plain = make_printable(name)
    return plain if len(plain) <= _MAX_NAME else f"{plain[:_MAX_NAME]}…"


def to_record(value: object, rows: str, columns: dict[str, str], ignored: Container[str] = ()) -> Record:
    """Return the record of an object; optional fields in `ignored` are not read.

    Raises:
        UnreadableError: The object does not fit the schema; the message is the reason.
    """
    if is_too_deep(value):
        raise UnreadableError("nested too deep")
    kind = ROW_KINDS[rows]
    return kind.read(_Row(value, kind, columns, ignored))


@dataclass(frozen=True, slots=True)
class _Row:
    """An object, its kind of rows, and the names that `columns` of params.yaml maps."""

    value: object
    kind: "RowKind"
    columns: dict[str, str]
    ignored: Container[str] = ()

    def column(self, name: str) -> str:
        """Return the file's name of a column or field."""
        return self.columns.get(name, name)

    def optional_column(self, name: str) -> str | None:
        """Return the file's name of an optional column; None if it is read only when params.yaml maps it."""
        if name in self.ignored:
            return None
        return self.columns.get(name, self.kind.system if name == "system" else name)

    def optional_turn_fields(self) -> dict[str, str]:
        """Return the file's name -> name of the further fields that a turn may have."""
        return {
            column: name for name in self.kind.optional_turn_fields if (column := self.column(name)) not in self.ignored
        }

    def message(self, turn: object) -> list[Message]:
        """Return the messages of one turn with a role."""
        role, content = (_field(turn, self.column(name)) for name in ("role", "content"))
        return self._read_message(turn, role, content)

    def _read_message(self, turn: object, role: object, content: object) -> list[Message]:
        fields = turn if isinstance(turn, dict) else {}
        further = {name: fields.get(column) for column, name in self.optional_turn_fields().items()}
        return read_message(further, role, content)

    def conversation(self, messages: list[Message]) -> Conversation:
        """Return the conversation of these messages, with the row's system message and tools."""
        system = self.optional("system") if "system" in self.kind.optional else ""
        if messages and messages[0]["role"] == "system" and set(messages[0]) == {"role", "content"}:
            if system and messages[0]["content"] != system:
                raise UnreadableError("two system messages")
            system = messages.pop(0)["content"]
        check_order(messages)
        first: list[Message] = [{"role": "system", "content": system}] if system else []
        column = self.optional_column("tools") if "tools" in self.kind.optional else None
        tools = self.value.get(column) if isinstance(self.value, dict) and column else None
        return Conversation.from_messages([*first, *messages], read_tools(tools))

    def required(self) -> list[object]:
        """Return the values of the required columns."""
        return [_field(self.value, self.column(name)) for name in self.kind.required]

    def optional(self, name: str) -> str:
        """Return an optional column's text; empty if the column is missing or null."""
        column = self.optional_column(name)
        found = self.value.get(column) if isinstance(self.value, dict) and column else None
        return "" if found is None else read_text(found)

    def turns(self) -> Iterator[tuple[object, list[object]]]:
        """Yield (turn, its required fields)."""
        (turns,) = self.required()
        if not isinstance(turns, list):
            raise UnreadableError("turns are not a list")
        names = [self.column(name) for name in self.kind.turn_fields]
        yield from ((turn, [_field(turn, name) for name in names]) for turn in turns)

    def read_messages(self) -> list[Message]:
        """Return the messages of all turns, which have a role and a content as their required fields."""
        return [one for turn, (role, content) in self.turns() for one in self._read_message(turn, role, content)]


def _read_text(row: _Row) -> str:
    return read_text(*row.required())


def _read_alpaca(row: _Row) -> Conversation:
    parts, system = row.required(), row.optional("system")
    instruction, output = map(read_text, parts)
    given = row.optional("input")
    return _make_conversation([f"{instruction}\n\n{given}" if given else instruction, output], system)


def _read_pairs(row: _Row) -> Conversation:
    texts = [read_text(part) for _, pair in row.turns() for part in pair]
    return _make_conversation(texts, row.optional("system"))


def _read_roles(row: _Row) -> Conversation:
    return row.conversation(row.read_messages())


def _read_prompt(row: _Row) -> Conversation:
    """Read prompt and completion: two texts, or two lists of messages, of which the completion is supervised."""
    prompt, completion = row.required()
    if isinstance(prompt, str) or not isinstance(completion, list):
        return _make_conversation([read_text(prompt), read_text(completion)], row.optional("system"))
    if not isinstance(prompt, list):
        raise UnreadableError("prompt is neither text nor a list")
    given = [one for turn in prompt for one in row.message(turn)]
    for message in given:
        if message["role"] == "assistant":
            message["weight"] = 0
    return row.conversation([*given, *(one for turn in completion for one in row.message(turn))])


@dataclass(frozen=True, slots=True)
class RowKind:
    """One schema of records in files."""

    read: Callable[[_Row], Record]  # returns the record, or raises UnreadableError
    required: tuple[str, ...]  # columns that every record has
    optional: tuple[str, ...] = ("system",)  # columns that may be missing or null
    turn_fields: tuple[str, ...] = ()  # fields of one turn; the required columns are then lists of turns
    optional_turn_fields: tuple[str, ...] = ()  # further fields of one turn
    system: str | None = None  # the column read as `system` where `columns` names none
    record_kind: RecordKind = "conversation"  # what the records are


# `rows` of a source in params.yaml. Add a kind here and in the schema (`ropeway.config.sections`).
ROW_KINDS = {
    "orca_chat": RowKind(_read_pairs, ("conversation",), turn_fields=("input", "output"), system="instruction"),
    "messages": RowKind(_read_roles, ("messages",), ("system", "tools"), ("role", "content"), OPTIONAL_FIELDS),
    "sharegpt": RowKind(_read_roles, ("conversations",), ("system", "tools"), ("from", "value"), OPTIONAL_FIELDS),
    "prompt_completion": RowKind(
        _read_prompt, ("prompt", "completion"), ("system", "tools"), ("role", "content"), OPTIONAL_FIELDS
    ),
    "alpaca": RowKind(_read_alpaca, ("instruction", "output"), ("input", "system")),
    "text": RowKind(_read_text, ("text",), (), record_kind="document"),
}


def _field(value: object, name: str) -> object:
    if not isinstance(value, dict):
        raise UnreadableError("not an object")
    if name not in value:
        raise UnreadableError(f"missing column {name!r}")
    return value[name]


def _make_conversation(turns: list[str], system: str) -> Conversation:
    if not turns:
        raise UnreadableError("no turns")
    if not all(turn.strip() for turn in turns):
        raise UnreadableError("empty turn")
    if len(turns) % 2:
        raise UnreadableError("turn without an answer")
    return Conversation(tuple(turns), system)
