"""Find out what files hold: the layout of records, their columns, what would be refused or dropped. Reads a sample."""

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ropeway.config.sections import FilesSource
from ropeway.data.raw_records import Record, RecordKind
from ropeway.models.conversation import Conversation, Form
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch.decompress import InputFile
from ropeway.stages.fetch.files import iterate_objects
from ropeway.stages.fetch.formats import COMPRESSED, DOCUMENTS, find_format, is_archive
from ropeway.stages.fetch.local import find_files
from ropeway.stages.fetch.records import ROW_KINDS
from ropeway.stages.fetch.saved_folders import find_saved
from ropeway.stages.fetch.sources import RefusedRecord, SourceCounts, open_source, record_kind, source_identity

MOST_RECORDS = 2000  # of a source that are read
_LOOKED_AT = 20  # of which the fields are taken together
_LONGEST_NAME = 60  # characters of a source's name
_TRIED = 50  # records with which a layout is tried
_TEXT_NAMES = ("text", "content", "body", "document", "article", "story", "markdown")
_PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"),
    ("instruction", "response"), ("input", "output"), ("source", "target"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DataFindings:
    """What a path holds.

    Attributes:
        name: Name of the source.
        source: Its section of params.yaml.
        read: Records that were read: all, or the first `MOST_RECORDS`.
        is_complete: Whether these are all.
        refused: Reason -> records.
        ignored: Field that the layout does not read -> records in which it has a value.
        records: The records that are used.
        not_read: Suffix -> files of a folder that are of another kind than most.
    """

    name: str
    source: dict[str, object]
    kind: RecordKind
    read: int
    is_complete: bool
    refused: Mapping[str, int]
    ignored: Mapping[str, int]
    records: tuple[Record, ...]
    not_read: Mapping[str, int]

    @property
    def roles(self) -> dict[str, int]:
        """Role -> messages of the records."""
        chats = [one for one in self.records if isinstance(one, Conversation)]
        return dict(Counter(str(message["role"]) for chat in chats for message in chat.to_messages()))

    @property
    def has_tools(self) -> bool:
        """Whether a record offers or calls tools."""
        return any(form.get("tools") or self._has_field(form, "tool_calls") for form in self._forms)

    @property
    def has_reasoning(self) -> bool:
        """Whether an answer has reasoning of its own."""
        return any(self._has_field(form, "reasoning_content") for form in self._forms)

    @property
    def _forms(self) -> list[Form]:
        return [one.read_form() for one in self.records if isinstance(one, Conversation) and one.form]

    @staticmethod
    def _has_field(form: Form, name: str) -> bool:
        return any(name in fields for fields in form["fields"])


def examine_data(path: str, root: Path, taken: frozenset[str] = frozenset()) -> DataFindings:
    """Return what a file, folder, archive or pattern holds.

    Args:
        path: The path, relative to the working directory or absolute; or a pattern.
        root: The workspace; paths in it are written relative to it.
        taken: Names of sources that are in use.

    Raises:
        ConfigError: Nothing is there, or no known layout reads the records; the message names their fields.
    """
    patterns, not_read = _find_patterns(path, root)
    candidates = list(_iterate_candidates(patterns, root))
    tried = [(_read(source, root, _TRIED), source) for source in candidates]
    best, source = max(tried, key=lambda pair: pair[0].used, default=(_Sample(), None))
    if source is None or not best.records:
        raise _no_layout(path, _first_object(patterns, root), [dict(sample.refused) for sample, _ in tried])
    whole = _read(source, root, MOST_RECORDS, raises=True)
    stated = source.model_dump() | {"ignored_keys": sorted(whole.ignored)}
    names = ("kind", "paths", "rows", "columns", "expected_rows", *(["ignored_keys"] if whole.ignored else []))
    facts = {name: stated[name] for name in names}
    return DataFindings(
        name=_name(path, taken),
        source=facts,
        kind=record_kind(source),
        read=whole.read,
        is_complete=whole.read < MOST_RECORDS,
        refused=whole.refused,
        ignored=whole.ignored,
        records=tuple(whole.records),
        not_read=not_read,
    )


def _no_layout(path: str, fields: Mapping[str, object], refused: Sequence[Mapping[str, int]]) -> ConfigError:
    """Return the error of a file that no layout reads.

    Args:
        path: The file or folder.
        fields: Fields of its first records.
        refused: Reason -> records of each layout that was tried; those that look likely first.
    """
    likely = [reasons for reasons in refused[: len(refused) - len(ROW_KINDS)] if reasons]
    common = [reason for reason in refused[0] if all(reason in reasons for reasons in refused)] if refused else []
    reasons = "; ".join([*likely[0]] if likely else common) or "none has the fields that one needs"
    texts = [name for name, value in fields.items() if isinstance(value, str)]
    columns = dict(zip(("prompt", "completion"), texts, strict=False)) if len(texts) > 1 else {"text": "a field"}
    rows = "prompt_completion" if len(texts) > 1 else "text"
    shown = ", ".join(json.dumps(name, ensure_ascii=False) for name in fields) or "no fields"
    return ConfigError(
        f"--data {path}: no layout of records fits ({reasons}). The first records have the fields {shown}; known are "
        "messages or conversations, question or prompt with answer or completion, instruction with output, and text. "
        f"Rename the fields, or write the source yourself, e.g. with `rows: {rows}` and `columns: "
        f"{json.dumps(columns, ensure_ascii=False)}`: docs/sources.md"
    )


def _find_patterns(path: str, root: Path) -> tuple[list[str], dict[str, int]]:
    """Return the patterns for `paths`, and suffix -> files of a folder that they leave out.

    A folder with more documents than files of records stands for its documents, else for the records.
    """
    if "://" in path:
        raise ConfigError(
            f"--data {path}: addresses are not looked at; download a file of it, and write its source later"
        )
    place = Path(path).expanduser()
    place = place if place.is_absolute() else Path.cwd() / place
    if not place.exists() and not glob.glob(str(place), recursive=True):  # noqa: PTH207 - patterns of any kind
        raise ConfigError(f"--data {path}: no such file or folder, and no file matches it as a pattern")
    where = os.path.normpath(place)
    shown = os.path.relpath(where, root) if Path(where).is_relative_to(root) else where
    if place.exists():  # else it is a pattern
        shown = glob.escape(shown)  # brackets and stars in names are no pattern
    if not place.is_dir() or find_saved(place):
        return [shown], {}
    files = (one.relative_to(place) for one in place.rglob("*") if one.is_file() and not one.name.startswith("."))
    forms = Counter("".join(one.suffixes[-2:] if one.name.endswith(COMPRESSED) else one.suffixes[-1:]) for one in files)
    known = sorted((form for form in forms if find_format(f"x{form}")), key=lambda one: (-forms[one], one in DOCUMENTS))
    if not known:
        found = ", ".join(sorted(filter(None, forms))) or "no files"
        raise ConfigError(f"--data {path}: a folder without records or documents (found {found}); see docs/sources.md")
    documents = [form for form in known if form in DOCUMENTS]
    chosen = documents if known[0] in DOCUMENTS else [form for form in known if form not in DOCUMENTS]
    left = {form or "no suffix": count for form, count in forms.items() if form not in chosen}
    return [f"{shown}/**/*{form}" for form in chosen], left


def _name(path: str, taken: frozenset[str]) -> str:
    stem = Path(path.rstrip("/")).name.split(".")[0].split("*")[0]
    plain = "".join(character if character.isalnum() or character in "_-" else "_" for character in stem)[
        :_LONGEST_NAME
    ]
    plain = plain or "data"
    return next(name for name in (plain, *(f"{plain}_{at}" for at in range(2, 1000))) if name not in taken)


def _iterate_candidates(patterns: list[str], root: Path) -> Iterator[FilesSource]:
    """Yield the sources that may fit, what the first records look like first.

    Raises:
        ConfigError: They are preferences, of which one answer is not to be learned.
    """
    common = {"kind": "files", "paths": patterns, "expected_rows": None, "ignored_keys": ["*"]}
    if find_format(next(iter(find_files(patterns, root)))) in DOCUMENTS:
        yield FilesSource.model_validate({**common, "rows": "text", "columns": {}})
        return
    fields = _first_object(patterns, root)
    if {"chosen", "rejected"} <= set(fields):
        raise ConfigError(
            f"--data {', '.join(patterns)}: preferences (chosen, rejected) are not trained on; write the chosen "
            "answers to a file of their own"
        )
    for rows, columns in _guess(fields):
        yield FilesSource.model_validate({**common, "rows": rows, "columns": columns})
    for rows in ROW_KINDS:
        yield FilesSource.model_validate({**common, "rows": rows, "columns": {}})


def _first_object(patterns: list[str], root: Path) -> Mapping[str, object]:
    """Return the fields of the first objects of the first file, with their first values; empty for archives."""
    name, path = next(iter(find_files(patterns, root).items()))
    if is_archive(name) or find_format(name) in DOCUMENTS:
        return {}
    merged: dict[str, object] = {}
    for _, one in islice(iterate_objects(InputFile.of(path), []), _LOOKED_AT):
        merged |= {key: part for key, part in one.items() if merged.get(key) is None} if isinstance(one, dict) else {}
    return merged


def _guess(value: Mapping[str, object]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (layout, columns) that a record may have, by its fields.

    >>> list(_guess({"chat": [{"from": "human", "value": "Hi"}]}))
    [('sharegpt', {'conversations': 'chat'})]
    >>> list(_guess({"question": "1+1?", "answer": "2"}))
    [('prompt_completion', {'prompt': 'question', 'completion': 'answer'})]
    """
    for name, turns in value.items():
        fields = set(turns[0]) if isinstance(turns, list) and turns and isinstance(turns[0], dict) else set()
        for rows in ("messages", "sharegpt", "orca_chat"):
            (column,), wanted = ROW_KINDS[rows].required, ROW_KINDS[rows].turn_fields
            if fields >= set(wanted):
                yield rows, {} if name == column else {column: name}
    names = {name.lower(): name for name, text in value.items() if isinstance(text, str)}
    if {"instruction", "output"} <= set(names):
        yield "alpaca", {own: names[own] for own in ("instruction", "output", "input") if names.get(own, own) != own}
    for prompt, completion in _PAIRS:
        if {prompt, completion} <= set(names):
            mapped = {"prompt": names[prompt], "completion": names[completion]}
            yield "prompt_completion", {own: column for own, column in mapped.items() if own != column}
    texts = [names[name] for name in _TEXT_NAMES if name in names]
    if not texts and len(value) == len(names) == 1 and not set(next(iter(value))) & set(";\t"):
        texts = list(names.values())  # a table of one column
    for column in texts:
        yield "text", {} if column == "text" else {"text": column}


class _Sample:
    """Records of a source with what was counted."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.refused: Counter[str] = Counter()
        self.ignored: Mapping[str, int] = {}

    @property
    def read(self) -> int:
        return len(self.records) + self.refused.total()

    @property
    def used(self) -> tuple[int, int]:
        """The more records and the fewer dropped fields the better."""
        return len(self.records), -len(self.ignored)


def _read(source: FilesSource, root: Path, most: int, *, raises: bool = False) -> _Sample:
    """Return the first records; `raises`: a file that cannot be read is an error, else only no evidence."""
    sample, seen = _Sample(), SourceCounts()
    try:
        found = open_source(source, Workspace(root, ""), source_identity(source, root), seen)
        for record in islice(found, most):
            if isinstance(record, RefusedRecord):
                sample.refused[record.reason] += 1
            else:
                sample.records.append(record)
    except (DataError, ConfigError) as error:  # e.g. a table without the layout's columns, documents in an archive
        if raises:
            raise
        sample.refused[str(error)] += 1
    sample.ignored = dict(sorted(seen.ignored.items()))
    return sample
