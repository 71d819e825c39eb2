"""Read the messages of a chat: OpenAI's fields and roles, ShareGPT's roles, content blocks as Anthropic has them.

Everything that a message says is kept for the template, or refused by name.
"""

import json
from collections.abc import Container, Mapping, Sequence
from typing import Any

from ropeway.models.conversation import Message
from ropeway.runtime.json_text import is_too_deep
from ropeway.stages.fetch.texts import SHOWN_NAME, read_text
from ropeway.stages.fetch.values import UnreadableError, unique_keys

OPTIONAL_FIELDS = ("tool_calls", "tool_call_id", "name", "weight", "reasoning_content", "thinking", "reasoning")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip
_PART_FIELDS = {
    "text": {"text"},
    "thinking": {"thinking", "signature"},  # the provider's signature is no text of the chat
    "tool_use": {"id", "name", "input"},
    "tool_result": {"tool_use_id", "content"},
}


def read_message(turn: Mapping[str, object], role: object, content: object) -> list[Message]:
    """Return the messages of one turn: one, or one per result of a tool and the rest.

    Args:
        turn: `OPTIONAL_FIELDS` -> value, where the turn has one.
        role: Its role, in any of the known spellings.
        content: Text, null beside tool calls, or a list of content blocks.

    Raises:
        UnreadableError: Something in it is not known, and would be lost.
    """
    if not isinstance(role, str):
        raise UnreadableError("role is not text")
    if role not in _ROLES:
        raise UnreadableError(f"unknown role {role[:SHOWN_NAME]!r}")
    message: Message = {"role": _ROLES[role], "content": None}
    if role == "function_call":
        if turn.get("tool_calls"):
            raise UnreadableError("two lists of tool calls")
        message["tool_calls"] = [_read_call(_parse(content, "function call"))]
        results: list[Message] = []
    else:
        results = _read_content(message, content)
    _read_fields(message, turn)
    if results and message["content"] is None and set(message) == {"role", "content"}:
        return results
    _check_not_empty(message)
    return [*results, message]


def _read_content(message: Message, content: object) -> list[Message]:
    """Put text, reasoning and calls into the message; return the results of tools, which come before it."""
    if not isinstance(content, list):
        if content is not None:
            message["content"] = read_text(content)
        return []
    texts: list[str] = []
    results: list[Message] = []
    for part in content:
        kind = _check_part(part)
        if (kind == "text" and message.get("tool_calls")) or (kind == "tool_result" and texts):
            raise UnreadableError(f"content part of type {kind!r} after another, whose order would be lost")
        if kind == "text":
            texts.append(read_text(part.get("text")))
        elif kind == "thinking":
            message["reasoning_content"] = message.get("reasoning_content", "") + read_text(part.get("thinking"))
        elif kind == "tool_use":
            call = {"name": part.get("name"), "arguments": part.get("input") or {}}
            message.setdefault("tool_calls", []).append(_read_call({"id": part.get("id"), "function": call}))
        elif message["role"] != "user":
            raise UnreadableError(f"a tool result of role {message['role']!r}")
        else:
            results.append(_read_result(part))
    if texts:
        message["content"] = "".join(texts)
    return results


