"""Room: fetch. Sources to parquet, pinned by an identity, every record counted."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import FilesSource, HuggingfaceSource, Profile, PythonDocsSource, Source
from ropeway.data.raw_records import RawWriter, Record, RecordKind
from ropeway.runtime.errors import DataError, TemporaryError, full_disk_explained
from ropeway.runtime.manifest import whole_folder, write_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch.files import iterate_objects
from ropeway.stages.fetch.hub_files import bring_files
from ropeway.stages.fetch.places import find_places
from ropeway.stages.fetch.python_docs import iterate_docstrings, iterate_topics
from ropeway.stages.fetch.records import check_ignored, find_unused, required_columns, to_record
from ropeway.stages.fetch.remote import download
from ropeway.stages.fetch.values import UnreadableError

_SHOWN_REFUSALS = 20
_SHOWN_FILES = 10
_MOST_NAMES = 1000  # of reasons and of ignored keys: whoever writes a file chooses their text
_OTHER = "others"


@dataclass(frozen=True, slots=True)
class Refused:
    """A record that cannot be used.

    Attributes:
        where: File and line, or row, as a person would look it up.
        reason: The same few words for the same fault: they are counted.
    """

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What is seen of a source beside its records.

    Attributes:
        files: Name -> records read of it, refused ones too.
        ignored: Ignored key -> kept records in which it carried something.
    """

    files: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)


def run(workspace: Workspace, profile: Profile) -> None:
    """Leave `raw/`: one folder of parquet parts per source, and a manifest of what was read, kept and refused.

    Raises:
        ConfigError: A source's kind or files are not there.
        DataError: A file is broken, or more than `max_refused_fraction` of a source's records were refused.
        TemporaryError: The disk is full.
    """
    identities = FrozenInputs.load(workspace.root).value("sources")
    sources: dict[str, Any] = {}
    rows: dict[str, int] = {}
    with full_disk_explained(workspace.raw), whole_folder(workspace.raw) as folder:
        for name, source in profile.sources.items():
            identity = identities[name]
            seen = Seen()
            records = open_source(source, workspace, identity, seen)
            facts, parts = _write(name, records, kind_of(source), folder / name, profile.max_refused_fraction)
            more = {"files": dict(seen.files), "ignored_keys": dict(sorted(seen.ignored.items()))}
            sources[name] = {**facts, **more, "identity": identity}
            rows |= {f"{name}/{part}": count for part, count in parts.items()}
            print("\n".join(describe(name, sources[name])))
        write_manifest(folder, {"sources": sources}, rows=rows)
    shutil.rmtree(_downloads(workspace), ignore_errors=True)


def describe(name: str, facts: Mapping[str, Any]) -> list[str]:
    """Return what was read of a source, kept and refused, for the log.

    >>> describe("talks", {"kind": "conversation", "read": 9, "kept": 9, "refused": {}, "ignored_keys": {"meta": 4}})
    ['talks: 9 records read, 9 conversations kept, 0 refused', 'talks: ignored keys: meta in 4 records']
    """
    refused = facts["refused"]
    reasons = "; ".join(f"{reason}: {count:,}" for reason, count in sorted(refused.items(), key=lambda pair: -pair[1]))
    total = f"{sum(refused.values()):,} refused" + (f" ({reasons})" if reasons else "")
    lines = [f"{name}: {facts['read']:,} records read, {facts['kept']:,} {facts['kind']}s kept, {total}"]
    files = facts.get("files", {})
    lines += [f"{name}: {file}: {count:,} records" for file, count in list(files.items())[:_SHOWN_FILES]]
    if len(files) > _SHOWN_FILES:
        lines.append(f"{name}: {len(files) - _SHOWN_FILES:,} more files; ledger.json lists them")
    if ignored := facts["ignored_keys"]:
        lines.append(
            f"{name}: ignored keys: {', '.join(f'{key} in {count:,} records' for key, count in ignored.items())}"
        )
    return lines


