"""Stream a file's decompressed bytes; a truncated or damaged file raises an error."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self, cast

from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on

from ropeway.runtime.errors import ConfigError, DataError

# Compressed bytes per read, adapted so that each read yields about 256 KiB. 4 bytes can decompress to 128 KiB
# (a block of RFC 8878, RLE), so 4 KiB of any file yield at most 128 MiB.
_INPUT_BYTES = range(16, 1 << 12)
_OUTPUT_BYTES = 1 << 18
# A file may expand to this many times its size, and to `FREE_BYTES` in any case. Text compresses 3 to 30 times. gzip
# reaches 1,030 times, for zeros; zstd, xz and bzip2 reach more.
MAX_EXPANSION = 1000
FREE_BYTES = 1 << 30
# First bytes of other formats. Source: RFC 1952, RFC 8878, the Parquet format, the Unicode standard.
_OTHER_FORMATS = {
    b"\xff\xfe": "UTF-16; convert it (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16; convert it (iconv -f UTF-16 -t UTF-8)",
    b"\x1f\x8b": "gzip data; rename it to end in .gz",
    b"\x28\xb5\x2f\xfd": "zstd data; rename it to end in .zst",
    b"BZh91AY&SY": "bzip2 data; rename it to end in .bz2",
    b"\xfd7zXZ\x00": "xz data; rename it to end in .xz",
    b"PAR1": "parquet data; rename it to end in .parquet",
    b"ARROW1\x00\x00": "arrow data; rename it to end in .arrow",
    b"PK\x03\x04": "zip data; rename it to end in .zip",
}
_OPENERS: dict[str, Callable[..., object]] = {
    ".bz2": bz2.open,
    ".gz": gzip.open,
    ".tgz": gzip.open,
    ".xz": lzma.open,
}
# What reading a truncated or damaged file or archive raises, besides the errors of pyarrow. NotImplementedError: a way
# of compression that zipfile does not have.
UNREADABLE = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
    NotImplementedError,
)


class Allowance:
    """How many decompressed bytes may be read of a file, and of all members of an archive together."""

    def __init__(self, path: Path) -> None:
        """Derive the limit from the size of the file at `path`."""
        self._path, self._stored = path, path.stat().st_size
        self._left = max(FREE_BYTES, MAX_EXPANSION * self._stored)

    def spend(self, count: int) -> None:
        """Count bytes.

        Raises:
            DataError: They are more than the file may expand to.
        """
        self._left -= count
        if self._left < 0:
            raise DataError(
                f"{self._path}: its {self._stored:,} bytes expand to more than {MAX_EXPANSION:,} times that and more "
                f"than {FREE_BYTES >> 30} GiB, as archives do that were made to fill a disk. If its data is right, "
                "unpack it and name the files in `paths`"
            )


class _CountedReader(io.RawIOBase):
    """A stream of decompressed bytes that are counted."""

    def __init__(self, stream: IO[bytes], allowance: Allowance) -> None:
        self._stream, self._allowance = stream, allowance

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()

    def readinto(self, buffer: Buffer) -> int:
        with memoryview(buffer) as view:
            data = cast("Any", self._stream).read1(len(view))  # as far as it can be read, where the rest is damaged
            view[: len(data)] = data
        self._allowance.spend(len(data))
        return len(data)


def count_bytes(stream: object, allowance: Allowance) -> IO[bytes]:
    """Return a stream whose bytes are counted."""
    return io.BufferedReader(_CountedReader(cast("IO[bytes]", stream), allowance), 1 << 18)


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file, or a member of an archive.

    Attributes:
        label: Where it is, for messages; its suffixes are its format.
        source: Its path, or what returns a new stream of a member's stored bytes; a member of a tar is read only once.
        allowance: That of the archive which it is a member of; None for a file.
    """

    label: str
    source: Path | Callable[[], IO[bytes]]
    allowance: Allowance | None = None

    @classmethod
    def of(cls, path: Path) -> Self:
        """Return the file at a path."""
        return cls(str(path), path)

    def find_allowance(self) -> Allowance:
        """Return what this file or its archive may expand to."""
        if self.allowance is None and isinstance(self.source, Path):
            return Allowance(self.source)
        if self.allowance is None:
            raise TypeError(f"{self}: expected the allowance of its archive")
        return self.allowance

    def __str__(self) -> str:
        """Return the label."""
        return self.label


def open_decompressed(file: InputFile) -> IO[bytes]:
    """Return an open stream of the file's decompressed bytes.

    Reading it raises one of `UNREADABLE` where the file is truncated or damaged, and DataError where it expands to
    more than `MAX_EXPANSION` times its size.

    Raises:
        ConfigError: This user has no permission to read the file.
    """
    suffix = PurePosixPath(file.label).suffix
    try:
        source = file.source if isinstance(file.source, Path) else file.source()
        if opener := _OPENERS.get(suffix):
            stream = opener(source, "rb")  # closes a file that it opened by its path
        else:
            stored = source.open("rb") if isinstance(source, Path) else source
            stream = io.BufferedReader(_ZstdReader(stored), 1 << 18) if suffix == ".zst" else stored
    except PermissionError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); grant read permission") from None
    if suffix in _OPENERS or suffix == ".zst":
        return count_bytes(stream, file.find_allowance())
    return cast("IO[bytes]", stream)


def strip_byte_order_mark(head: bytes, file: InputFile) -> bytes:
    """Return a file's first bytes without the UTF-8 byte order mark.

    Raises:
        DataError: They are those of another format or encoding.
    """
    for prefix, found in _OTHER_FORMATS.items():
        if head.startswith(prefix):
            raise DataError(f"{file}: expected UTF-8 text, found {found}")
    return head.removeprefix(b"\xef\xbb\xbf")


class _ZstdReader(io.RawIOBase):
    """Reads consecutive zstd frames; unlike zstandard's own reader, it raises EOFError for a truncated frame."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame: Any = None
        self._input_bytes = _INPUT_BYTES.start
        self._unread = b""  # compressed bytes after the end of a frame
        self._decompressed = memoryview(b"")  # not yet read by the caller

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Buffer) -> int:
        while not self._decompressed:
            data, self._unread = self._unread or self._file.read(self._input_bytes), b""
            if not data and self._frame is not None:
                raise EOFError("the file ends inside a zstd frame")
            if not data:
                return 0
            self._decompress(data)
        with memoryview(buffer) as view:
            count = min(len(view), len(self._decompressed))
            view[:count], self._decompressed = self._decompressed[:count], self._decompressed[count:]
        return count

    def _decompress(self, data: bytes) -> None:
        import zstandard

        try:
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._decompressed = memoryview(self._frame.decompress(data))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None
        step = min(2 * self._input_bytes, len(data) * _OUTPUT_BYTES // max(1, len(self._decompressed)))
        self._input_bytes = max(_INPUT_BYTES.start, min(_INPUT_BYTES.stop, step))
        if self._frame.eof:
            self._unread, self._frame = self._frame.unused_data, None