def _check_part(part: object) -> str:
    """Return the type of a content block; raise UnreadableError if something in it is not read."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind is None:
        raise UnreadableError("content part is not an object")
    if not isinstance(kind, str) or kind not in _PART_FIELDS:
        raise UnreadableError(f"content part of type {str(kind)[:SHOWN_NAME]!r}")
    _check_fields(part, {"type", *_PART_FIELDS[kind]}, "a content part")
    return kind


def _check_fields(found: Mapping[str, object], read: Container[str], what: str) -> None:
    """Raise UnreadableError for a field that has a value and is not read."""
    if unknown := sorted(str(key) for key in found if key not in read and found[key] is not None):
        raise UnreadableError(f"unused field {unknown[0][:SHOWN_NAME]!r} of {what}")


def _read_result(part: Mapping[str, Any]) -> Message:
    content = part.get("content")
    if isinstance(content, list):
        if any(_check_part(one) != "text" for one in content):
            raise UnreadableError("a tool result that is not text")
        content = "".join(read_text(one.get("text")) for one in content)
    result: Message = {"role": "tool", "content": read_text("" if content is None else content)}
    return result | ({"tool_call_id": part["tool_use_id"]} if part.get("tool_use_id") else {})


def _read_fields(message: Message, turn: Mapping[str, object]) -> None:
    """Put the further fields of a turn into its message."""
    for name in _REASONING:
        if (reasoning := turn.get(name)) not in (None, ""):
            if message.get("reasoning_content", reasoning) != reasoning:
                raise UnreadableError("two different reasonings")
            message["reasoning_content"] = read_text(reasoning)
    _read_calls(message, turn.get("tool_calls"))
    for name in ("name", "tool_call_id"):
        if turn.get(name) not in (None, ""):
            message[name] = read_text(turn[name])
    weight = turn.get("weight")
    if weight is not None and (isinstance(weight, str) or weight not in (0, 1)):
        raise UnreadableError("weight is neither 0 nor 1")
    if weight == 0 and message["role"] == "assistant":
        message["weight"] = 0


def _read_calls(message: Message, calls: object) -> None:
    if calls not in (None, []):
        if not isinstance(calls, list):
            raise UnreadableError("tool calls are not a list")
        if message.get("tool_calls"):
            raise UnreadableError("two lists of tool calls")
        message["tool_calls"] = [_read_call(call) for call in calls]
    for name, what in (("tool_calls", "tool calls"), ("reasoning_content", "reasoning")):
        if message.get(name) and message["role"] != "assistant":
            raise UnreadableError(f"{what} of role {message['role']!r}")


def _check_not_empty(message: Message) -> None:
    if message["content"] is None and not message.get("tool_calls"):
        raise UnreadableError("null text")
    needs_text = message["role"] in ("user", "assistant") and not message.get("tool_calls")
    if needs_text and not message["content"].strip():
        raise UnreadableError("empty turn")


def _read_call(call: object) -> Message:
    """Return a tool call as `apply_chat_template` expects it, with the arguments as an object."""
    if not isinstance(call, dict):
        raise UnreadableError("a tool call that is not an object")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UnreadableError("a tool call without a name")
    kind = call.get("type")
    if kind not in (None, "function", "tool_use"):
        raise UnreadableError(f"a tool call of type {str(kind)[:SHOWN_NAME]!r}")
    inner = {"name", "arguments", "parameters"}
    _check_fields(call, {"id", "type", "function"} if function is not call else {"id", "type", *inner}, "a tool call")
    if function is not call:
        _check_fields(function, inner, "a tool call")
    stated = [function[key] for key in ("arguments", "parameters") if function.get(key) is not None]
    if len(stated) != 1:
        raise UnreadableError("a tool call without arguments, or with two kinds of them")
    arguments = stated[0] if isinstance(stated[0], dict) else _parse(stated[0], "tool call's arguments")
    _check_strings(arguments)
    made: Message = {"type": "function", "function": {"name": read_text(function["name"]), "arguments": arguments}}
    return made | ({"id": read_text(call["id"])} if isinstance(call.get("id"), str) else {})


def _check_strings(value: object) -> None:
    """Raise UnreadableError for a string in JSON that cannot be stored."""
    if isinstance(value, str):
        read_text(value)
    elif isinstance(value, dict):
        for key, part in value.items():
            _check_strings(key)
            _check_strings(part)
    elif isinstance(value, list):
        for part in value:
            _check_strings(part)


def read_tools(tools: object) -> list[Message]:
    """Return the functions that the assistant may call, as `apply_chat_template` expects them.

    Raises:
        UnreadableError: They are not a list of functions with names.
    """
    if tools in (None, "", [], {}):
        return []
    if isinstance(tools, str):
        tools = _load(tools, "tools are not JSON")
    if not isinstance(tools, list):
        raise UnreadableError("tools are not a list")
    return [_read_tool(tool) for tool in tools]


def _read_tool(tool: object) -> Message:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UnreadableError("a tool without a name")
    _check_strings(tool)
    if not function["name"] or tool.get("type") not in (None, "function"):
        raise UnreadableError("a tool without a name" if not function["name"] else "a tool that is no function")
    if "input_schema" in function:
        if function.get("parameters") is not None:
            raise UnreadableError("a tool with two kinds of parameters")
        function = {**function, "parameters": function["input_schema"]}
        del function["input_schema"]
    outer = {key: value for key, value in tool.items() if key != "function"} if "function" in tool else {}
    plain = {key: value for key, value in function.items() if key != "type" or "function" in tool}
    return {**outer, "type": "function", "function": plain}


def check_order(messages: Sequence[Message]) -> None:
    """Raise UnreadableError unless there is a turn, and the last is the assistant's."""
    if not any(message["role"] not in ("system", "developer") for message in messages):
        raise UnreadableError("no turns")
    if messages[-1]["role"] != "assistant":
        raise UnreadableError("turn without an answer")


def _load(text: str, fault: str) -> object:
    """Return the value of a JSON text; raise UnreadableError with `fault` if it has none."""
    try:
        found = json.loads(text, object_pairs_hook=unique_keys)
    except UnreadableError:
        raise
    except (ValueError, RecursionError):
        raise UnreadableError(fault) from None
    if is_too_deep(found):
        raise UnreadableError("nested too deep")
    return found


def _parse(value: object, what: str) -> dict[str, Any]:
    found = _load(read_text(value), f"{what}: not a JSON object")
    if not isinstance(found, dict):
        raise UnreadableError(f"{what}: not a JSON object")
    return found
