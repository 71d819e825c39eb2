"""The parts of a generated answer: reasoning, tool calls and text.

A tokenizer that states a `response_template` is parsed by transformers. For all others a short list of known markers
is searched; each part names the marker that it was found by, and a text without such markers is one text.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, TypedDict

from ropeway.models.conversation import Message
from ropeway.runtime.json_text import parse_json

if TYPE_CHECKING:  # a slow import
    from transformers import PreTrainedTokenizerBase

PartKind = Literal["text", "reasoning", "tool_call"]
STATED = "response_template"  # marker of parts that transformers parsed


class Markers(NamedTuple):
    """What encloses a part; without a `close` it reaches to the end of the answer."""

    open: str
    close: str = ""


# Only at the beginning of an answer, so that an answer about such markers stays text.
REASONING = (
    Markers("<think>", "</think>"),  # DeepSeek R1, Qwen 3, SmolLM3, EXAONE 4, Phi-4 reasoning
    Markers("[THINK]", "[/THINK]"),  # Magistral
    Markers("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    Markers("<seed:think>", "</seed:think>"),  # Seed-OSS
    Markers("<|channel>thought\n", "<channel|>"),  # Gemma 4
)
# Anywhere, but only around calls that can be read.
CALLS = (
    Markers("<tool_call>", "</tool_call>"),  # Hermes, Qwen 2.5 and 3, SmolLM3: JSON; Qwen 3 Coder: tags
    Markers("<|START_ACTION|>", "<|END_ACTION|>"),  # Command R7B and A
    Markers("[TOOL_CALLS]"),  # Mistral
    Markers("<|python_tag|>"),  # Llama 3.1
)
CHANNEL, _CALL_END = "<|channel|>", "<|call|>"  # gpt-oss
_CHANNEL_MESSAGE = re.compile(
    r"(?:<\|start\|>assistant)?<\|channel\|>(?P<head>[^<]*)(?:<\|constrain\|>[^<]*)?<\|message\|>"
    r"(?P<text>.*?)(?P<end><\|end\|>|<\|return\|>|<\|call\|>|\Z)",
    re.DOTALL,
)
_CHANNELS: Mapping[str, PartKind] = {"analysis": "reasoning", "commentary": "text", "final": "text"}
_RECIPIENT = re.compile(r"to=(?:functions\.)?(\S+)")
_TAGGED_CALL = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_TAGGED_ARGUMENT = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_NAMED_CALL = re.compile(r"\s*([\w.-]+)\[ARGS\](.*)", re.DOTALL)  # Mistral since 2025
_CHANNEL_TOKENS = ("<|start|>", "<|message|>", "<|constrain|>", "<|end|>")
_CALL_BEGINS = ("{", "[", "<function=")
MARKERS = (CHANNEL, *_CHANNEL_TOKENS, *(mark for one in (*REASONING, *CALLS) for mark in one if mark))


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """A part of an answer.

    Attributes:
        text: What is between the markers.
        marker: The marker by which it was found; empty for text between parts.
        is_finished: False if the generation ended inside the part.
        name: Of a tool call: the function; empty if the call could not be read.
        arguments: Of a tool call that could be read: its arguments, usually an object.
    """

    kind: PartKind
    text: str
    marker: str = ""
    is_finished: bool = True
    name: str = ""
    arguments: Any = None


class PartRecord(TypedDict):
    """An `AnswerPart` in JSON."""

    kind: PartKind
    text: str
    marker: NotRequired[str]
    finished: NotRequired[bool]
    name: NotRequired[str]
    arguments: NotRequired[Any]


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """An answer.

    Attributes:
        text: The whole answer as it was generated, without its end token.
        parts: Its parts in order; one text if no marker was found.
    """

    text: str
    parts: tuple[AnswerPart, ...]

    @property
    def has_parts(self) -> bool:
        """Whether it has something besides text."""
        return any(part.kind != "text" for part in self.parts)

    @property
    def content(self) -> str:
        """The text without reasoning and tool calls."""
        return join_parts(self.parts, "text")

    @property
    def reasoning(self) -> str:
        """The reasoning, empty if there is none."""
        return join_parts(self.parts, "reasoning")

    @property
    def calls(self) -> tuple[AnswerPart, ...]:
        """The tool calls that could be read."""
        return tuple(part for part in self.parts if part.kind == "tool_call" and part.name)


def join_parts(parts: Sequence[AnswerPart], kind: PartKind) -> str:
    """Return the texts of the parts of one kind."""
    return "\n\n".join(part.text.strip() for part in parts if part.kind == kind and part.text.strip())


def to_records(parts: Sequence[AnswerPart]) -> list[PartRecord]:
    """Return parts for JSON, without what is empty.

    >>> to_records(split_answer("<think>Hm"))
    [{'kind': 'reasoning', 'text': 'Hm', 'marker': '<think>', 'finished': False}]
    """
    records: list[PartRecord] = []
    for part in parts:
        record: PartRecord = {"kind": part.kind, "text": part.text}
        if part.marker:
            record["marker"] = part.marker
        if not part.is_finished:
            record["finished"] = False
        if part.name:
            record |= {"name": part.name, "arguments": part.arguments}
        records.append(record)
    return records


def from_records(records: Sequence[PartRecord]) -> tuple[AnswerPart, ...]:
    """Return the parts that `to_records` wrote."""
    return tuple(
        AnswerPart(
            one["kind"],
            one["text"],
            one.get("marker", ""),
            one.get("finished", True),
            one.get("name", ""),
            one.get("arguments"),
        )
        for one in records
    )


def split_answer(text: str, *, prompt: str = "") -> tuple[AnswerPart, ...]:
    """Return the parts of an answer by known markers.

    Args:
        text: The answer, with the special tokens among its markers.
        prompt: What came before it; if it ends with a marker that opens reasoning, the answer begins inside it.

    >>> [(part.kind, part.text) for part in split_answer("<think>Hm.</think>Yes.")]
    [('reasoning', 'Hm.'), ('text', 'Yes.')]
    >>> [part.kind for part in split_answer("Write <think> first.")]
    ['text']
    """
    if text.lstrip().startswith((CHANNEL, "<|start|>assistant" + CHANNEL)):
        return tuple(_split_channels(text))
    found, rest = [], text
    for opening in REASONING:
        is_open = prompt.rstrip().endswith(opening.open.rstrip())
        if is_open or text.lstrip().startswith(opening.open):
            inside = text if is_open else text.lstrip().removeprefix(opening.open)
            reasoning, close, rest = inside.partition(opening.close)
            found = [AnswerPart("reasoning", reasoning, opening.open, bool(close))]
            break
    found += _split_calls(rest)
    return tuple(found) or (AnswerPart("text", text),)


def _split_calls(text: str) -> Iterator[AnswerPart]:
    """Yield texts and tool calls; what stands between a call's markers and is no call stays text."""
    done = at = 0  # everything before `done` is in a part
    while found := _find_call(text, at):
        begin, inside, end, after = found
        marker = text[begin:inside]
        calls = _read_calls(text[inside:end], marker)
        if not calls and after == len(text) and text[inside:].lstrip().startswith(_CALL_BEGINS):
            calls = [AnswerPart("tool_call", text[inside:], marker, is_finished=False)]
        at = after if calls else inside
        if calls:
            yield from _text(text[done:begin])
            yield from calls
            done = after
    yield from _text(text[done:])


