"""The parts of a conversation or an answer for display: reasoning, tool calls and text, cut where they are long."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ropeway.models.answer_parts import STATED, AnswerPart, PartKind, from_records
from ropeway.runtime.manifest import Json

_SHOWN_REASONING = 200  # characters in a table cell, so that the answer after it is not cut


@dataclass(frozen=True, slots=True)
class ShownPart:
    """A part of an answer for display.

    Attributes:
        title: What it is; empty for text.
        text: What it says; the arguments of a tool call, indented.
    """

    kind: PartKind
    title: str
    text: str


def show_answers(result: Json) -> list[list[ShownPart]]:
    """Return the parts of each output of a result of samples.json; one text for an output without parts."""
    parts = result.get("parts") or [None] * len(result["outputs"])
    return [
        show_parts(from_records(own)) if own else [ShownPart("text", "", text.strip())]
        for text, own in zip(result["outputs"], parts, strict=True)
    ]


def show_parts(parts: Sequence[AnswerPart]) -> list[ShownPart]:
    """Return parts for display; an answer that has reasoning only ends with an empty text."""
    shown = [_show_part(part) for part in parts]
    has_answer = any(one.kind == "tool_call" or (one.kind == "text" and one.text) for one in shown)
    return shown if has_answer else [*(one for one in shown if one.kind != "text"), ShownPart("text", "", "")]


def _show_part(part: AnswerPart) -> ShownPart:
    by = "" if part.marker in ("", STATED) else f" ({part.marker.strip()})"
    if part.kind == "reasoning":
        return ShownPart(
            "reasoning", f"{'reasoning' if part.is_finished else 'unfinished reasoning'}{by}", part.text.strip()
        )
    if part.kind == "tool_call":
        if part.name:
            return ShownPart("tool_call", f"tool call: {part.name}", indent_json(part.arguments))
        said = "tool call that cannot be read" if part.is_finished else "unfinished tool call"
        return ShownPart("tool_call", f"{said}{by}", part.text.strip())
    return ShownPart("text", "", part.text.strip())


def indent_json(value: Any) -> str:  # noqa: ANN401 - JSON
    r"""Return JSON with one item per line; a text is itself.

    >>> indent_json({"word": "rope"})
    '{\n  "word": "rope"\n}'
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)


def join_shown(parts: Sequence[ShownPart]) -> str:
    r"""Return parts as plain text, each with its title in brackets, for a table cell; long reasoning is cut.

    >>> join_shown([ShownPart("reasoning", "reasoning", "Hm."), ShownPart("text", "", "Yes.")])
    '[reasoning] Hm.\n[answer] Yes.'
    """
    if len(parts) == 1 and parts[0].kind == "text":
        return parts[0].text or "(empty answer)"
    lines = []
    for one in parts:
        text, left_out = cut_text(one.text, _SHOWN_REASONING if one.kind == "reasoning" else len(one.text))
        more = f" … ({left_out:,} more characters)" if left_out else ""
        lines.append(f"[{one.title or 'answer'}] {text or '(empty answer)'}{more}")
    return "\n".join(lines)


def cut_text(text: str, limit: int) -> tuple[str, int]:
    """Return at most `limit` characters of a text, and how many were left out.

    >>> cut_text("abcdef", 4)
    ('abcd', 2)
    """
    return text[:limit], max(len(text) - limit, 0)


def shown_calls(calls: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return (function, arguments) of the tool calls of a message."""
    return [(call["function"]["name"], indent_json(call["function"]["arguments"])) for call in calls]


def greedy_answers(samples: Mapping[str, Any], model: str) -> dict[str, str]:
    """Return prompt -> greedy answer of `base` or `tuned`, its parts in order; empty where there are no samples."""
    found = {}
    for one in samples.get("prompts", ()):
        results = {result.get("sampling_config"): result for result in one.get("results", ())}
        greedy = results.get(f"{model}/greedy", {})
        if greedy.get("outputs"):
            found[str(one["prompt"])] = join_shown(show_answers(greedy)[0])
    return found
