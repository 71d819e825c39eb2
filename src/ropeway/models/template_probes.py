"""Probes of a chat template: texts that notice what is done with them, and conversations of unique words."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from ropeway.models.conversation import Message

_JOINS = ("str_join", "markup_join")  # jinja2.runtime
_NOTICED = (
    "__contains__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__len__", "__getitem__", "__iter__",
    "__mod__", "__mul__", "capitalize", "casefold", "count", "encode", "endswith", "find", "format", "index", "isalpha",
    "isdigit", "isspace", "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace",
    "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "title", "upper",
)  # fmt: skip


class WatchedText(str):
    """A text that notes every operation by which what a template writes could depend on it.

    Inserting it, joining it with `+`, stripping it on both sides and asking whether it is empty are not noted. What
    Jinja's `~` joins is a text that is not watched, so joining with it is noted.
    """

    __slots__ = ("seen",)
    seen: list[str]

    def __new__(cls, text: str, seen: list[str]) -> Self:
        """Return the text; operations are added to `seen`."""
        made = super().__new__(cls, text)
        made.seen = seen
        return made

    def __bool__(self) -> bool:
        """Return True: texts of conversations are not empty."""
        return True

    def __str__(self) -> str:
        """Return itself; note that `~` of Jinja asks."""
        if sys._getframe(1).f_code.co_name in _JOINS:  # noqa: SLF001 - the only way to know who asks
            self.seen.append("~")
        return self

    def __hash__(self) -> int:
        """Return the text's hash."""
        return super().__hash__()

    def __add__(self, other: str) -> "WatchedText":
        """Return the joined text, which is watched too."""
        return WatchedText(super().__add__(other), self.seen)

    def __radd__(self, other: str) -> "WatchedText":
        """Return the joined text, which is watched too."""
        return WatchedText(str.__add__(other, self), self.seen)

    def strip(self, characters: str | None = None) -> "WatchedText":
        """Return the stripped text, which is watched too."""
        return WatchedText(super().strip(characters), self.seen)


def _noticing(name: str) -> Callable[..., Any]:
    def notice(self: WatchedText, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - as the method has it
        self.seen.append(name)
        return getattr(str, name)(self, *arguments, **options)

    return notice


for _name in _NOTICED:
    setattr(WatchedText, _name, _noticing(_name))


class _Words:
    """Makes unique words."""

    def __init__(self, prefix: str) -> None:
        self._prefix, self.made = prefix, dict[str, str]()

    def replace(self, what: str) -> str:
        """Return a new word for a part of a conversation that `what` describes."""
        word = f"{self._prefix}{len(self.made):04d}qz"
        self.made[word] = what
        return word


def mark_parts(messages: Sequence[Message]) -> tuple[list[Message], list[dict[str, str]]]:
    """Return the messages with their parts replaced by unique words, and per message word -> what it stands for."""
    marked, words = [], []
    for number, message in enumerate(messages):
        own, copy = _Words(f"zq{number:03d}x"), json.loads(json.dumps(message))
        if copy.get("content"):
            copy["content"] = own.replace(f"a text of role {copy['role']}")
        if copy.get("reasoning_content"):
            copy["reasoning_content"] = own.replace("reasoning")
        if copy.get("name") and copy["role"] != "tool":
            copy["name"] = own.replace("names")
        for call in copy.get("tool_calls") or ():
            call["function"]["name"] = own.replace("tool calls")
            call["function"]["arguments"] = _mark_strings(call["function"]["arguments"], own)
        marked.append(copy)
        words.append(own.made)
    return marked, words


def mark_tools(tools: Sequence[Mapping[str, Any]]) -> tuple[list[Message], dict[str, str]]:
    """Return the tools with names and descriptions replaced by unique words, and word -> what it stands for.

    The names of parameters are to be found as they are.
    """
    own, marked = _Words("zqtool"), []
    for tool in json.loads(json.dumps(tools)):
        function = tool["function"]
        function["name"] = own.replace("tools")
        if isinstance(function.get("description"), str) and function["description"]:
            function["description"] = own.replace("descriptions of tools")
        properties = (function.get("parameters") or {}).get("properties")
        if isinstance(properties, dict):
            own.made |= dict.fromkeys(map(str, properties), "parameters of tools")
        marked.append(tool)
    return marked, own.made


def _mark_strings(value: Any, own: _Words) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return {key: _mark_strings(part, own) for key, part in value.items()}
    if isinstance(value, list):
        return [_mark_strings(part, own) for part in value]
    return own.replace("arguments of tool calls") if isinstance(value, str) and value else value
