"""Read objects from json, jsonl and parquet files, compressed or not, in bounded memory."""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from ropeway.runtime.errors import ConfigError, DataError
from ropeway.stages.fetch.decompress import COMPRESSED, open_decompressed, strip_byte_order_mark
from ropeway.stages.fetch.values import MAX_RECORD_SIZE, UnreadableError, iterate_values, unique_keys

_EXTRACT = "extract it and name the extracted files"
# Suffix of an unsupported format -> what to do. Renaming the file would not change its format.
_FIXES = {
    ".csv": "convert it, for example with pyarrow.csv.read_csv and pyarrow.parquet.write_table",
    ".tsv": "convert it, for example with pyarrow.csv.read_csv (delimiter: tab) and pyarrow.parquet.write_table",
    ".txt": 'write its texts to a .jsonl file, one {"text": "…"} per line, and set rows: text',
    ".md": 'write its text to a .jsonl file, one {"text": "…"} per line, and set rows: text',
    ".arrow": "write it as parquet, for example with datasets' Dataset.load_from_disk(FOLDER).to_parquet(FILE)",
    ".feather": "write it as parquet, for example with pyarrow.feather.read_table and pyarrow.parquet.write_table",
    ".xlsx": "export its table as .jsonl or .parquet",
    ".ndjson": "rename it to end in .jsonl",
    ".zip": _EXTRACT,
    ".tar": _EXTRACT,
    ".tgz": _EXTRACT,
    ".7z": _EXTRACT,
    ".bz2": "decompress it, or compress it as .gz or .zst",
    ".xz": "decompress it, or compress it as .gz or .zst",
}
Item = tuple[str, object]  # location of an object, and the object
_BATCH_ROWS = 256
_BATCH_BYTES = 32 << 20  # uncompressed
_BUFFER_BYTES = 1 << 20


def check_format(name: str) -> str:
    """Return the format of a file by its name: a key of `READERS`.

    Raises:
        ConfigError: The name has no suffix of a supported format.
    """
    suffixes = [part for part in PurePosixPath(name).suffixes if part not in COMPRESSED]
    if not suffixes or suffixes[-1] not in READERS or name.endswith(tuple(f".parquet{part}" for part in COMPRESSED)):
        raise ConfigError(
            f"{name}: expected a file name in .json or .jsonl (optionally .gz or .zst) or .parquet; "
            f"{_suggest_fix(suffixes)}"
        )
    return suffixes[-1]


def _suggest_fix(suffixes: list[str]) -> str:
    if suffixes[-1:] == [".parquet"]:
        return "parquet is compressed internally: decompress the file"
    known = [_FIXES[part.lower()] for part in reversed(suffixes) if part.lower() in _FIXES]
    if known:
        return known[0]
    if suffixes and suffixes[-1].lower() in READERS:
        return "rename the suffix to lower case"
    return "if it has one of these formats, rename it; if not, convert it or remove it from `paths` or `files`"


def iterate_objects(path: Path, required: list[str]) -> Iterator[Item]:
    """Yield (location, object) for each object of a file; an unreadable object is yielded as an `UnreadableError`.

    Raises:
        ConfigError: The file's name has no supported suffix, or this user has no permission to read it.
        DataError: The file is truncated, corrupt, empty, or parquet without the required columns.
    """
    from pyarrow import ArrowException

    form = check_format(path.name)
    count = 0
    try:
        for item in READERS[form](path, required):
            count += 1
            yield item
    except (OSError, EOFError, zlib.error, ArrowException) as error:
        raise DataError(f"{path}: reading failed after {count:,} records ({error}); fetch it again") from error
    if not count:
        raise DataError(f"{path}: contains 0 records; fetch it again or remove it from `paths`")


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


def _read_jsonl(path: Path, _required: list[str]) -> Iterator[Item]:
    with open_decompressed(path) as file:
        for number, line in enumerate(_bounded_lines(file, path), start=1):
            if line is None:
                yield f"{path}:{number}", UnreadableError("record too long")
            elif line.strip():
                yield f"{path}:{number}", parse(line)


def _bounded_lines(file: IO[bytes], path: Path) -> Iterator[bytes | None]:
    """Yield lines; None for a line longer than `MAX_RECORD_SIZE` bytes, which is never held in memory."""
    first = True
    while line := file.readline(MAX_RECORD_SIZE):
        if len(line) == MAX_RECORD_SIZE and line[-1:] != b"\n":
            while (more := file.readline(MAX_RECORD_SIZE)) and more[-1:] != b"\n":
                pass
            yield None
        else:
            yield strip_byte_order_mark(line, path) if first else line
        first = False


def _read_json(path: Path, _required: list[str]) -> Iterator[Item]:
    """Return the records of a JSON list, of JSON lines, or of objects that span several lines."""
    with open_decompressed(path) as file:
        head = strip_byte_order_mark(file.read(1 << 16), path).lstrip()
    if head[:1] == b"[":
        return iterate_values(path, in_list=True)
    return _read_jsonl(path, _required) if _looks_like_lines(path) else iterate_values(path, in_list=False)


def _looks_like_lines(path: Path) -> bool:
    """Return whether one of the first two lines is a complete object; the first line may be a broken record."""
    with open_decompressed(path) as file:
        lines = (line for line in _bounded_lines(file, path) if line and line.strip())
        return any(isinstance(parse(line), dict) for _, line in zip(range(2), lines, strict=False))


def _read_parquet(path: Path, required: list[str]) -> Iterator[Item]:
    from pyarrow import parquet

    # With a buffer, the pages of a row group are read one by one. Without it, a row group of 200 MB is held in memory
    # (measured: 207 MB resident instead of 115, pyarrow 26), and pre_buffer would hold it twice.
    with (
        open_decompressed(path) as handle,
        parquet.ParquetFile(handle, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file,
    ):
        found = file.schema_arrow.names
        if missing := sorted(set(required) - set(found)):
            raise DataError(f"{path}: no column {missing}; found {found}; correct `columns`")
        number = 0
        # Read all columns: an unused one with values refuses the record.
        groups = (file.metadata.row_group(group) for group in range(file.metadata.num_row_groups))
        widths = (group.total_byte_size // max(group.num_rows, 1) for group in groups)
        for batch in file.iter_batches(batch_size=_choose_batch_rows(widths)):
            for row in _iterate_rows(batch):
                number += 1
                yield f"{path}: row {number}", row


def _choose_batch_rows(widths: Iterable[int]) -> int:
    """Return how many rows to read at a time: fewer if rows are wide, such as text with images."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max([1, *widths])))


class _Batch(Protocol):
    """The methods used of pyarrow's RecordBatch, which has no type hints."""

    num_rows: int

    def to_pylist(self) -> list[object]: ...

    def slice(self, offset: int, length: int) -> "_Batch": ...


def _iterate_rows(batch: _Batch) -> Iterator[object]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # pyarrow does not validate UTF-8 on reading; find the row
        for at in range(batch.num_rows):
            try:
                yield batch.slice(at, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield UnreadableError("bad UTF-8")


# Suffix -> reader: takes a path and the required columns, yields (location, object).
READERS: dict[str, Callable[[Path, list[str]], Iterator[Item]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
