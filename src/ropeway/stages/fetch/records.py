"""Objects of published schemas to records, strictly: what does not fit is refused with a counted reason."""

import re
from collections.abc import Container, Iterator

from ropeway.data.raw_records import Record
from ropeway.models.chat_template import Conversation
from ropeway.runtime.errors import ConfigError
from ropeway.stages.fetch.values import UnreadableError

# Per kind of rows: columns that every record has, columns that may be missing or null, fields of one turn.
_NAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "orca_chat": (("conversation",), ("system",), ("input", "output")),
    "messages": (("messages",), ("system",), ("role", "content")),
    "sharegpt": (("conversations",), ("system",), ("from", "value")),
    "alpaca": (("instruction", "output"), ("input", "system"), ()),
    "text": (("text",), (), ()),
}
_ROLES = {"user": 0, "human": 0, "assistant": 1, "gpt": 1}
_SHOWN_NAME = 40  # characters of a name in a reason
_LONGEST_NAME = 100  # characters; a longer one is counted by its beginning
_SYSTEM = {"orca_chat": "instruction"}  # the published schema's name for it; elsewhere `columns` must name one
_ID = re.compile(r"(?i)(\w+_)?(id|uuid|guid|idx)|index|__index_level_\d+__")  # the last: of pandas
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_columns(rows: str, columns: dict[str, str]) -> None:
    """Raise ConfigError unless `columns` maps names that this kind of rows has."""
    known = [name for names in _NAMES[rows] for name in names]
    if unknown := sorted(set(columns) - set(known)):
        raise ConfigError(f"sources: columns: {unknown} mean nothing in rows of kind {rows}; known are {known}")


def required_columns(rows: str, columns: dict[str, str]) -> list[str]:
    """Return the file's columns that every record of a kind of rows has."""
    return [columns.get(name, name) for name in _NAMES[rows][0]]


def find_unused(value: object, rows: str, columns: dict[str, str]) -> dict[str, bool]:
    """Return the fields of a readable record that carry something and are not read: name -> whether a turn has it.

    What is null or empty carries nothing; ids name a record or turn and are no part of it; `weight: 1` is usual.
    """
    required, optional, names = _NAMES[rows]
    asked = {columns.get(name, name) for name in required}
    asked |= {column for name in optional if (column := _optional_column(name, rows, columns))}
    found = dict.fromkeys(_carrying(value, asked), False)
    if names and isinstance(value, dict):
        read = {columns.get(name, name) for name in names}
        for turn in value[columns.get(required[0], required[0])]:
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
        if name in read or value is None or value in ("", [], {}) or value != value:  # noqa: PLR0124 - NaN: pandas' null
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
    required, _, names = _NAMES[rows]
    parts = [_field(value, columns.get(name, name)) for name in required]
    if rows == "text":
        return _text(parts[0])
    system = _optional(value, "system", rows, columns)
    if rows == "alpaca":
        instruction, output = map(_text, parts)
        given = _optional(value, "input", rows, columns)
        return _talk([f"{instruction}\n\n{given}" if given else instruction, output], system)
    if not isinstance(parts[0], list):
        raise UnreadableError("turns are not a list")
    fields = [columns.get(name, name) for name in names]
    if rows == "orca_chat":
        return _talk([_text(_field(pair, name)) for pair in parts[0] for name in fields], system)
    return _dialogue([(_field(turn, fields[0]), _text(_field(turn, fields[1]))) for turn in parts[0]], system)


def _dialogue(said: list[tuple[object, str]], system: str) -> Conversation:
    """Return a conversation of (role, text), of which the first may be the system's."""
    if said and said[0][0] == "system":
        first = said.pop(0)[1]
        if system and first != system:
            raise UnreadableError("two system messages")
        system = first
    for at, (who, _) in enumerate(said):
        if not isinstance(who, str) or who not in _ROLES:
            raise UnreadableError("system message not first" if who == "system" else _unknown_role(who))
        if _ROLES[who] != at % 2:
            raise UnreadableError("roles out of order")
    return _talk([text for _, text in said], system)


def _unknown_role(who: object) -> str:
    """Return the reason for a role that no template here has, e.g. `developer`, `tool` or `User`."""
    return f"unknown role {who[:_SHOWN_NAME]!r}" if isinstance(who, str) else "role is not text"


def _optional_column(name: str, rows: str, columns: dict[str, str]) -> str | None:
    default = _SYSTEM.get(rows) if name == "system" else name
    return columns.get(name, default)


def _optional(value: object, name: str, rows: str, columns: dict[str, str]) -> str:
    """Return a column's text; nothing where the column is not there, or null."""
    column = _optional_column(name, rows, columns)
    found = value.get(column) if isinstance(value, dict) and column else None
    return "" if found is None else _text(found)


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
