"""What a child process writes, as lines that a log can hold: progress bars folded, colours gone, long lines capped."""

import codecs
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_MAX_CHARACTERS = 2000  # Prefect cuts a line at 1 MB (3.9.1), a page is slow long before
_PROGRESS_SECONDS = 5.0  # one state of a progress bar in so long
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_ENDS = re.compile(r"(\r\n|\n|\r)")


@dataclass
class Folder:
    """Turns bytes as they come into lines. What a carriage return overwrites is shown now and then, not every time."""

    clock: Callable[[], float] = time.monotonic
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )
    _line: str = ""
    _overwritten: str = ""
    _shown_at: float = float("-inf")

    def feed(self, data: bytes, *, last: bool = False) -> Iterator[str]:
        """Yield the lines that `data` completes; with `last`, what is left too."""
        text = self._decoder.decode(data, final=last)
        if text.endswith("\r") and not last:  # its newline may be on the way
            text, held = text[:-1], "\r"
        else:
            held = ""
        for part in _ENDS.split(self._line + text):
            if part in ("\n", "\r\n"):
                yield from self._show(self._line or self._overwritten)
                self._overwritten = ""
            elif part == "\r":
                self._overwritten = self._line or self._overwritten
                if self.clock() - self._shown_at >= _PROGRESS_SECONDS:
                    yield from self._show(self._overwritten)
                    self._shown_at, self._overwritten = self.clock(), ""
            self._line = "" if _ENDS.fullmatch(part) else part
        self._line += held
        if last:
            yield from self._show(self._line or self._overwritten)
            self._line = self._overwritten = ""

    @staticmethod
    def _show(line: str) -> Iterator[str]:
        line = _ESCAPES.sub("", line).rstrip()
        if len(line) > _MAX_CHARACTERS:
            line = f"{line[:_MAX_CHARACTERS]}… (and {len(line) - _MAX_CHARACTERS:,} characters; the log file has them)"
        if line:
            yield line
