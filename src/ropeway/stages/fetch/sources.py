"""The kinds of sources that `sources` of params.yaml may name: their current identity, and their records.

Add a kind here, as a class in `KINDS`, and in the schema (`ropeway.config.sections`). Identities are computed before
every run, so this module has no heavy imports.
"""

import platform
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

from ropeway.config.sections import (
    FilesSource,
    HuggingfaceSource,
    PythonDocsSource,
    RowsSource,
    Source,
)
from ropeway.data.raw_records import Record, RecordKind
from ropeway.runtime.errors import ConfigError, DataError, TemporaryError
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch import objects, web
from ropeway.stages.fetch.archives import Archive, SkippedMember, iterate_members
from ropeway.stages.fetch.decompress import InputFile
from ropeway.stages.fetch.files import iterate_objects
from ropeway.stages.fetch.formats import check_document, check_format, is_archive
from ropeway.stages.fetch.hub_files import download_matching
from ropeway.stages.fetch.local import digest_files, find_files, find_members
from ropeway.stages.fetch.patterns import check_splits
from ropeway.stages.fetch.python_docs import iterate_docstrings, iterate_topics
from ropeway.stages.fetch.records import (
    ROW_KINDS,
    check_columns,
    check_ignored,
    find_unused,
    required_columns,
    to_record,
)
from ropeway.stages.fetch.remote import Remote, download
from ropeway.stages.fetch.saved_folders import is_metadata
from ropeway.stages.fetch.values import UnreadableError
from ropeway.storage import hub

_MAX_NAMES = 1000  # distinct refusal reasons and ignored keys that are counted by name: files contain arbitrary names
_OTHER = "others"


@dataclass(frozen=True, slots=True)
class RefusedRecord:
    """A record that is not used."""

    where: str  # file and line or row
    reason: str  # one of a few fixed texts: records are counted by reason


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """Counts collected while a source is read."""

    files: Counter[str] = field(default_factory=Counter)  # name -> records read from it, including refused ones
    ignored: Counter[str] = field(default_factory=Counter)  # ignored key -> kept records in which it had a value
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> members of archives that are not read
    first_skipped: list[SkippedMember] = field(default_factory=list)


class DocsIdentity(TypedDict):
    """The part of the documentation, and the Python version."""

    part: str
    python: str


class FilesIdentity(TypedDict):
    """Name -> sha256 of a local file, or what a server states about its file."""

    files: Mapping[str, str | Mapping[str, object]]


class HubIdentity(TypedDict):
    """File patterns of a repository at a commit."""

    repo: str
    commit: str
    files: list[str]


RecordStream = Iterable[Record | RefusedRecord]
S = TypeVar("S")
Id = TypeVar("Id")


class SourceKind(ABC, Generic[S, Id]):
    """One kind of source: `S` is its section of params.yaml, `Id` its identity."""

    @abstractmethod
    def identity(self, source: S, root: Path) -> Id:
        """Return the source's current identity, without its kind; see `source_identity`."""

    @abstractmethod
    def records(self, source: S, workspace: Workspace, identity: Id, seen: SourceCounts) -> RecordStream:
        """Return the source's records; see `open_source`."""

    @abstractmethod
    def record_kind(self, source: S) -> RecordKind:
        """Return whether its records are conversations or documents."""

    def local_files(self, _source: S, _root: Path) -> dict[str, Path]:
        """Return the local files that it reads, by name."""
        return {}

    def changes(self, _source: S, _identity: Id, _root: Path) -> list[str]:
        """Return what has changed since its identity was taken; see `find_changes`."""
        return []


class PythonDocs(SourceKind[PythonDocsSource, DocsIdentity]):
    """The documentation of the running Python."""

    def identity(self, source: PythonDocsSource, _root: Path) -> DocsIdentity:
        """Return the part and the Python version."""
        return {"part": source.part, "python": platform.python_version()}

    def records(
        self, source: PythonDocsSource, _workspace: Workspace, _identity: DocsIdentity, _seen: SourceCounts
    ) -> RecordStream:
        """Return the records of the part: topics or docstrings."""
        return iterate_topics() if source.part == "topics" else iterate_docstrings()

    def record_kind(self, source: PythonDocsSource) -> RecordKind:
        """Return documents for topics, conversations for docstrings."""
        return "document" if source.part == "topics" else "conversation"

    def changes(self, source: PythonDocsSource, identity: DocsIdentity, root: Path) -> list[str]:
        """Return the Python version of the identity if another one is running."""
        return [] if self.identity(source, root).items() <= identity.items() else [f"Python {identity['python']}"]


