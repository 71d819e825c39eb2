"""The type of a conversation in records and templates."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

_ROLES = ("user", "assistant")

Message = dict[str, Any]
"""One message in the format of transformers' `apply_chat_template`: role, content and what else the record has."""


class Form(TypedDict):
    """What a conversation has besides alternating texts; `Conversation.form` as an object."""

    roles: list[str]  # of each turn
    fields: list[Message]  # further fields of each turn, e.g. tool_calls, name, reasoning_content, weight
    tools: NotRequired[list[Message]]  # the functions that the assistant may call


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat. In the plain form user and assistant alternate, starting with the user.

    Attributes:
        turns: Texts of the user (even positions) and the assistant (odd positions); with a `form`, of each message.
        system: The system message; empty if there is none, or if it is not the first message.
        form: JSON of a `Form`; empty for the plain form.
    """

    turns: tuple[str, ...]
    system: str = ""
    form: str = ""

    @classmethod
    def from_messages(cls, messages: Sequence[Message], tools: Sequence[Message] = ()) -> "Conversation":
        """Return the conversation of these messages; it is plain if they have nothing but alternating texts.

        >>> Conversation.from_messages([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
        Conversation(turns=('Hi', 'Hello'), system='', form='')
        """
        first = messages[0] if messages else {}
        has_system = first.get("role") == "system" and set(first) == {"role", "content"}
        rest = messages[1:] if has_system else messages
        turns = tuple(str(message.get("content") or "") for message in rest)
        fields = [_further(message) for message in rest]
        roles = [str(message["role"]) for message in rest]
        form: Form = {"roles": roles, "fields": fields}
        if tools:
            form["tools"] = list(tools)
        is_plain = not tools and not any(fields) and all(role == _ROLES[at % 2] for at, role in enumerate(roles))
        text = "" if is_plain else json.dumps(form, ensure_ascii=False, separators=(",", ":"))
        return cls(turns, str(first["content"]) if has_system else "", text)

    def to_messages(self) -> list[Message]:
        """Return the conversation in the format of transformers' `apply_chat_template`.

        >>> Conversation(("Hi",), system="Be kind.").to_messages()
        [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'Hi'}]
        """
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        if not self.form:
            return system + [{"role": _ROLES[at % 2], "content": text} for at, text in enumerate(self.turns)]
        form = self.read_form()
        return system + [
            {"role": role, "content": text, **{key: value for key, value in fields.items() if key != "weight"}}
            for role, text, fields in zip(form["roles"], self.turns, form["fields"], strict=True)
        ]

    def read_form(self) -> Form:
        """Return the roles, further fields and tools."""
        if not self.form:
            return {"roles": [_ROLES[at % 2] for at in range(len(self.turns))], "fields": [{}] * len(self.turns)}
        form: Form = json.loads(self.form)
        return form

    def further_texts(self) -> list[str]:
        """Return all strings of the form: reasoning, names, calls with their arguments, tools."""
        return list(_strings(json.loads(self.form))) if self.form else []

    def supervised_messages(self) -> list[int]:
        """Return which items of `to_messages` are the assistant's and have no weight of 0."""
        first = int(bool(self.system))
        if not self.form:
            return list(range(first + 1, first + len(self.turns), 2))
        form = self.read_form()
        each = enumerate(zip(form["roles"], form["fields"], strict=True), start=first)
        return [at for at, (role, fields) in each if role == "assistant" and fields.get("weight", 1) != 0]


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _further(message: Mapping[str, Any]) -> Message:
    """Return what a message has besides role and text; a content of null is kept apart from an empty text."""
    fields = {key: value for key, value in message.items() if key not in {"role", "content"}}
    return fields if message.get("content") is not None else {"content": None, **fields}
