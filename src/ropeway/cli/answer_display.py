"""An answer in the terminal as it is generated: reasoning dimmed, tool calls as blocks, text as it is."""

import os
from collections.abc import Sequence
from enum import StrEnum
from typing import TextIO

from ropeway.models.answer_parts import CALLS, CHANNEL, REASONING, AnswerPart, Markers, split_answer
from ropeway.reporting.shown_parts import show_parts

_DIM, _RESET = "\x1b[2m", "\x1b[0m"
# Control characters of C0 but for tab and line end, of C1, and those that turn the direction of a line: a model may
# have learned to write them, and a terminal obeys them.
_CONTROLS = (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {code: repr(chr(code))[1:-1] for code in _CONTROLS}


class _State(StrEnum):
    START = "start"  # what was generated may still become a marker
    REASONING = "reasoning"
    TEXT = "text"
    HELD = "held"  # shown once it is complete


class AnswerDisplay:
    """Writes an answer piece by piece.

    Tool calls are written when the answer is complete, and so is an answer whose parts are only known then.
    """

    def __init__(self, out: TextIO, *, prompt: str = "", is_held: bool = False, is_colorful: bool = False) -> None:
        """Start an answer.

        Args:
            out: Where it is written.
            prompt: What comes before it; it may open the reasoning.
            is_held: Write nothing before the answer is complete.
            is_colorful: Whether reasoning may be dimmed.
        """
        self._out, self._is_colorful = out, is_colorful
        self._buffer, self._close, self._title = "", "", ""
        self._is_begun = False  # whether something is written
        self._state = _State.HELD if is_held else _State.START
        if not is_held and (opened := next((one for one in REASONING if _opens(prompt, one)), None)):
            self._begin_reasoning(opened)

    def feed(self, piece: str) -> None:
        """Write as much as is known of the answer."""
        self._buffer += piece
        if self._state is _State.START:
            self._read_start()
        if self._state is _State.REASONING:
            self._read_reasoning()
        if self._state is _State.TEXT:
            self._read_text()
        self._out.flush()

    def finish(self, parts: tuple[AnswerPart, ...]) -> None:
        """Write the rest of the answer; `parts` are those of the whole."""
        rest, self._buffer = self._buffer, ""
        if self._state is _State.REASONING:
            self._write(rest, is_dim=True)
        elif self._state is _State.HELD:
            self._write_parts(split_answer(rest) if self._is_begun else parts)
        else:
            self._write_text(rest)
        self._out.write("\n")
        self._out.flush()

    def _read_start(self) -> None:
        begun = self._buffer.lstrip()
        marks = [one.open for one in REASONING]
        if opened := next((one for one in REASONING if begun.startswith(one.open)), None):
            self._buffer = begun.removeprefix(opened.open)
            self._begin_reasoning(opened)
        elif begun.startswith(CHANNEL):
            self._state = _State.HELD
        elif begun and not any(mark.startswith(begun) for mark in (*marks, CHANNEL)):
            self._state = _State.TEXT

    def _begin_reasoning(self, markers: Markers) -> None:
        self._state, self._close = _State.REASONING, markers.close
        self._write("[reasoning] ", is_dim=True)

    def _read_reasoning(self) -> None:
        inside, close, rest = self._buffer.partition(self._close)
        if close:
            self._write(inside.rstrip(), is_dim=True)
            self._buffer, self._state, self._title = rest, _State.TEXT, "\n[answer] "
            return
        safe = len(inside) - _pending(inside, (self._close,))
        self._write(inside[:safe], is_dim=True)
        self._buffer = inside[safe:]

    def _read_text(self) -> None:
        marks = [one.open for one in CALLS]
        begin = min((place for mark in marks if (place := self._buffer.find(mark)) >= 0), default=-1)
        safe = begin if begin >= 0 else len(self._buffer) - _pending(self._buffer, marks)
        self._write_text(self._buffer[:safe])
        self._buffer = self._buffer[safe:]
        if begin >= 0:
            self._state = _State.HELD

    def _write_parts(self, parts: tuple[AnswerPart, ...]) -> None:
        for part in show_parts(parts):
            if part.kind == "tool_call":
                indented = "\n".join(f"  {line}" for line in part.text.splitlines())
                break_before = "\n" if self._is_begun else ""
                self._write(f"{break_before}[{part.title}]\n{indented}")
                self._title = "\n"
            elif part.kind == "reasoning":
                self._write(f"[{part.title}] {part.text}", is_dim=True)
                self._title = "\n[answer] "
            else:
                self._write_text(part.text)

    def _write_text(self, text: str) -> None:
        """Write text of the answer; blanks between its reasoning or a call and its text are left out."""
        if self._title:
            text = text.lstrip()
        if text:
            self._write(self._title + text)
            self._title = ""

    def _write(self, text: str, *, is_dim: bool = False) -> None:
        if text:
            self._is_begun = True
            shown = text.translate(_ESCAPES) if self._out.isatty() else text
            self._out.write(f"{_DIM}{shown}{_RESET}" if is_dim and self._is_colorful else shown)


def is_colorful(out: TextIO) -> bool:
    """Return whether text may be dimmed: at a terminal that is not dumb, without NO_COLOR."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _opens(prompt: str, markers: Markers) -> bool:
    return prompt.rstrip().endswith(markers.open.rstrip())


def _pending(text: str, marks: Sequence[str]) -> int:
    """Return how many last characters of a text may be the beginning of a marker.

    >>> _pending("ab<to", ["<tool_call>"])
    3
    """
    longest = max(map(len, marks)) - 1
    return max(
        (
            size
            for size in range(1, longest + 1)
            if any(mark.startswith(text[-size:]) and len(text) >= size for mark in marks)
        ),
        default=0,
    )
