"""A few records of each source, as the real files have them; generated ones where the files are not on this machine."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from ropeway.config.sections import FilesSource, HuggingfaceSource, PythonDocsSource, RowsSource, Source
from ropeway.rehearse.shrink import SourceSample
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.terminal import format_count
from ropeway.stages.fetch.archives import Archive, SkippedMember, iterate_members
from ropeway.stages.fetch.decompress import InputFile
from ropeway.stages.fetch.files import iterate_objects
from ropeway.stages.fetch.formats import check_document, find_format, is_archive
from ropeway.stages.fetch.local import find_files, find_members
from ropeway.stages.fetch.patterns import match_names
from ropeway.stages.fetch.python_docs import iterate_docstrings, iterate_topics
from ropeway.stages.fetch.records import (
    ROW_KINDS,
    check_columns,
    check_ignored,
    find_unused,
    required_columns,
    to_record,
)
from ropeway.stages.fetch.saved_folders import is_metadata
from ropeway.stages.fetch.values import UnreadableError
from ropeway.storage import hub

FOLDER = "rehearsed-samples"  # no name that a profile's own files have
_FILES = 4  # of a source that are read
_LOOKED_AT = 8  # records that are looked at for each one that is taken
_TEXT_CHARACTERS = 8_000  # of a document; longer ones are cut
_GENERATED_TURN = 300  # characters of an answer
Values = list[object]


def sample_source(
    name: str, source: Source, root: Path, folder: Path, *, count: int, may_generate: bool
) -> SourceSample:
    """Write `count` records of a source below `folder`/rehearsed-samples and return what they are.

    Args:
        name: Name of the source.
        source: Its section of params.yaml.
        root: The real workspace.
        folder: The rehearsal's workspace.
        count: Records.
        may_generate: Whether local files that are missing are replaced, because the real run is on another machine.

    Raises:
        ConfigError: Local files are missing, or not of a supported format.
        DataError: A file is damaged or lacks a required column.
    """
    if isinstance(source, PythonDocsSource):
        return _sample_docs(name, source, folder, count)
    check_columns(source.rows, source.columns)
    files, members = _find(source, root, may_generate=may_generate)
    if not files:
        return _generate(name, source, folder, count)
    looked = list(islice(_iterate_values(files, members, source, folder), _LOOKED_AT * count))
    taken = _shortest(looked, count)
    cut = source.rows == "text" and sum(_cut(value, source) for value in taken) > 0
    path = _write(folder, name, taken)
    shown = ", ".join(list(files)[:2]) + (f" and {len(files) - 2} more files" if len(files) > 2 else "")  # noqa: PLR2004
    origin = f"{len(taken):,} of the first {format_count(len(looked), 'record')} of {shown}"
    origin += f", texts cut to {_TEXT_CHARACTERS:,} characters" if cut else ""
    return _sample(name, source, path, taken, origin, is_generated=False)


def _find(
    source: FilesSource | HuggingfaceSource, root: Path, *, may_generate: bool
) -> tuple[dict[str, Path], Mapping[str, list[str] | None]]:
    """Return the first files of a source that are on this machine, and which members of archives to read."""
    if isinstance(source, FilesSource):
        patterns = [path for path in source.paths if "://" not in path]
        try:
            found, members = find_files(patterns, root, source.splits), find_members(patterns, root)
        except ConfigError:
            if not may_generate:
                raise
            return {}, {}
    else:
        snapshot = hub.find_cached(source.repo, source.revision, kind="dataset")
        if snapshot is None:
            return {}, {}
        there = [path.relative_to(snapshot).as_posix() for path in sorted(snapshot.rglob("*")) if path.is_file()]
        matched = match_names(source.files, there)
        found, members = {one: snapshot / one for pattern in source.files for one in matched[pattern]}, {}
    data = {name: path for name, path in found.items() if not is_metadata(path)}
    for name in data:
        check_document(name, source.rows)
    return dict(list(data.items())[:_FILES]), members


def _iterate_values(
    files: Mapping[str, Path], members: Mapping[str, list[str] | None], source: RowsSource, folder: Path
) -> Iterator[object]:
    """Yield the objects of files, one of each file in turn, so that every file is opened."""
    required = required_columns(source.rows, source.columns)
    documents = ROW_KINDS[source.rows].record_kind == "document"

    def read(name: str, path: Path) -> Iterator[object]:
        if not is_archive(path.name):
            yield from (value for _, value in iterate_objects(InputFile.of(path), required))
            return
        archive = Archive(name, path, members.get(name), list(source.splits), documents, folder / ".work" / "fetch")
        for found in iterate_members(archive):
            if not isinstance(found, SkippedMember):
                yield from (value for _, value in iterate_objects(found[1], required))

    streams = [read(name, path) for name, path in files.items()]
    while streams:
        for stream in list(streams):
            for value in islice(stream, 1):
                yield value
                break
            else:
                streams.remove(stream)


def _shortest(values: Sequence[object], count: int) -> Values:
    """Return the `count` shortest values in their order, and the longest instead of the last of them."""
    order = sorted(range(len(values)), key=lambda at: _count_characters(values[at]))
    chosen = order[:count] if len(order) <= count else [*order[: count - 1], order[-1]]
    return [values[at] for at in sorted(chosen)]


def _cut(value: object, source: RowsSource) -> bool:
    """Cut the text of a document in place; return whether it was longer."""
    (column,) = required_columns(source.rows, source.columns)
    text = value.get(column) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(text, str) or len(text) <= _TEXT_CHARACTERS:
        return False
    value[column] = text[:_TEXT_CHARACTERS]
    return True


def _write(folder: Path, name: str, values: Values) -> str:
    """Write objects as JSON lines, or as parquet if JSON has no form for a value; an unreadable one is a bad line."""
    path = folder / FOLDER / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lines = ["{" if isinstance(one, UnreadableError) else json.dumps(one, ensure_ascii=False) for one in values]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except (TypeError, UnicodeEncodeError):
        path.unlink(missing_ok=True)
        path = path.with_suffix(".parquet")
        readable = [one for one in values if isinstance(one, dict)]
        parquet.write_table(pa.Table.from_pylist(readable), path)
    return path.relative_to(folder).as_posix()


def _sample(
    name: str, source: RowsSource, path: str, values: Values, origin: str, *, is_generated: bool
) -> SourceSample:
    refused = Counter[str]()
    for value in values:
        try:
            if isinstance(value, UnreadableError):
                raise value
            to_record(value, source.rows, source.columns, source.ignored_keys)
            check_ignored(find_unused(value, source.rows, source.columns, source.ignored_keys), source.ignored_keys)
        except UnreadableError as error:
            refused[str(error)] += 1
    block = {
        "kind": "files",
        "paths": [path],
        **source.model_dump(include={"rows", "columns", "ignored_keys"}),
        "expected_rows": None,
    }
    return SourceSample(name, block, tuple(map(_count_characters, values)), origin, is_generated, dict(refused))


def _count_characters(value: object) -> int:
    """Return the characters of all texts in an object."""
    if isinstance(value, Mapping):
        return sum(map(_count_characters, value.values()))
    if isinstance(value, list):
        return sum(map(_count_characters, value))
    return len(value) if isinstance(value, str) else 0


def _sample_docs(name: str, source: PythonDocsSource, folder: Path, count: int) -> SourceSample:
    values: Values
    if source.part == "topics":
        stated = FilesSource(kind="files", paths=[], rows="text", columns={}, expected_rows=None)
        values = [{"text": text[:_TEXT_CHARACTERS]} for text in islice(iterate_topics(), count)]
    else:
        stated = FilesSource(kind="files", paths=[], rows="messages", columns={}, expected_rows=None)
        values = [{"messages": one.to_messages()} for one in islice(iterate_docstrings(), count)]
    origin = f"its first {format_count(len(values), 'record')}"
    return _sample(name, stated, _write(folder, name, values), values, origin, is_generated=False)


def _generate(name: str, source: FilesSource | HuggingfaceSource, folder: Path, count: int) -> SourceSample:
    """Write records of Python's documentation in the source's own layout, columns and file format."""
    patterns = source.paths if isinstance(source, FilesSource) else source.files
    form = next((found for pattern in patterns if (found := find_format(pattern))), ".jsonl")
    values = list(islice(_generate_values(source), count))
    path = folder / FOLDER / f"{name}{form if form in _WRITERS else '.jsonl'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    _WRITERS.get(form, _write_lines)(path, values)
    origin = f"sample generated, not your data: {format_count(len(values), 'record')} as {path.suffix}"
    return _sample(name, source, path.relative_to(folder).as_posix(), list(values), origin, is_generated=True)


def _generate_values(source: RowsSource) -> Iterator[dict[str, Any]]:
    columns, kind = source.columns, ROW_KINDS[source.rows]

    def column(field: str) -> str:
        return columns.get(field, field)

    texts = (text.strip() for text in iterate_topics() if len(text) > 2 * _GENERATED_TURN)
    for number, text in enumerate(texts):
        question, answer = text[:80], text[80 : 80 + _GENERATED_TURN]
        if source.rows == "text":
            yield {column("text"): text[: 4 * _GENERATED_TURN]}
            continue
        value: dict[str, Any]
        if source.rows == "orca_chat":
            value = {column("conversation"): [{column("input"): question, column("output"): answer}]}
        elif source.rows == "alpaca":
            value = {column("instruction"): question, column("output"): answer}
        elif source.rows == "prompt_completion":
            value = {column("prompt"): question, column("completion"): answer}
        else:
            role, content = (column(one) for one in kind.turn_fields)
            names = ("human", "gpt") if source.rows == "sharegpt" else ("user", "assistant")
            turns = [{role: who, content: said} for who, said in zip(names, (question, answer), strict=True)]
            value = {column(kind.required[0]): turns}
        if "system" in columns and number % 2:
            value[columns["system"]] = "You are a helpful assistant."
        yield value


def _write_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in values), encoding="utf-8")


def _write_list(path: Path, values: Iterable[dict[str, Any]]) -> None:
    path.write_text(json.dumps(list(values), ensure_ascii=False), encoding="utf-8")


def _write_parquet(path: Path, values: Iterable[dict[str, Any]]) -> None:
    parquet.write_table(pa.Table.from_pylist(list(values)), path)


def _write_csv(path: Path, values: Iterable[dict[str, Any]]) -> None:
    rows = list(values)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


_WRITERS = {".json": _write_list, ".jsonl": _write_lines, ".parquet": _write_parquet, ".csv": _write_csv}
