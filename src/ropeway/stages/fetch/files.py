"""Objects out of json, jsonl and parquet files, also compressed, a little at a time."""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from ropeway.runtime.errors import ConfigError, DataError
from ropeway.stages.fetch.decompress import COMPRESSED, open_plain, without_mark
from ropeway.stages.fetch.values import LONGEST, UnreadableError, iterate_values, unique_keys

_PACKED = "unpack it and name the files in it"
# What to do about a name that tells another format: renaming the file would not change what is in it.
_ADVICE = {
    ".csv": "convert it, for example with pyarrow.csv.read_csv and pyarrow.parquet.write_table",
    ".tsv": "convert it, for example with pyarrow.csv.read_csv (delimiter: tab) and pyarrow.parquet.write_table",
    ".txt": 'write its texts into a .jsonl, one {"text": "…"} a line, with rows: text and columns: {text: text}',
    ".md": 'write its text into a .jsonl, one {"text": "…"} a line, with rows: text and columns: {text: text}',
    ".arrow": "write it as parquet, for example with datasets' Dataset.load_from_disk(FOLDER).to_parquet(FILE)",
    ".feather": "write it as parquet, for example with pyarrow.feather.read_table and pyarrow.parquet.write_table",
    ".xlsx": "export its table as .jsonl or .parquet",
    ".ndjson": "give it a name in .jsonl",
    ".zip": _PACKED,
    ".tar": _PACKED,
    ".tgz": _PACKED,
    ".7z": _PACKED,
    ".bz2": "unpack it, or pack it as .gz or .zst",
    ".xz": "unpack it, or pack it as .gz or .zst",
}
Item = tuple[str, object]  # where an object stands, and the object
_ROWS_A_BATCH = 256
_BATCH_BYTES = 32 << 20  # before compression
_BUFFER_BYTES = 1 << 20


def check_format(name: str) -> str:
    """Return the format that a file's name tells: a key of `READERS`.

    Raises:
        ConfigError: It tells none.
    """
    suffixes = [part for part in PurePosixPath(name).suffixes if part not in COMPRESSED]
    if not suffixes or suffixes[-1] not in READERS or name.endswith(tuple(f".parquet{part}" for part in COMPRESSED)):
        raise ConfigError(
            f"{name}: expected a name in .json or .jsonl (also .gz, .zst behind it) or .parquet; {_advise(suffixes)}"
        )
    return suffixes[-1]


def _advise(suffixes: list[str]) -> str:
    if suffixes[-1:] == [".parquet"]:
        return "parquet is compressed inside: unpack the file"
    known = [_ADVICE[part.lower()] for part in reversed(suffixes) if part.lower() in _ADVICE]
    if known:
        return known[0]
    if suffixes and suffixes[-1].lower() in READERS:
        return "write the ending in small letters"
    return "if it holds one of these, name it so; if not, convert it, or leave it out of `paths` or `files`"


def iterate_objects(path: Path, required: list[str]) -> Iterator[Item]:
    """Yield (where, object) of a file; in place of an object that cannot be read, an `UnreadableError`.

    Raises:
        ConfigError: The file's name ends in none of the known formats, or this user may not read it.
        DataError: The file is cut, corrupt, unreadable, empty, or parquet without the required columns.
    """
    from pyarrow import ArrowException

    form = check_format(path.name)
    count = 0
    try:
        for item in READERS[form](path, required):
            count += 1
            yield item
    except (OSError, EOFError, zlib.error, ArrowException) as error:
        raise DataError(
            f"{path}: cannot be read to its end after {count:,} records ({error}); fetch it again"
        ) from error
    if not count:
        raise DataError(f"{path}: no record in it; fetch it again or take it out of `paths`")


def parse(line: bytes) -> object:
    """Return the value of one line of JSON, or an `UnreadableError` that says why not."""
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError:
        return UnreadableError("bad UTF-8")
    except UnreadableError as error:
        return error
    except (ValueError, RecursionError):
        return UnreadableError("bad JSON")


def _lines(path: Path, _required: list[str]) -> Iterator[Item]:
    with open_plain(path) as file:
        for number, line in enumerate(_bounded_lines(file, path), start=1):
            if line is None:
                yield f"{path}:{number}", UnreadableError("record too long")
            elif line.strip():
                yield f"{path}:{number}", parse(line)


def _bounded_lines(file: IO[bytes], path: Path) -> Iterator[bytes | None]:
    """Yield lines; None for one that is longer than `LONGEST` bytes, which is never held."""
    first = True
    while line := file.readline(LONGEST):
        if len(line) == LONGEST and line[-1:] != b"\n":
            while (more := file.readline(LONGEST)) and more[-1:] != b"\n":
                pass
            yield None
        else:
            yield without_mark(line, path) if first else line
        first = False


def _json(path: Path, _required: list[str]) -> Iterator[Item]:
    """Return the records of a list, of lines, or of objects that are printed over several lines."""
    with open_plain(path) as file:
        head = without_mark(file.read(1 << 16), path).lstrip()
    if head[:1] == b"[":
        return iterate_values(path, in_list=True)
    return _lines(path, _required) if _looks_like_lines(path) else iterate_values(path, in_list=False)


def _looks_like_lines(path: Path) -> bool:
    """Return whether one of the first two lines is an object by itself: the first may be a broken one."""
    with open_plain(path) as file:
        lines = (line for line in _bounded_lines(file, path) if line and line.strip())
        return any(isinstance(parse(line), dict) for _, line in zip(range(2), lines, strict=False))


def _parquet(path: Path, required: list[str]) -> Iterator[Item]:
    from pyarrow import parquet

    # Read through a buffer the pages of a row group come one by one; else a group of 200 MB is held (measured: 207 MB
    # resident against 115, pyarrow 26), and pre_buffer would hold it again.
    with (
        open_plain(path) as handle,
        parquet.ParquetFile(handle, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file,
    ):
        found = file.schema_arrow.names
        if missing := sorted(set(required) - set(found)):
            raise DataError(f"{path}: no column {missing}; found {found}; correct `columns`")
        number = 0
        # All columns: others than those that are read may carry something.
        groups = (file.metadata.row_group(group) for group in range(file.metadata.num_row_groups))
        widths = (group.total_byte_size // max(group.num_rows, 1) for group in groups)
        for batch in file.iter_batches(batch_size=_rows_a_batch(widths)):
            for row in _rows(batch):
                number += 1
                yield f"{path}: row {number}", row


def _rows_a_batch(widths: Iterable[int]) -> int:
    """Return how many rows to hold at a time, so that wide ones (images beside the text) take no more than others."""
    return max(1, min(_ROWS_A_BATCH, _BATCH_BYTES // max([1, *widths])))


class _Batch(Protocol):
    """What is used of pyarrow's RecordBatch, which has no types."""

    num_rows: int

    def to_pylist(self) -> list[object]: ...

    def slice(self, offset: int, length: int) -> "_Batch": ...


def _rows(batch: _Batch) -> Iterator[object]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # parquet promises UTF-8 and checks nothing; find the row
        for at in range(batch.num_rows):
            try:
                yield batch.slice(at, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield UnreadableError("bad UTF-8")


# Ending of a file's name -> its reader: yields (where, object) of a path; the columns that every record has help it.
READERS: dict[str, Callable[[Path, list[str]], Iterator[Item]]] = {
    ".json": _json,
    ".jsonl": _lines,
    ".parquet": _parquet,
}
