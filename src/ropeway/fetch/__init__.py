"""Room: fetch. Sources to parquet, pinned by an identity, every record counted."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropeway.errors import DataError, TemporaryError, full_disk_explained
from ropeway.fetch.files import iterate_objects
from ropeway.fetch.hub_files import bring_files
from ropeway.fetch.places import find_places
from ropeway.fetch.python_docs import iterate_docstrings, iterate_topics
from ropeway.fetch.records import needed_columns, to_record
from ropeway.fetch.remote import download
from ropeway.fetch.values import UnreadableError
from ropeway.frozen import FrozenInputs
from ropeway.manifest import whole_folder, write_manifest
from ropeway.params import FilesSource, HuggingfaceSource, Profile, PythonDocsSource, Source
from ropeway.raw import RawWriter, Record, RecordKind
from ropeway.workspace import Workspace

_SHOWN_REFUSALS = 20


@dataclass(frozen=True, slots=True)
class Refused:
    """A record that cannot be used.

    Attributes:
        where: File and line, or row, as a person would look it up.
        reason: The same few words for the same fault: they are counted.
    """

    where: str
    reason: str


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
            records = open_source(source, workspace, identity)
            facts, parts = _write(name, records, kind_of(source), folder / name, profile.max_refused_fraction)
            sources[name] = {**facts, "identity": identity}
            rows |= {f"{name}/{part}": count for part, count in parts.items()}
            print(f"{name}: {facts['kept']:,} {facts['kind']}s of {facts['read']:,} read, {facts['refused'] or 'none'}")
        write_manifest(folder, {"sources": sources}, rows=rows)
    shutil.rmtree(_downloads(workspace), ignore_errors=True)


def _write(
    name: str, records: Iterable[Record | Refused], kind: RecordKind, folder: Path, limit: float
) -> tuple[dict[str, Any], dict[str, int]]:
    """Write one source's records; return its facts and the rows of each part."""
    reasons: Counter[str] = Counter()
    shown: list[dict[str, str]] = []
    with RawWriter(folder, kind) as writer:
        for record in records:
            if isinstance(record, Refused):
                reasons[record.reason] += 1
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


def open_source(source: Source, workspace: Workspace, identity: dict[str, Any]) -> Iterable[Record | Refused]:
    """Return a source's records, refused ones among them, in an order that never changes.

    Args:
        source: As in params.
        workspace: Where `paths` start, and where downloads are kept until the table is whole.
        identity: What `source_identity` said of the source: the records of that are read.

    Raises:
        ConfigError: A file is not there, or not of a known format.
        TemporaryError: A server does not answer.
    """
    if isinstance(source, PythonDocsSource):
        return iterate_topics() if source.part == "topics" else iterate_docstrings()
    if isinstance(source, FilesSource):
        return _iterate_places(source, workspace, identity["files"])
    return _iterate_files(bring_files(source, identity["commit"]), source)


def _downloads(workspace: Workspace) -> Path:
    return workspace.work / "fetch"


def _iterate_places(source: FilesSource, workspace: Workspace, known: dict[str, Any]) -> Iterator[Record | Refused]:
    """Yield the records of files here and on servers, one download at a time."""
    for name, place in find_places(source.paths, workspace.root).items():
        if isinstance(place, Path):
            yield from _iterate_files({name: place}, source)
            continue
        if place.facts != known.get(name):
            raise TemporaryError(f"sources: {name} changed while it was being fetched; run it again")
        path = download(place, _downloads(workspace))
        try:
            yield from _iterate_files({name: path}, source)
        except DataError as error:
            path.unlink()  # "fetch it anew" must not find it again
            raise DataError(str(error).replace(str(path), name, 1)) from error


def _iterate_files(files: dict[str, Path], source: FilesSource | HuggingfaceSource) -> Iterator[Record | Refused]:
    required, optional = needed_columns(source.rows, source.columns)
    for name, path in files.items():
        for where, value in iterate_objects(path, required, optional):
            try:
                if isinstance(value, UnreadableError):
                    raise value
                yield to_record(value, source.rows, source.columns)
            except UnreadableError as error:
                yield Refused(where.replace(str(path), name, 1), str(error))
