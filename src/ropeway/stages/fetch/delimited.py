"""Read records from csv and tsv files: a mapping of the header's names to strings, quoted as in RFC 4180.

A row that does not fit is counted, and reading continues at the next line. A quote that is not closed is an error of
the file, because the end of its row cannot be determined.
"""

import csv
from collections import Counter
from collections.abc import Iterator
from typing import IO

from ropeway.runtime.errors import DataError
from ropeway.stages.fetch.decompress import InputFile, open_decompressed, strip_byte_order_mark
from ropeway.stages.fetch.values import ESCAPED, MAX_RECORD_SIZE, UnreadableError

_SEPARATORS = {",": "','", "\t": "tabs", ";": "';'", "|": "'|'"}


def read_csv(file: InputFile, required: list[str]) -> Iterator[tuple[str, object]]:
    """Yield (location, record) for each row of a comma-separated file."""
    return _read_delimited(file, required, ",")


def read_tsv(file: InputFile, required: list[str]) -> Iterator[tuple[str, object]]:
    """Yield (location, record) for each row of a tab-separated file."""
    return _read_delimited(file, required, "\t")


def _read_delimited(file: InputFile, required: list[str], delimiter: str) -> Iterator[tuple[str, object]]:
    """Yield (location, record); a row that does not fit is yielded as an `UnreadableError`.

    Raises:
        DataError: There is no header with the required columns, it has a name twice, or a quote is not closed.
    """
    csv.field_size_limit(MAX_RECORD_SIZE)  # of the process; its default of 128 KiB is shorter than many documents
    with open_decompressed(file) as stream:
        lines = _Lines(stream, file)
        rows = _iterate_rows(lines, file, delimiter)
        where, header = next(rows, (str(file), []))
        if isinstance(header, UnreadableError):
            raise DataError(f"{where}: {header}, expected a header row with column names; correct the file")
        _check_header(file, header, required, delimiter)
        for where, fields in rows:
            yield where, _make_record(header, fields)


def _iterate_rows(
    lines: "_Lines", file: InputFile, delimiter: str
) -> Iterator[tuple[str, list[str] | UnreadableError]]:
    """Yield (location of the first line, fields) of each row that is not blank."""
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        where, lines.row_characters = f"{file}:{rows.line_num + 1}", 0
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.ended or lines.row_characters > MAX_RECORD_SIZE:
                raise DataError(
                    f"{where}: a quote that begins in this row is not closed within {lines.row_characters:,} "
                    f"characters ({error}); correct the file"
                ) from None
            yield where, UnreadableError("bad quoting")
            continue
        if any(not field.isascii() and ESCAPED.search(field) for field in fields):
            yield where, UnreadableError("bad UTF-8")
        elif fields:
            yield where, fields


def _check_header(file: InputFile, header: list[str], required: list[str], delimiter: str) -> None:
    if repeated := sorted(name for name, count in Counter(header).items() if count > 1):
        raise DataError(f"{file}: the header has {repeated} more than once; give each column a name of its own")
    if missing := sorted(set(required) - set(header)):
        other = next((sign for sign in _SEPARATORS if sign != delimiter and sign in "".join(header)), None)
        hint = f" Columns seem to be separated by {_SEPARATORS[other]}." if other and len(header) == 1 else ""
        raise DataError(
            f"{file}: no column {missing}; the first row, which must be a header, has {header[:20]}.{hint} Correct "
            f"`columns`, or write a header and separate columns by {_SEPARATORS[delimiter]}"
        )


def _make_record(header: list[str], fields: list[str] | UnreadableError) -> object:
    if isinstance(fields, UnreadableError):
        return fields
    if len(fields) != len(header):
        return UnreadableError("too few fields" if len(fields) < len(header) else "too many fields")
    return dict(zip(header, fields, strict=True))


class _Lines:
    """The lines of a file with their ends; a byte that is not UTF-8 becomes a lone surrogate.

    Attributes:
        row_characters: Characters of the current row; the reader of rows sets it to 0.
        ended: Whether a line was requested after the last one.
    """

    def __init__(self, stream: IO[bytes], file: InputFile) -> None:
        self._stream, self._file, self._is_first = stream, file, True
        self.row_characters, self.ended = 0, False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_RECORD_SIZE)
        if not line:
            self.ended = True
            raise StopIteration
        if len(line) == MAX_RECORD_SIZE and not line.endswith(b"\n"):
            raise DataError(f"{self._file}: a line has more than {MAX_RECORD_SIZE:,} bytes; correct the file")
        if self._is_first:
            line, self._is_first = strip_byte_order_mark(line, self._file), False
        text = line.decode("utf-8", "surrogateescape")
        self.row_characters += len(text)
        return text
