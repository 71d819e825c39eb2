"""Read the JSON values of a list or a sequence incrementally; a broken value is skipped if its brackets close.

The end of a broken record is found by matching its brackets, outside of strings. If they do not close, the file is an
error: texts contain brackets and quotes too, so the end of the record cannot be determined.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO

from ropeway.runtime.errors import DataError
from ropeway.stages.fetch.decompress import InputFile, open_decompressed, strip_byte_order_mark

CHUNK_BYTES = 1 << 20
MAX_RECORD_SIZE = 1 << 26  # bytes or characters of one record; a longer one means a broken file
_SPACE = re.compile(r"[ \t\n\r]*")
_BARE = re.compile(r'[^\s,\[\]{}"]+')
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}"]', re.DOTALL)
_PAIRS = {"[": "]", "{": "}"}
ESCAPED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8


class UnreadableError(ValueError):
    """A record cannot be read; records are counted by the message."""


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object's fields; raise UnreadableError for a duplicate key, which would lose one of its values."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise UnreadableError("duplicate keys")
    return found


def make_printable(name: str) -> str:
    """Return a name that a file chooses on one line, without control characters and lone surrogates.

    >>> make_printable("tags"), len(make_printable(chr(10)))
    ('tags', 2)
    """
    return name if name.isprintable() else name.encode("unicode_escape", "backslashreplace").decode()


def iterate_values(file: InputFile, *, in_list: bool) -> Iterator[tuple[str, object]]:
    """Yield (location, value) for each value of a file that is one list, or values separated by white space.

    A broken value is yielded as an `UnreadableError` if its end can be found.

    Raises:
        DataError: The file ends inside the list or a value, or has something else between or after the values.
    """
    with open_decompressed(file) as stream:
        buffer = _JsonBuffer(stream, file)
        if in_list:
            buffer.next_character()
            buffer.at += 1
        end, number = "]" if in_list else "", 0
        while (character := buffer.next_character()) != end:
            if in_list and number and character:
                if character != ",":
                    raise buffer.make_error(f"after record {number:,}", f"expected ',' or ']', found '{character}'")
                buffer.at += 1
                buffer.next_character()
            number += 1
            yield f"{file}: record {number}", buffer.read_value(number)
        buffer.at += len(end)
        if character := buffer.next_character():
            raise buffer.make_error("after the end of the list", f"expected end of file, found '{character}'")


class _JsonBuffer:
    """The part of a file's text in memory: one record and a chunk."""

    def __init__(self, stream: IO[bytes], file: InputFile) -> None:
        self._stream, self._file = stream, file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._scanner = json.JSONDecoder(object_pairs_hook=unique_keys)
        self._text, self.at, self._ended = "", 0, False
        self._append(strip_byte_order_mark(stream.read(CHUNK_BYTES), file))

    def next_character(self) -> str:
        """Skip white space; return the next character without consuming it, or '' at the end of the file."""
        while True:
            self.at = _SPACE.match(self._text, self.at).end()  # type: ignore[union-attr]  # it always matches
            if self.at < len(self._text) or self._ended:
                return self._text[self.at : self.at + 1]
            self._append(self._stream.read(CHUNK_BYTES))

    def read_value(self, number: int) -> object:
        """Return the value that begins here and advance past it."""
        while True:
            value, end = self._decode(number)
            if end is not None and (end < len(self._text) or self._ended):
                dirty = ESCAPED.search(self._text, self.at, end)
                self.at = end
                return UnreadableError("bad UTF-8") if dirty else value
            if self._ended:
                raise self.make_error(
                    f"after record {number - 1:,}",
                    "the file ends early: truncated, or a bracket or quote is not closed",
                )
            if len(self._text) - self.at > MAX_RECORD_SIZE:
                raise self.make_error(f"record {number:,}", f"bad JSON, or longer than {MAX_RECORD_SIZE:,} characters")
            self._append(self._stream.read(max(CHUNK_BYTES, len(self._text) - self.at)))

    def make_error(self, where: str, what: str) -> DataError:
        """Return the DataError for a fault of the file."""
        return DataError(f"{self._file}: {where}: {what}; correct the file, or fetch it again")

    def _append(self, chunk: bytes) -> None:
        self._ended = not chunk
        self._text, self.at = self._text[self.at :] + self._decoder.decode(chunk, final=self._ended), 0

    def _decode(self, number: int) -> tuple[object, int | None]:
        """Return the value here and its end; the end is None if more text must be read."""
        if (character := self._text[self.at : self.at + 1]) and character in ",]}":
            raise self.make_error(f"record {number:,}", f"expected a value, found '{character}'")
        try:
            if bare := _BARE.match(self._text, self.at):  # a number may continue in the next chunk
                return self._scanner.decode(bare[0]), bare.end()
            return self._scanner.raw_decode(self._text, self.at)
        except UnreadableError as error:
            reason = error
        except (ValueError, RecursionError):
            reason = UnreadableError("bad JSON")
        return reason, bare.end() if bare else self._find_end(number)

    def _find_end(self, number: int) -> int | None:
        """Return where the value that begins here ends, by its brackets; None if more text must be read."""
        opened: list[str] = []
        for mark in _STRING_OR_BRACKET.finditer(self._text, self.at):
            character = mark[0]
            if character == '"':  # a string that is not closed in this text
                return None
            if character in _PAIRS:
                opened.append(character)
            elif character in _PAIRS.values() and (not opened or _PAIRS[opened.pop()] != character):
                raise self.make_error(f"record {number:,}", f"bad JSON, unmatched '{character}'")
            if not opened:
                return mark.end()
        return None