def _find_call(text: str, at: int) -> tuple[int, int, int, int] | None:
    """Return where the next call begins, where its inside begins and ends, and where it ends; None: there is none."""
    places = [(text.find(one.open, at), one) for one in CALLS]
    begin, markers = min(((place, one) for place, one in places if place >= 0), default=(-1, CALLS[0]))
    if begin < 0:
        return None
    inside = begin + len(markers.open)
    end = text.find(markers.close or markers.open, inside)
    if end < 0:
        return begin, inside, len(text), len(text)
    return begin, inside, end, end + len(markers.close)


def _text(text: str) -> Iterator[AnswerPart]:
    if text.strip():
        yield AnswerPart("text", text)


def _split_channels(text: str) -> Iterator[AnswerPart]:
    """Yield the messages of an answer in gpt-oss's format: `<|channel|>analysis<|message|>…<|end|>`."""
    done = 0
    while hit := _CHANNEL_MESSAGE.match(text, done):
        done = hit.end()
        head, said = hit["head"].strip(), hit["text"]
        channel = head.split(maxsplit=1)[0] if head else ""
        marker = CHANNEL + channel
        if recipient := _RECIPIENT.search(head):
            arguments = _load(said)
            name = "" if arguments is None else recipient[1]
            yield AnswerPart(
                "tool_call", said, marker, hit["end"] == _CALL_END or arguments is not None, name, arguments
            )
        else:
            kind = _CHANNELS.get(channel, "text")
            yield AnswerPart(kind, said, marker, kind == "text" or bool(hit["end"]))
        if not hit[0]:
            break
    yield from _text(text[done:])


