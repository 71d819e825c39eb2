"""Objects of published schemas to records, strictly: what does not fit is refused with a counted reason."""

from ropeway.chat import Conversation
from ropeway.fetch.files import UnreadableError
from ropeway.raw import Record

_NEEDED = {
    "orca_chat": ("conversation", "system"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "input", "output"),
    "text": ("text",),
}
_ROLES = {"user": 0, "human": 0, "assistant": 1, "gpt": 1}
_SYSTEM_DEFAULT = {"system": "instruction"}


def needed_columns(rows: str, columns: dict[str, str]) -> list[str]:
    """Return the file's columns that a kind of rows reads."""
    return [_column(name, columns) for name in _NEEDED[rows]]


def to_record(value: object, rows: str, columns: dict[str, str]) -> Record:
    """Return the record in an object.

    Raises:
        UnreadableError: It does not fit; the message is the reason.
    """
    parts = [_field(value, name) for name in needed_columns(rows, columns)]
    if rows == "text":
        return _text(parts[0])
    if rows == "alpaca":
        instruction, given, output = map(_text, parts)
        return _talk([f"{instruction}\n\n{given}" if given else instruction, output], "")
    if not isinstance(parts[0], list):
        raise UnreadableError("turns are not a list")
    if rows == "orca_chat":
        names = (columns.get("input", "input"), columns.get("output", "output"))
        return _talk([_text(_field(pair, name)) for pair in parts[0] for name in names], _text(parts[1]))
    names = ("from", "value") if rows == "sharegpt" else ("role", "content")
    role, content = (columns.get(name, name) for name in names)
    said = [(_field(turn, role), _text(_field(turn, content))) for turn in parts[0]]
    system = said.pop(0)[1] if said and said[0][0] == "system" else ""
    if any(not isinstance(who, str) or _ROLES.get(who) != at % 2 for at, (who, _) in enumerate(said)):
        raise UnreadableError("roles out of order")
    return _talk([text for _, text in said], system)


def _column(name: str, columns: dict[str, str]) -> str:
    return columns.get(name, _SYSTEM_DEFAULT.get(name, name))


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
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UnreadableError("lone surrogate")
    return value


def _talk(turns: list[str], system: str) -> Conversation:
    if not turns:
        raise UnreadableError("no turns")
    if not all(turn.strip() for turn in turns):
        raise UnreadableError("empty turn")
    return Conversation(tuple(turns), system)
