"""A file's bytes as they were before compression, streamed: what is cut or damaged raises, nothing is passed over."""

import gzip
import io
from pathlib import Path
from typing import IO, Any, cast

from typing_extensions import Buffer  # collections.abc has it from Python 3.12 on

from ropeway.runtime.errors import ConfigError, DataError

COMPRESSED = (".gz", ".zst")
# Compressed bytes fed at once: as many as lately gave a quarter of a MiB. A block of 128 KiB can come out of 4 of them
# (RFC 8878, RLE), so however a file was made, 4 KiB give no more than 128 MiB.
_FED_BYTES = range(16, 1 << 12)
_WANTED_BYTES = 1 << 18
# What a text file does not begin with. Source: RFC 1952, RFC 8878, the Parquet format, the Unicode standard.
_STRANGERS = {
    b"\xff\xfe": "UTF-16; convert it (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16; convert it (iconv -f UTF-16 -t UTF-8)",
    b"\x1f\x8b": "gzip data; give its name .gz at the end",
    b"\x28\xb5\x2f\xfd": "zstd data; give its name .zst at the end",
    b"PAR1": "parquet data; give its name .parquet at the end",
}


def open_plain(path: Path) -> IO[bytes]:
    """Return an open stream of the file's uncompressed bytes.

    Reading it raises EOFError, OSError or zlib.error where the file is cut or damaged.

    Raises:
        ConfigError: This user may not read the file.
    """
    try:
        if path.suffix == ".gz":
            return cast("IO[bytes]", gzip.open(path, "rb"))
        file = path.open("rb")
    except PermissionError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); let this user read it") from None
    return io.BufferedReader(_Frames(file), 1 << 18) if path.suffix == ".zst" else file


def without_mark(head: bytes, path: Path) -> bytes:
    """Return a file's first bytes without the UTF-8 byte order mark.

    Raises:
        DataError: They are not those of a text in UTF-8.
    """
    for stranger, what in _STRANGERS.items():
        if head.startswith(stranger):
            raise DataError(f"{path}: expected text in UTF-8, found {what}")
    return head.removeprefix(b"\xef\xbb\xbf")


class _Frames(io.RawIOBase):
    """zstd frames, one after the other; unlike zstandard's own reader it tells a cut frame from the end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame: Any = None
        self._step = _FED_BYTES.start
        self._waiting = b""  # compressed, read past the end of a frame
        self._ready = memoryview(b"")  # plain, not yet asked for

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Buffer) -> int:
        while not self._ready:
            fed, self._waiting = self._waiting or self._file.read(self._step), b""
            if not fed and self._frame is not None:
                raise EOFError("it ends inside a zstd frame")
            if not fed:
                return 0
            self._feed(fed)
        with memoryview(buffer) as view:
            count = min(len(view), len(self._ready))
            view[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _feed(self, fed: bytes) -> None:
        import zstandard

        try:
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(fed))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None
        step = min(2 * self._step, len(fed) * _WANTED_BYTES // max(1, len(self._ready)))
        self._step = max(_FED_BYTES.start, min(_FED_BYTES.stop, step))
        if self._frame.eof:
            self._waiting, self._frame = self._frame.unused_data, None
