"""Objects out of json, jsonl and parquet files, also compressed, a little at a time."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from ropeway.errors import ConfigError, DataError

_CHUNK = 1 << 20
_LONGEST = 1 << 26  # characters of one record; beyond it the file is broken rather than long


class UnreadableError(ValueError):
    """One record cannot be read; the message is the reason that is counted."""


def iterate_objects(path: Path, columns: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield (where, object) of a file; in place of an object that cannot be read, an `UnreadableError`.

    Raises:
        ConfigError: The file's name ends in none of the known formats.
        DataError: The file is cut, corrupt, unreadable, empty, or parquet without these columns.
    """
    from pyarrow import ArrowException

    suffixes = [part for part in path.suffixes if part not in {".gz", ".zst"}]
    readers = {".jsonl": _lines, ".json": _json, ".parquet": _parquet}
    if not suffixes or suffixes[-1] not in readers:
        raise ConfigError(f"{path}: expected .json, .jsonl (also .gz) or .parquet; rename it or mend `paths`")
    count = 0
    try:
        for count, item in enumerate(readers[suffixes[-1]](path, columns), start=1):  # noqa: B007 - counted
            yield item
    except (OSError, EOFError, zlib.error, ArrowException) as error:
        raise DataError(
            f"{path}: cannot be read to its end after {count:,} records ({error}); fetch it anew"
        ) from error
    if not count:
        raise DataError(f"{path}: no record in it; fetch it anew or take it out of `paths`")


def parse(text: str | bytes) -> object:
    """Return the value of one line of JSON, or an `UnreadableError` that says why not."""
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, object_pairs_hook=_unique)
    except UnicodeDecodeError:
        return UnreadableError("bad UTF-8")
    except UnreadableError as error:
        return error
    except (ValueError, RecursionError):
        return UnreadableError("bad JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise UnreadableError("duplicate keys")
    return found


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if path.suffix == ".zst":
        raise ConfigError(f"{path}: .zst is not read yet in this version; unpack it, or compress it as .gz")
    return path.open("rb")


def _lines(path: Path, _columns: list[str]) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", parse(line)


def _json(path: Path, columns: list[str]) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        head = file.read(1)
        while head.isspace():
            head = file.read(1)
    yield from _list(path) if head == b"[" else _lines(path, columns)


def _list(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield a list's records; the buffer holds one record and a chunk."""
    import codecs

    decoder, scanner = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder(object_pairs_hook=_unique)
    with _open(path) as file:
        text, at, number, ended = "", 0, 0, False
        opened = False
        while True:
            while at < len(text) and (text[at].isspace() or (text[at] == "," and number) or not opened):
                opened = opened or text[at] == "["
                at += 1
            if text[at : at + 1] == "]":
                return
            try:
                if at < len(text):
                    value, at = scanner.raw_decode(text, at)
                    number += 1
                    yield f"{path}: record {number}", value
                    continue
            except UnreadableError as error:
                raise DataError(f"{path}: record {number + 1}: {error}; mend the file") from error
            except (ValueError, RecursionError) as error:
                if ended or len(text) - at > _LONGEST:
                    raise DataError(f"{path}: record {number + 1}: bad JSON ({error}); mend the file") from error
            if ended:
                raise DataError(f"{path}: the list ends early, after {number:,} records; fetch it anew")
            chunk = file.read(max(_CHUNK, len(text) - at))
            ended = not chunk
            try:
                text, at = text[at:] + decoder.decode(chunk, final=ended), 0
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: after record {number}: bad UTF-8; mend the file") from error


def _parquet(path: Path, columns: list[str]) -> Iterator[tuple[str, Any]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        found = file.schema_arrow.names
        if missing := sorted(set(columns) - set(found)):
            raise DataError(f"{path}: no column {missing}; found {found}; mend `columns`")
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
