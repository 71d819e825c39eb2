"""JSON values out of a list or one after the other, a little at a time; a broken one is passed over if it closes.

The end of a broken record is told by its brackets, strings left out. Where those do not close nothing is guessed, since
texts hold brackets and quotes too: that is an error of the file.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ropeway.runtime.errors import DataError
from ropeway.stages.fetch.decompress import open_plain, without_mark

CHUNK_BYTES = 1 << 20
LONGEST = 1 << 26  # bytes or characters of one record; beyond it the file is broken rather than long
_SPACE = re.compile(r"[ \t\n\r]*")
_BARE = re.compile(r'[^\s,\[\]{}"]+')
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}"]', re.DOTALL)
_PAIRS = {"[": "]", "{": "}"}
_ESCAPED = re.compile("[\udc80-\udcff]")  # what a byte that is no UTF-8 becomes under surrogateescape


class UnreadableError(ValueError):
    """One record cannot be read; the message is the reason that is counted."""


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object's fields; a key that comes twice is an UnreadableError, since one of the two would be lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise UnreadableError("duplicate keys")
    return found


def iterate_values(path: Path, *, in_list: bool) -> Iterator[tuple[str, object]]:
    """Yield (where, value) of a file that is one list, or values with white space between them.

    In place of a value that cannot be read but whose end can be told: an `UnreadableError`.

    Raises:
        DataError: The file ends inside the list or a value, or holds something else between or behind the values.
    """
    with open_plain(path) as file:
        window = _Window(file, path)
        if in_list:
            window.next_sign()
            window.at += 1
        end, number = "]" if in_list else "", 0
        while (sign := window.next_sign()) != end:
            if in_list and number and sign:
                if sign != ",":
                    raise window.fault(f"after record {number:,}", f"expected ',' or ']', found '{sign}'")
                window.at += 1
                window.next_sign()
            number += 1
            yield f"{path}: record {number}", window.take(number)
        window.at += len(end)
        if sign := window.next_sign():
            raise window.fault("behind the list's end", f"expected nothing, found '{sign}'")


class _Window:
    """The part of a file's text that is being looked at: one record and a chunk."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._scanner = json.JSONDecoder(object_pairs_hook=unique_keys)
        self._text, self.at, self._ended = "", 0, False
        self._grow(without_mark(file.read(CHUNK_BYTES), path))

    def next_sign(self) -> str:
        """Pass over white space; return the sign that follows, or '' at the end of the file."""
        while True:
            self.at = _SPACE.match(self._text, self.at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if self.at < len(self._text) or self._ended:
                return self._text[self.at : self.at + 1]
            self._grow(self._file.read(CHUNK_BYTES))

    def take(self, number: int) -> object:
        """Return the value that begins here and go behind it."""
        while True:
            value, end = self._decode(number)
            if end is not None and (end < len(self._text) or self._ended):
                dirty = _ESCAPED.search(self._text, self.at, end)
                self.at = end
                return UnreadableError("bad UTF-8") if dirty else value
            if self._ended:
                raise self.fault(f"after record {number - 1:,}", "the file ends early: it is cut, or does not close")
            if len(self._text) - self.at > LONGEST:
                raise self.fault(f"record {number:,}", f"bad JSON, or longer than {LONGEST:,} characters")
            self._grow(self._file.read(max(CHUNK_BYTES, len(self._text) - self.at)))

    def fault(self, where: str, what: str) -> DataError:
        """Return an error about the file."""
        return DataError(f"{self._path}: {where}: {what}; correct the file, or fetch it again")

    def _grow(self, chunk: bytes) -> None:
        self._ended = not chunk
        self._text, self.at = self._text[self.at :] + self._decoder.decode(chunk, final=self._ended), 0

    def _decode(self, number: int) -> tuple[object, int | None]:
        """Return the value here and its end; None when the text read so far does not reach that far."""
        if (sign := self._text[self.at : self.at + 1]) and sign in ",]}":
            raise self.fault(f"record {number:,}", f"expected a value, found '{sign}'")
        try:
            if bare := _BARE.match(self._text, self.at):  # a number may go on in the next chunk
                return self._scanner.decode(bare[0]), bare.end()
            return self._scanner.raw_decode(self._text, self.at)
        except UnreadableError as error:
            reason = error
        except (ValueError, RecursionError):
            reason = UnreadableError("bad JSON")
        return reason, bare.end() if bare else self._closing(number)

    def _closing(self, number: int) -> int | None:
        """Return where the value that begins here ends by its brackets; None when that is not in the text yet."""
        opened: list[str] = []
        for mark in _STRING_OR_BRACKET.finditer(self._text, self.at):
            sign = mark[0]
            if sign == '"':  # a string that does not end in this text
                return None
            if sign in _PAIRS:
                opened.append(sign)
            elif sign in _PAIRS.values() and (not opened or _PAIRS[opened.pop()] != sign):
                raise self.fault(f"record {number:,}", f"bad JSON, '{sign}' closes nothing")
            if not opened:
                return mark.end()
        return None