class Files(SourceKind[FilesSource, FilesIdentity]):
    """Local files and files on servers."""

    def identity(self, source: FilesSource, root: Path) -> FilesIdentity:
        """Return the sha256 of local files, and what servers state about theirs."""
        check_columns(source.rows, source.columns)
        found = resolve_paths(source.paths, root, source.splits)
        for name in found:
            check_document(name.partition("?")[0] if "://" in name else name, source.rows)
        here = {name: one for name, one in found.items() if isinstance(one, Path)}
        there = {name: one.facts for name, one in found.items() if not isinstance(one, Path)}
        return {"files": {**_digest(here, root), **there}}

    def records(
        self, source: FilesSource, workspace: Workspace, identity: FilesIdentity, seen: SourceCounts
    ) -> RecordStream:
        """Yield the records of local and remote files; remote files are downloaded one at a time."""
        known, scratch = identity["files"], download_folder(workspace)
        members = find_members([path for path in source.paths if "://" not in path], workspace.root)
        for name, place in resolve_paths(source.paths, workspace.root, source.splits).items():
            if isinstance(place, Path):
                yield from _iterate_files({name: place}, source, seen, scratch, members)
                continue
            if place.facts != known.get(name):
                raise TemporaryError(f"sources: {name} changed during the download; run the same command again")
            path = download(place, scratch)
            try:
                yield from _iterate_files({name: path}, source, seen, scratch)
            except DataError as error:
                path.unlink()  # the next run must download it again
                raise DataError(str(error).replace(str(path), name, 1)) from error

    def record_kind(self, source: FilesSource) -> RecordKind:
        """Return the record kind of its rows."""
        return ROW_KINDS[source.rows].record_kind

    def local_files(self, source: FilesSource, root: Path) -> dict[str, Path]:
        """Return the files of `paths` that are not URLs."""
        return find_files([path for path in source.paths if "://" not in path], root, source.splits)

    def changes(self, source: FilesSource, identity: FilesIdentity, root: Path) -> list[str]:
        """Return the names of local files that changed, were added or were removed."""
        now = _digest(self.local_files(source, root), root)
        before = {name: digest for name, digest in identity["files"].items() if isinstance(digest, str)}
        return [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


class HubFiles(SourceKind[HuggingfaceSource, HubIdentity]):
    """Files of a dataset repository on the Hub."""

    def identity(self, source: HuggingfaceSource, _root: Path) -> HubIdentity:
        """Return the commit that the revision names currently."""
        check_columns(source.rows, source.columns)
        commit = hub.resolve_commit(source.repo, source.revision, kind="dataset")
        return {"repo": source.repo, "commit": commit, "files": source.files}

    def records(
        self, source: HuggingfaceSource, workspace: Workspace, identity: HubIdentity, seen: SourceCounts
    ) -> RecordStream:
        """Return the records of the commit's files."""
        files, members = download_matching(source, identity["commit"])
        return _iterate_files(files, source, seen, download_folder(workspace), members)

    def record_kind(self, source: HuggingfaceSource) -> RecordKind:
        """Return the record kind of its rows."""
        return ROW_KINDS[source.rows].record_kind


KINDS: dict[str, SourceKind[Any, Any]] = {"python_docs": PythonDocs(), "files": Files(), "huggingface": HubFiles()}


def source_identity(source: Source, root: Path) -> dict[str, object]:
    """Return a source's identity; sources with equal identities have equal records.

    Raises:
        ConfigError: A path matches no file, or a Hub branch cannot be resolved to a commit.
    """
    return {"kind": source.kind, **KINDS[source.kind].identity(source, root)}


def find_changes(source: Source, identity: Mapping[str, object], root: Path) -> list[str]:
    """Return what has changed since a source's identity was taken: the Python version, or the names of local files.

    Servers are not queried again: fetch compares what it downloads with the identity.
    """
    return KINDS[source.kind].changes(source, identity, root)


def local_files(source: Source, root: Path) -> dict[str, Path]:
    """Return the local files that a source reads, by name; ConfigError if a path matches no file."""
    return KINDS[source.kind].local_files(source, root)


def record_kind(source: Source) -> RecordKind:
    """Return whether a source's records are conversations or documents."""
    return KINDS[source.kind].record_kind(source)


def open_source(
    source: Source, workspace: Workspace, identity: Mapping[str, object], seen: SourceCounts | None = None
) -> RecordStream:
    """Return the records of the version that `identity` names, including refused ones, in a fixed order.

    Raises:
        ConfigError: A file does not exist or has no supported format.
        TemporaryError: A server does not respond.
    """
    return KINDS[source.kind].records(source, workspace, identity, seen or SourceCounts())


def download_folder(workspace: Workspace) -> Path:
    """Return the folder that keeps downloads until the stage succeeds."""
    return workspace.work / "fetch"


def resolve_paths(paths: list[str], root: Path, splits: Sequence[str] = ()) -> dict[str, Path | Remote]:
    """Return the files that paths, globs and URLs name, by name, sorted; servers are queried, nothing is downloaded.

    Raises:
        ConfigError: One matches nothing, an unreadable file, or files of several splits that `splits` does not name.
        TemporaryError: A server does not respond.
    """
    found: dict[str, Path | Remote] = dict(find_files([path for path in paths if "://" not in path], root, splits))
    for address in (path for path in paths if "://" in path):
        scheme = address.partition("://")[0]
        if scheme not in ("http", "https", "s3"):
            raise ConfigError(f"sources: '{scheme}://…' is not supported; expected https:// or s3://")
        remotes = objects.look_up(address) if scheme == "s3" else [web.look_up(address)]
        check_splits(address, [remote.name.partition("?")[0] for remote in remotes], splits)
        for remote in remotes:
            if check_format(remote.name.partition("?")[0]) == ".arrow":
                raise ConfigError(
                    f"sources: {remote.name}: the state.json of a saved folder is not read from addresses; upload the "
                    "folder as a .tar or .zip, or as parquet"
                )
            found[remote.name] = remote
    return dict(sorted(found.items()))


def limit_names(counts: Counter[str], name: str) -> str:
    """Return the name to count under: `others` once there are too many distinct names."""
    return name if name in counts or len(counts) < _MAX_NAMES else _OTHER


def _iterate_files(
    files: Mapping[str, Path],
    source: RowsSource,
    seen: SourceCounts,
    scratch: Path,
    members: Mapping[str, list[str] | None] | None = None,
) -> Iterator[Record | RefusedRecord]:
    """Yield the records of files and of members of archives; `members` are patterns, by archive."""
    documents = ROW_KINDS[source.rows].record_kind == "document"
    for name, path in files.items():
        if is_archive(path.name):
            patterns = (members or {}).get(name)
            for found in iterate_members(Archive(name, path, patterns, list(source.splits), documents, scratch)):
                if isinstance(found, SkippedMember):
                    seen.skipped[found.reason] += 1
                    seen.first_skipped.extend([found] * (len(seen.first_skipped) < _MAX_NAMES))
                else:
                    member, file = found
                    yield from _iterate_records(member, limit_names(seen.files, member), file, source, seen)
        elif not is_metadata(path):
            yield from _iterate_records(name, name, InputFile.of(path), source, seen)


def _iterate_records(
    name: str, counted_as: str, file: InputFile, source: RowsSource, seen: SourceCounts
) -> Iterator[Record | RefusedRecord]:
    for where, value in iterate_objects(file, required_columns(source.rows, source.columns)):
        seen.files[counted_as] += 1
        try:
            if isinstance(value, UnreadableError):
                raise value
            record = to_record(value, source.rows, source.columns, source.ignored_keys)
            unused = find_unused(value, source.rows, source.columns, source.ignored_keys)
            check_ignored(unused, source.ignored_keys)
        except UnreadableError as error:
            yield RefusedRecord(where.replace(file.label, name, 1), str(error))
        else:
            for key in unused:
                seen.ignored[limit_names(seen.ignored, key)] += 1
            yield record


def _digest(files: dict[str, Path], root: Path) -> dict[str, str]:
    return digest_files(files, Workspace(root, "").work / "sha256.json") if files else {}
