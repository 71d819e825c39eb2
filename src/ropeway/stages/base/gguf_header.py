"""Check the header of a GGUF file before a library reads it: every count and length that it states lies in the file.

The readers of gguf and transformers trust these numbers and keep every value as an object of its own, so a small file
can fill the memory or end in an error that names no file.

Source: the GGUF specification in ggml, versions 2 and 3.
"""

import mmap
import struct
from pathlib import Path

from ropeway.runtime.errors import ConfigError

MAX_ITEMS = 10_000_000  # keys, tensors and values of lists; a vocabulary of 260,000 tokens with merges has 1.3 million
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type -> bytes of a value
_STRING, _LIST = 8, 9
_MAX_DIMENSIONS = 4


def check_gguf_header(path: Path) -> None:
    """Raise ConfigError unless a file's header is that of a GGUF file and lies in the file."""
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                _Header(content).check()
        except (ValueError, struct.error) as error:  # of an empty file, and past the end
            raise ConfigError(f"base.file: {path} is not a valid GGUF file ({error}); download it again") from None


class _Header:
    """Reads a header from its beginning to its end."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._at, self._items = content, 0, 0

    def check(self) -> None:
        """Raise ValueError or struct.error for the first fault."""
        if self._content[: len(_MAGIC)] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._at = len(_MAGIC)
        version, tensors, keys = self._read("<I"), self._read("<Q"), self._read("<Q")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, expected 2 or 3")
        self._count(tensors + keys, "keys and tensors")
        for _ in range(keys):
            self._skip_string("a key")
            self._skip_value(self._read("<I"))
        for _ in range(tensors):
            self._skip_string("a tensor's name")
            if (dimensions := self._read("<I")) > _MAX_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions:,} dimensions, expected {_MAX_DIMENSIONS} at most")
            self._skip(8 * dimensions + 12, "a tensor")  # shape, type, offset

    def _read(self, form: str) -> int:
        (number,) = struct.unpack_from(form, self._content, self._at)
        self._at += struct.calcsize(form)
        return int(number)

    def _skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self._skip_string("a text")
        elif kind == _LIST:
            self._skip_list()
        else:
            self._skip(self._size(kind), "a value")

    def _skip_list(self) -> None:
        kind, count = self._read("<I"), self._read("<Q")
        self._count(count, "values of lists")
        if kind == _STRING:
            for _ in range(count):
                self._skip_string("a text")
        else:
            self._skip(count * self._size(kind), "a list")

    def _skip_string(self, what: str) -> None:
        self._skip(self._read("<Q"), what)

    def _skip(self, count: int, what: str) -> None:
        if count > len(self._content) - self._at:
            raise ValueError(f"{what} of {count:,} bytes at byte {self._at:,} would end after the end of the file")
        self._at += count

    def _count(self, count: int, what: str) -> None:
        self._items += count
        if self._items > MAX_ITEMS:
            raise ValueError(f"{count:,} {what}, expected {MAX_ITEMS:,} items in all at most")

    def _size(self, kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"a value of the unknown type {kind}" if kind != _LIST else "a list of lists")
        return _SIZES[kind]
