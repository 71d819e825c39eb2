"""Raw records, written by fetch and read by base and tokenize: parquet parts per source, records numbered in order.

raw/manifest.json                   written last; `sources` has each source's kind, identity and counts
raw/<source>/part-00000.parquet     conversations: index int64, system string, turns list<string>, form string
                                    documents: index int64, text string
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NotRequired, Self

from typing_extensions import TypedDict  # pydantic checks typing's own only from Python 3.12 on

from ropeway.config.faults import check_json
from ropeway.models.conversation import Conversation
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import NAME, load_manifest

RecordKind = Literal["conversation", "document"]
Record = Conversation | str

REMEDY = "Run `dvc repro fetch`"
PART_CHARACTERS = 1 << 28  # about 256 MB of text per part, so 100 GB of text are a few hundred files
_ROW_GROUP_CHARACTERS = (
    1 << 20
)  # about 1 MB of text; a reader holds one row group in memory, and it is the smallest job


class RawSource(TypedDict):
    """A source's entry in raw/manifest.json, as later stages read it."""

    kind: RecordKind
    read: int
    kept: int
    refused: dict[str, int]  # reason -> records
    files: NotRequired[dict[str, int]]  # name -> records read from it, including refused ones
    ignored_keys: NotRequired[dict[str, int]]  # key -> kept records in which it had a value
    forgotten: NotRequired[dict[str, int]]  # digest in `forget` -> records with it, which are in no file
    skipped_members: NotRequired[dict[str, int]]  # reason -> members of archives that are not read


class RawManifest(TypedDict):
    """raw/manifest.json."""

    sources: dict[str, RawSource]
    files: dict[str, Any]


def load_raw_manifest(folder: Path, *, verify: bool = True) -> RawManifest:
    """Return the manifest of a raw folder; `verify` hashes its files.

    Raises:
        DataError: The folder is incomplete, a file has changed, or the manifest lacks a key.
    """
    manifest = load_manifest(folder, remedy=REMEDY, verify=verify)
    return check_json(manifest, RawManifest, where=folder / NAME, remedy=REMEDY)


def check_sources(folder: Path, manifest: RawManifest, names: Iterable[str]) -> None:
    """Raise DataError unless the manifest of a raw folder has these sources."""
    if missing := [name for name in names if name not in manifest["sources"]]:
        raise DataError(f"{folder / NAME}: no source {', '.join(missing)}. {REMEDY}")


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One row group of one part.

    Attributes:
        part: Name of the parquet file.
        number: Index of the row group in the file.
        records: Number of records.
        text_bytes: Uncompressed size.
    """

    part: str
    number: int
    records: int
    text_bytes: int


class RawWriter:
    """Writes one source's records as parquet; equal records give equal bytes."""

    def __init__(self, folder: Path, kind: RecordKind) -> None:
        """Create the folder; `kind` determines the columns."""
        import pyarrow as pa

        columns = [("index", pa.int64())]
        columns += (
            [("text", pa.string())]
            if kind == "document"
            else [("system", pa.string()), ("turns", pa.list_(pa.string())), ("form", pa.string())]
        )
        self._schema = pa.schema(columns)
        self._folder = folder
        self._rows: list[dict[str, Any]] = []
        self._buffered_characters = self._part_characters = 0
        self._part: Any = None
        self._stack = ExitStack()
        self.records = 0
        self.parts: dict[str, int] = {}
        folder.mkdir(parents=True)

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Write buffered records and close; an empty source is one empty part."""
        if exception[0] is None:
            self._flush()
        self._stack.close()

    def add(self, record: Record) -> None:
        """Append one record."""
        row: dict[str, Any] = {"index": self.records}
        if isinstance(record, Conversation):
            row |= {"system": record.system, "turns": list(record.turns), "form": record.form}
        else:
            row |= {"text": record}
        self._rows.append(row)
        self.records += 1
        self._buffered_characters += sum(map(len, iterate_texts(record)))
        if self._buffered_characters >= _ROW_GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        if self._part is None or self._part_characters >= PART_CHARACTERS:
            self._stack.close()
            name = f"part-{len(self.parts):05d}.parquet"
            self.parts[name] = self._part_characters = 0
            # Texts rarely repeat, and without a dictionary the metadata states the text's size for each row group.
            path = self._folder / name
            self._part = parquet.ParquetWriter(path, self._schema, compression="zstd", use_dictionary=False)
            self._stack.callback(self._part.close)
        if self._rows:
            self._part.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self.parts[max(self.parts)] += len(self._rows)
        self._part_characters += self._buffered_characters
        self._rows, self._buffered_characters = [], 0


def list_groups(folder: Path) -> list[RowGroup]:
    """Return one source's row groups in order; reads only the files' metadata."""
    from pyarrow import parquet

    groups = []
    for path in sorted(folder.glob("part-*.parquet")):
        metadata = parquet.read_metadata(path)
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            groups.append(RowGroup(path.name, number, group.num_rows, group.total_byte_size))
    return groups


def iterate_groups(folder: Path, groups: Iterable[RowGroup]) -> Iterator[Record]:
    """Yield the records of these row groups in order, with one row group in memory."""
    from pyarrow import parquet

    for part, members in groupby(groups, key=lambda group: group.part):
        with parquet.ParquetFile(folder / part) as file:
            for group in members:
                yield from _records(file.read_row_group(group.number))


def iterate_records(folder: Path) -> Iterator[Record]:
    """Yield one source's records in order, with one row group in memory."""
    return iterate_groups(folder, list_groups(folder))


def _records(table: Any) -> Iterator[Record]:  # noqa: ANN401 - pyarrow has no types
    """Yield the records of a pyarrow table, by column: converting rows to dictionaries is much slower."""
    if "text" in table.column_names:
        yield from table.column("text").to_pylist()
    else:
        columns = (table.column(name).to_pylist() for name in ("turns", "system", "form"))
        for turns, system, form in zip(*columns, strict=True):
            yield Conversation(tuple(turns), system, form)


def iterate_texts(record: Record) -> Iterable[str]:
    """Return a record's texts: the document, or a conversation's system message, turns and what else it states."""
    if not isinstance(record, Conversation):
        return (record,)
    return (record.system, *record.turns, *record.further_texts())
