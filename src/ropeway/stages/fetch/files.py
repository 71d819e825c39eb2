"""Read objects from files and members of archives, compressed or not, in bounded memory."""

import json
from collections.abc import Callable, Iterator
from typing import IO

from ropeway.runtime.errors import DataError
from ropeway.stages.fetch.columnar import read_arrow, read_parquet
from ropeway.stages.fetch.decompress import UNREADABLE, InputFile, open_decompressed, strip_byte_order_mark
from ropeway.stages.fetch.delimited import read_csv, read_tsv
from ropeway.stages.fetch.formats import check_format
from ropeway.stages.fetch.values import MAX_RECORD_SIZE, UnreadableError, iterate_values, unique_keys

Item = tuple[str, object]  # location of an object, and the object


def iterate_objects(file: InputFile, required: list[str]) -> Iterator[Item]:
    """Yield (location, object) for each object of a file; an unreadable object is yielded as an `UnreadableError`.

    Raises:
        ConfigError: The file's name has no supported suffix, or this user has no permission to read it.
        DataError: The file is truncated, corrupt, empty, or lacks required columns.
    """
    from pyarrow import ArrowException

    form = check_format(file.label)
    count = 0
    try:
        for item in READERS[form](file, required):
            count += 1
            yield item
    except (*UNREADABLE, ArrowException, UnicodeDecodeError) as error:  # the last one: of a column's name
        raise DataError(f"{file}: reading failed after {count:,} records ({error}); fetch it again") from error
    if not count:
        raise DataError(f"{file}: contains 0 records; fetch it again or remove it from `paths`")


def parse(line: bytes) -> object:
    """Return the value of one line of JSON, or an `UnreadableError` with the reason."""
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError:
        return UnreadableError("bad UTF-8")
    except UnreadableError as error:
        return error
    except (ValueError, RecursionError):
        return UnreadableError("bad JSON")


def _read_jsonl(file: InputFile, _required: list[str]) -> Iterator[Item]:
    with open_decompressed(file) as stream:
        for number, line in enumerate(_bounded_lines(stream, file), start=1):
            if line is None:
                yield f"{file}:{number}", UnreadableError("record too long")
            elif line.strip():
                yield f"{file}:{number}", parse(line)


def _bounded_lines(stream: IO[bytes], file: InputFile) -> Iterator[bytes | None]:
    """Yield lines; None for a line longer than `MAX_RECORD_SIZE` bytes, which is never held in memory."""
    first = True
    while line := stream.readline(MAX_RECORD_SIZE):
        if len(line) == MAX_RECORD_SIZE and line[-1:] != b"\n":
            while (more := stream.readline(MAX_RECORD_SIZE)) and more[-1:] != b"\n":
                pass
            yield None
        else:
            yield strip_byte_order_mark(line, file) if first else line
        first = False


def _read_json(file: InputFile, _required: list[str]) -> Iterator[Item]:
    """Return the records of a JSON list, of JSON lines, or of objects that span several lines."""
    with open_decompressed(file) as stream:
        head = strip_byte_order_mark(stream.read(1 << 16), file).lstrip()
    if head[:1] == b"[":
        return iterate_values(file, in_list=True)
    return _read_jsonl(file, _required) if _looks_like_lines(file) else iterate_values(file, in_list=False)


def _looks_like_lines(file: InputFile) -> bool:
    """Return whether one of the first two lines is a complete object; the first line may be a broken record."""
    with open_decompressed(file) as stream:
        lines = (line for line in _bounded_lines(stream, file) if line and line.strip())
        return any(isinstance(parse(line), dict) for _, line in zip(range(2), lines, strict=False))


def _read_document(file: InputFile, required: list[str]) -> Iterator[Item]:
    """Yield the whole file as one record with the column `text`.

    Raises:
        DataError: The source reads other columns.
    """
    if required != ["text"]:
        raise DataError(f"{file}: is one document with the column text, expected {required}; read it in another source")
    with open_decompressed(file) as stream:
        data = strip_byte_order_mark(stream.read(MAX_RECORD_SIZE + 1), file)
    try:
        record = {"text": data.decode()} if len(data) <= MAX_RECORD_SIZE else UnreadableError("record too long")
    except UnicodeDecodeError:
        record = UnreadableError("bad UTF-8")
    yield str(file), record


# Format -> reader: takes a file and the required columns, yields (location, object).
READERS: dict[str, Callable[[InputFile, list[str]], Iterator[Item]]] = {
    ".arrow": read_arrow,
    ".csv": read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".md": _read_document,
    ".parquet": read_parquet,
    ".tsv": read_tsv,
    ".txt": _read_document,
}