def _read_calls(text: str, marker: str) -> list[AnswerPart]:
    """Return the calls between two markers; none if it cannot be read."""
    if tagged := _TAGGED_CALL.fullmatch(text):
        return [
            AnswerPart(
                "tool_call", text, marker, name=tagged[1].strip(), arguments=dict(_TAGGED_ARGUMENT.findall(tagged[2]))
            )
        ]
    if named := _NAMED_CALL.fullmatch(text):
        arguments = _load(named[2])
        return [] if arguments is None else [AnswerPart("tool_call", text, marker, name=named[1], arguments=arguments)]
    loaded = _load(text)
    calls = []
    for one in loaded if isinstance(loaded, list) else [loaded]:
        if not isinstance(one, dict):
            return []
        name = one.get("name", one.get("tool_name"))
        arguments = one.get("arguments", one.get("parameters"))
        if not isinstance(name, str) or not name or arguments is None:
            return []
        calls.append(
            AnswerPart("tool_call", json.dumps(one, ensure_ascii=False), marker, name=name, arguments=arguments)
        )
    return calls


def _load(text: str) -> Any:  # noqa: ANN401 - JSON
    with suppress(ValueError):
        return parse_json(text)
    return None


def parse_answer(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], *, prompt: str, ends: Sequence[int]
) -> ParsedAnswer:
    """Return a generated answer in parts.

    Args:
        tokenizer: The model's; its `response_template` is used if it states one.
        ids: The generated tokens.
        prompt: The text that came before them, with special tokens.
        ends: Tokens that end an answer.
    """
    kept = list(ids)
    while kept and kept[-1] in ends:
        kept.pop()
    plain, raw = (str(tokenizer.decode(kept, skip_special_tokens=skip)) for skip in (True, False))
    if stated := getattr(tokenizer, STATED, None):
        whole = str(tokenizer.decode(list(ids), skip_special_tokens=False))
        parts = _parse_as_stated(tokenizer, whole, prompt, stated, is_finished=len(kept) < len(ids))
        if any(part.kind != "text" for part in parts):
            return ParsedAnswer(raw, parts)
    # Special tokens are shown only where they are markers.
    text = (
        raw if any(raw.count(mark) != plain.count(mark) for mark in MARKERS if mark not in _CHANNEL_TOKENS) else plain
    )
    return ParsedAnswer(text, split_answer(text, prompt=prompt))


def _parse_as_stated(
    tokenizer: "PreTrainedTokenizerBase", text: str, prompt: str, stated: Mapping[str, Any], *, is_finished: bool
) -> tuple[AnswerPart, ...]:
    """Return the parts as transformers parses them; none if it cannot."""
    try:
        message = tokenizer.parse_response(text, schema=dict(stated), prefix=prompt)
    except Exception:  # noqa: BLE001 - a malformed template or answer may raise anything
        return ()
    parts = []
    content = str(message.get("content") or "")
    reasoning = str(message.get("reasoning_content") or message.get("thinking") or "")
    calls = [_read_stated_call(call) for call in message.get("tool_calls") or ()]
    if reasoning:
        parts.append(AnswerPart("reasoning", reasoning, STATED, is_finished or bool(content or calls)))
    if content:
        parts.append(AnswerPart("text", content, STATED))
    return (*parts, *calls)


def _read_stated_call(call: Any) -> AnswerPart:  # noqa: ANN401 - as a response_template makes it
    function = call.get("function", call) if isinstance(call, dict) else {}
    function = function if isinstance(function, dict) else {}
    text = json.dumps(call, ensure_ascii=False, default=str)
    return AnswerPart(
        "tool_call", text, STATED, name=str(function.get("name") or ""), arguments=function.get("arguments")
    )


def to_message(answer: ParsedAnswer, *, has_reasoning: bool, has_calls: bool, make_id: Callable[[], str]) -> Message:
    """Return the answer as a message of the conversation.

    Where the template has a place for reasoning or tool calls, the message has them in fields of their own, and the
    template decides what stays in the history. Elsewhere they stay in the text, as they were generated.

    Args:
        answer: The answer.
        has_reasoning: Whether the template writes `reasoning_content`.
        has_calls: Whether the template writes `tool_calls`.
        make_id: Returns a new id for each call.
    """
    if (answer.reasoning and not has_reasoning) or (answer.calls and not has_calls) or not answer.has_parts:
        return {"role": "assistant", "content": answer.text}
    message: Message = {"role": "assistant", "content": answer.content}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            {"id": make_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    return message
