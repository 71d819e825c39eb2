"""Read records from parquet and arrow files, a few rows at a time."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from ropeway.runtime.errors import DataError
from ropeway.stages.fetch.decompress import Allowance, InputFile, open_decompressed
from ropeway.stages.fetch.values import MAX_RECORD_SIZE, UnreadableError

_BATCH_ROWS = 32  # also how often a value that a dictionary repeats is in memory
_BATCH_BYTES = 32 << 20  # as Python's objects
_ROW_BYTES = 4 * MAX_RECORD_SIZE  # as Python's objects, which take more than text in a file
_BUFFER_BYTES = 1 << 20
# Source: the Arrow columnar format, "IPC streaming format" and "IPC file format". Before version 0.15, a message began
# with its length, and a stream ended with a length of 0.
_FILE_MAGIC = b"ARROW1"
_CONTINUATION = b"\xff\xff\xff\xff"
_LENGTH_0 = b"\x00\x00\x00\x00"


def read_parquet(file: InputFile, required: list[str]) -> Iterator[tuple[str, object]]:
    """Yield (location, record) for each row of a parquet file.

    Raises:
        DataError: A required column is missing.
    """
    from pyarrow import parquet

    from ropeway.stages.fetch.row_sizes import OBJECT_BYTES

    # With a buffer, the pages of a row group are read one by one. Without it, a row group of 200 MB is held in memory
    # (measured: 207 MB resident instead of 115, pyarrow 26), and pre_buffer would hold it twice.
    with (
        open_decompressed(file) as handle,
        parquet.ParquetFile(handle, pre_buffer=False, buffer_size=_BUFFER_BYTES) as opened,
    ):
        _check_columns(file, opened.schema_arrow.names, required)
        # Read all columns: an unused one with values refuses the record.
        groups = (opened.metadata.row_group(group) for group in range(opened.metadata.num_row_groups))
        widths = (group.total_byte_size // max(group.num_rows, 1) for group in groups)
        batches = opened.iter_batches(batch_size=_choose_batch_rows(widths))
        allowance = file.find_allowance()
        allowance.spend(opened.metadata.num_rows * OBJECT_BYTES)  # before they are counted one by one
        yield from _locate(file, (row for batch in batches for row in _iterate_rows(batch, allowance)))


def read_arrow(file: InputFile, required: list[str]) -> Iterator[tuple[str, object]]:
    """Yield (location, record) for each row of an arrow file in the streaming or the file format, memory-mapped.

    Raises:
        DataError: A required column is missing, or the file is truncated.
    """
    import pyarrow as pa

    if not isinstance(file.source, Path):  # members of archives are copied to a file first
        raise TypeError(f"{file}: expected a path")
    with open_decompressed(file) as handle:
        head = handle.read(len(_FILE_MAGIC))
    with pa.memory_map(str(file.source)) as mapped:
        if head == _FILE_MAGIC:
            opened = pa.ipc.open_file(mapped)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        else:
            _check_stream_end(file, head, file.source)
            batches = opened = pa.ipc.open_stream(mapped)
        _check_columns(file, opened.schema.names, required)
        allowance = file.find_allowance()
        yield from _locate(file, (row for batch in batches for row in _iterate_mapped_rows(batch, allowance)))


def _check_stream_end(file: InputFile, head: bytes, path: Path) -> None:
    """Raise DataError if a stream lacks its end marker; pyarrow takes one cut between two batches for whole."""
    end = _CONTINUATION + _LENGTH_0 if head.startswith(_CONTINUATION) else _LENGTH_0
    with path.open("rb") as handle:
        handle.seek(max(path.stat().st_size - len(end), 0))
        if handle.read() != end:
            raise DataError(f"{file}: no arrow data, or truncated: the end marker of an arrow stream is missing")


def _iterate_mapped_rows(batch: Any, allowance: Allowance) -> Iterator[object]:  # noqa: ANN401 - pyarrow has no types
    """Yield the rows of a memory-mapped batch, checked first: pyarrow follows damaged offsets out of it and crashes.

    Raises:
        ArrowInvalid: A row has anything but a text that is not UTF-8.
    """
    from pyarrow import ArrowInvalid

    from ropeway.stages.fetch.row_sizes import OBJECT_BYTES

    allowance.spend(batch.num_rows * OBJECT_BYTES)  # before they are counted one by one: nulls take no bytes
    try:
        batch.validate(full=True)
        step = _BATCH_ROWS
    except ArrowInvalid:
        step = 1
    for begin in range(0, batch.num_rows, step):
        part = batch.slice(begin, step)
        try:
            part.validate(full=step == 1)
        except ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise
            yield UnreadableError("bad UTF-8")
        else:
            yield from _iterate_rows(part, allowance)


def _check_columns(file: InputFile, found: list[str], required: list[str]) -> None:
    if missing := sorted(set(required) - set(found)):
        raise DataError(f"{file}: no column {missing}; found {found}; correct `columns`")
    if repeated := sorted(name for name, count in Counter(found).items() if count > 1):
        raise DataError(f"{file}: has the columns {repeated} more than once; give each column a name of its own")


def _choose_batch_rows(widths: Iterable[int]) -> int:
    """Return how many rows to read at a time: fewer if rows are wide, such as text with images."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max([1, *widths])))


class _Batch(Protocol):
    """The methods used of pyarrow's RecordBatch, which has no type hints."""

    num_rows: int

    def to_pylist(self) -> list[object]: ...

    def slice(self, offset: int, length: int) -> "_Batch": ...


def _locate(file: InputFile, rows: Iterable[object]) -> Iterator[tuple[str, object]]:
    return ((f"{file}: row {number}", row) for number, row in enumerate(rows, start=1))


def _iterate_rows(batch: _Batch, allowance: Allowance) -> Iterator[object]:
    """Yield the rows of a batch as Python objects, as many at a time as fit in `_BATCH_BYTES`.

    Raises:
        DataError: The file expands to more than its allowance.
    """
    from ropeway.stages.fetch.row_sizes import measure_rows  # numpy, which asking for an identity does without

    sizes = measure_rows(batch)
    allowance.spend(int(sizes.sum()))
    begin = 0
    while begin < batch.num_rows:
        fitting = int(sizes[begin:].cumsum().searchsorted(_BATCH_BYTES, side="right"))
        count = max(1, fitting)
        if count == 1 and sizes[begin] > _ROW_BYTES:
            yield UnreadableError("record too long")
        else:
            yield from _to_objects(batch.slice(begin, count))
        begin += count


def _to_objects(batch: _Batch) -> Iterator[object]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # pyarrow does not validate UTF-8 on reading; find the row
        for at in range(batch.num_rows):
            try:
                yield batch.slice(at, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield UnreadableError("bad UTF-8")