def _write(
    name: str, records: Iterable[Record | Refused], kind: RecordKind, folder: Path, limit: float
) -> tuple[dict[str, Any], dict[str, int]]:
    """Write one source's records; return its facts and the rows of each part."""
    reasons: Counter[str] = Counter()
    shown: list[dict[str, str]] = []
    with RawWriter(folder, kind) as writer:
        for record in records:
            if isinstance(record, Refused):
                reasons[_bounded(reasons, record.reason)] += 1
                shown += [{"where": record.where, "reason": record.reason}] * (len(shown) < _SHOWN_REFUSALS)
            else:
                writer.add(record)
    read = writer.records + reasons.total()
    if reasons.total() > limit * read:
        raise DataError(
            f"source {name}: {reasons.total():,} of {read:,} records refused ({dict(sorted(reasons.items()))}), more "
            f"than max_refused_fraction {limit:g} allows; the first: {shown[0]['where']}: {shown[0]['reason']}"
        )
    facts = {
        "kind": kind,
        "read": read,
        "kept": writer.records,
        "refused": dict(sorted(reasons.items())),
        "first_refused": shown,
    }
    return facts, writer.parts


def kind_of(source: Source) -> RecordKind:
    """Return what a source's records are."""
    if isinstance(source, PythonDocsSource):
        return "document" if source.part == "topics" else "conversation"
    return "document" if source.rows == "text" else "conversation"


def open_source(
    source: Source, workspace: Workspace, identity: dict[str, Any], seen: "Seen | None" = None
) -> Iterable[Record | Refused]:
    """Return a source's records, refused ones among them, in an order that never changes.

    Args:
        source: As in params.
        workspace: Where `paths` start, and where downloads are kept until the table is whole.
        identity: What `source_identity` said of the source: the records of that are read.
        seen: Gets what was seen beside the records.

    Raises:
        ConfigError: A file is not there, or not of a known format.
        TemporaryError: A server does not answer.
    """
    counted = seen or Seen()
    if isinstance(source, PythonDocsSource):
        return iterate_topics() if source.part == "topics" else iterate_docstrings()
    if isinstance(source, FilesSource):
        return _iterate_places(source, workspace, identity["files"], counted)
    return _iterate_files(bring_files(source, identity["commit"]), source, counted)


def _downloads(workspace: Workspace) -> Path:
    return workspace.work / "fetch"


def _iterate_places(
    source: FilesSource, workspace: Workspace, known: dict[str, Any], seen: "Seen"
) -> Iterator[Record | Refused]:
    """Yield the records of files here and on servers, one download at a time."""
    for name, place in find_places(source.paths, workspace.root, source.splits).items():
        if isinstance(place, Path):
            yield from _iterate_files({name: place}, source, seen)
            continue
        if place.facts != known.get(name):
            raise TemporaryError(f"sources: {name} changed while it was being fetched; run it again")
        path = download(place, _downloads(workspace))
        try:
            yield from _iterate_files({name: path}, source, seen)
        except DataError as error:
            path.unlink()  # "fetch it anew" must not find it again
            raise DataError(str(error).replace(str(path), name, 1)) from error


def _iterate_files(
    files: dict[str, Path], source: FilesSource | HuggingfaceSource, seen: "Seen"
) -> Iterator[Record | Refused]:
    required = required_columns(source.rows, source.columns)
    for name, path in files.items():
        for where, value in iterate_objects(path, required):
            seen.files[name] += 1
            try:
                if isinstance(value, UnreadableError):
                    raise value
                record = to_record(value, source.rows, source.columns)
                unused = find_unused(value, source.rows, source.columns)
                check_ignored(unused, source.ignored_keys)
            except UnreadableError as error:
                yield Refused(where.replace(str(path), name, 1), str(error))
            else:
                for key in unused:
                    seen.ignored[_bounded(seen.ignored, key)] += 1
                yield record


def _bounded(counts: Counter[str], name: str) -> str:
    """Return under which name something is counted: a file may hold any number of names."""
    return name if name in counts or len(counts) < _MOST_NAMES else _OTHER
