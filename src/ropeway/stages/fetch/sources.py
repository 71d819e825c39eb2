"""The kinds of sources that `sources` of params.yaml may name: what each is right now, and the records it holds.

A kind is added here, as a class in `KINDS`, and in the schema (`ropeway.config.params`). Identities are asked for
before every run, so importing this imports nothing heavy.
"""

import platform
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

from ropeway.config.params import FilesSource, HuggingfaceSource, PythonDocsSource, RowsSource, Source
from ropeway.data.raw_records import Record, RecordKind
from ropeway.runtime.errors import ConfigError, DataError, TemporaryError
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch import objects, web
from ropeway.stages.fetch.files import check_format, iterate_objects
from ropeway.stages.fetch.local import digest_files, find_files
from ropeway.stages.fetch.patterns import check_splits, match_names
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
from ropeway.stages.fetch.values import UnreadableError
from ropeway.storage import hub

_MOST_NAMES = 1000  # of reasons and of ignored keys: whoever writes a file chooses their text
_OTHER = "others"
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Refused:
    """A record that cannot be used."""

    where: str  # file and line, or row, as a person would look it up
    reason: str  # the same few words for the same fault: they are counted


@dataclass(frozen=True, slots=True)
class Seen:
    """What is seen of a source beside its records."""

    files: Counter[str] = field(default_factory=Counter)  # name -> records read of it, refused ones too
    ignored: Counter[str] = field(default_factory=Counter)  # ignored key -> kept records in which it carried something


class DocsIdentity(TypedDict):
    """Which documentation, of which Python."""

    part: str
    python: str


class FilesIdentity(TypedDict):
    """Name -> digest of a local file, or what a server says of its file."""

    files: Mapping[str, str | Mapping[str, object]]


class HubIdentity(TypedDict):
    """Files (patterns) of a repository at a commit."""

    repo: str
    commit: str
    files: list[str]


Found = Iterable[Record | Refused]
S = TypeVar("S")
Id = TypeVar("Id")


class SourceKind(ABC, Generic[S, Id]):
    """One kind of source: `S` is its section of params, `Id` its identity."""

    @abstractmethod
    def identity(self, source: S, root: Path) -> Id:
        """Return what the source is right now, without its kind; see `source_identity`."""

    @abstractmethod
    def records(self, source: S, workspace: Workspace, identity: Id, seen: Seen) -> Found:
        """Return its records; see `open_source`."""

    @abstractmethod
    def holds(self, source: S) -> RecordKind:
        """Return what its records are."""

    def local_files(self, _source: S, _root: Path) -> dict[str, Path]:
        """Return the workspace's files that it reads in place, by name."""
        return {}

    def changes(self, _source: S, _identity: Id, _root: Path) -> list[str]:
        """Return what is not as its identity says any more; see `find_changes`."""
        return []


class PythonDocs(SourceKind[PythonDocsSource, DocsIdentity]):
    """The documentation of the running Python."""

    def identity(self, source: PythonDocsSource, _root: Path) -> DocsIdentity:
        """Return the part and the Python."""
        return {"part": source.part, "python": platform.python_version()}

    def records(self, source: PythonDocsSource, _workspace: Workspace, _identity: DocsIdentity, _seen: Seen) -> Found:
        """Return topics or docstrings."""
        return iterate_topics() if source.part == "topics" else iterate_docstrings()

    def holds(self, source: PythonDocsSource) -> RecordKind:
        """Return what the part holds."""
        return "document" if source.part == "topics" else "conversation"

    def changes(self, source: PythonDocsSource, identity: DocsIdentity, root: Path) -> list[str]:
        """Return the Python, if this is another."""
        return [] if self.identity(source, root).items() <= identity.items() else [f"Python {identity['python']}"]


class Files(SourceKind[FilesSource, FilesIdentity]):
    """Files in the workspace and on servers."""

    def identity(self, source: FilesSource, root: Path) -> FilesIdentity:
        """Return digests of local files, and what servers say of theirs."""
        check_columns(source.rows, source.columns)
        found = find_places(source.paths, root, source.splits)
        here = {name: one for name, one in found.items() if isinstance(one, Path)}
        there = {name: one.facts for name, one in found.items() if not isinstance(one, Path)}
        return {"files": {**_digest(here, root), **there}}

    def records(self, source: FilesSource, workspace: Workspace, identity: FilesIdentity, seen: Seen) -> Found:
        """Yield the records of files here and on servers, one download at a time."""
        known = identity["files"]
        for name, place in find_places(source.paths, workspace.root, source.splits).items():
            if isinstance(place, Path):
                yield from _iterate_files({name: place}, source, seen)
                continue
            if place.facts != known.get(name):
                raise TemporaryError(f"sources: {name} changed while it was being fetched; run it again")
            path = download(place, download_folder(workspace))
            try:
                yield from _iterate_files({name: path}, source, seen)
            except DataError as error:
                path.unlink()  # "fetch it again" must not find it again
                raise DataError(str(error).replace(str(path), name, 1)) from error

    def holds(self, source: FilesSource) -> RecordKind:
        """Return what its rows are."""
        return ROW_KINDS[source.rows].holds

    def local_files(self, source: FilesSource, root: Path) -> dict[str, Path]:
        """Return those of `paths` that are no addresses."""
        return find_files([path for path in source.paths if "://" not in path], root, source.splits)

    def changes(self, source: FilesSource, identity: FilesIdentity, root: Path) -> list[str]:
        """Return the names of local files that changed, came or went."""
        now = _digest(self.local_files(source, root), root)
        before = {name: digest for name, digest in identity["files"].items() if isinstance(digest, str)}
        return [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


class HubFiles(SourceKind[HuggingfaceSource, HubIdentity]):
    """Files of a data set repository on the Hub."""

    def identity(self, source: HuggingfaceSource, _root: Path) -> HubIdentity:
        """Return the commit that the revision names now."""
        check_columns(source.rows, source.columns)
        commit = hub.resolve_commit(source.repo, source.revision, kind="dataset")
        return {"repo": source.repo, "commit": commit, "files": source.files}

    def records(self, source: HuggingfaceSource, _workspace: Workspace, identity: HubIdentity, seen: Seen) -> Found:
        """Return the records of the commit's files."""
        return _iterate_files(download_matching(source, identity["commit"]), source, seen)

    def holds(self, source: HuggingfaceSource) -> RecordKind:
        """Return what its rows are."""
        return ROW_KINDS[source.rows].holds


KINDS: dict[str, SourceKind[Any, Any]] = {"python_docs": PythonDocs(), "files": Files(), "huggingface": HubFiles()}


def source_identity(source: Source, root: Path) -> dict[str, object]:
    """Return a source's identity: equal identities promise equal records.

    Raises:
        ConfigError: A path names no file, or a Hub branch cannot be resolved to a commit.
    """
    return {"kind": source.kind, **KINDS[source.kind].identity(source, root)}


def find_changes(source: Source, identity: Mapping[str, object], root: Path) -> list[str]:
    """Return what of a source is not as its identity says any more: the Python, or the names of local files.

    Servers are not asked again: what is fetched from them is compared with the identity while it comes.
    """
    return KINDS[source.kind].changes(source, identity, root)


def local_files(source: Source, root: Path) -> dict[str, Path]:
    """Return the workspace's files that a source reads in place, by name; ConfigError where a path names no file."""
    return KINDS[source.kind].local_files(source, root)


def kind_of(source: Source) -> RecordKind:
    """Return what a source's records are."""
    return KINDS[source.kind].holds(source)


def open_source(
    source: Source, workspace: Workspace, identity: Mapping[str, object], seen: Seen | None = None
) -> Found:
    """Return the records of what `identity` names, refused ones among them, in an order that never changes.

    Raises:
        ConfigError: A file is not there, or not of a known format.
        TemporaryError: A server does not answer.
    """
    return KINDS[source.kind].records(source, workspace, identity, seen or Seen())


def download_folder(workspace: Workspace) -> Path:
    """Return where downloads are kept until the stage has ended."""
    return workspace.work / "fetch"


def find_places(paths: list[str], root: Path, splits: Sequence[str] = ()) -> dict[str, Path | Remote]:
    """Return the files that paths, globs and addresses name, by name, sorted; servers are asked, nothing is fetched.

    Raises:
        ConfigError: One names nothing, what cannot be read, or files of several splits that `splits` does not name.
        TemporaryError: A server does not answer.
    """
    found: dict[str, Path | Remote] = dict(find_files([path for path in paths if "://" not in path], root, splits))
    for address in (path for path in paths if "://" in path):
        scheme = address.partition("://")[0]
        if scheme not in ("http", "https", "s3"):
            raise ConfigError(f"sources: '{scheme}://…' is no address that is fetched; known are https:// and s3://")
        remotes = objects.look_up(address) if scheme == "s3" else [web.look_up(address)]
        check_splits(address, [remote.name.partition("?")[0] for remote in remotes], splits)
        for remote in remotes:
            check_format(remote.name.partition("?")[0])
            found[remote.name] = remote
    return dict(sorted(found.items()))


def download_matching(source: HuggingfaceSource, commit: str) -> dict[str, Path]:
    """Return a commit's matching files by the name they have in the repository, sorted; in the Hub's own cache.

    Raises:
        ConfigError: A pattern matches nothing, files of several splits or of no known format, or the Hub does not show
            the repository.
        TemporaryError: The Hub does not answer.
    """
    there = hub.list_files(source.repo, commit, kind="dataset")
    matched = match_names(source.files, there)
    if lost := [pattern for pattern in source.files if not matched[pattern]]:
        whose = "in the cache (HF_HUB_OFFLINE is set)" if hub.is_offline() else "there"
        more = f" and {len(there) - _SHOWN:,} more" if len(there) > _SHOWN else ""
        raise ConfigError(
            f"sources: {source.repo} at {commit[:12]}: '{lost[0]}' matches none of the {len(there):,} files {whose}: "
            f"{', '.join(there[:_SHOWN]) or 'none'}{more}; correct `files`"
        )
    for pattern in source.files:
        check_splits(pattern, matched[pattern], source.splits)
    names = sorted({name for some in matched.values() for name in some})
    for name in names:
        check_format(name)
    folder = hub.download_files(source.repo, commit, names, kind="dataset", revision=source.revision)
    return {name: folder / name for name in names}


def bounded_name(counts: Counter[str], name: str) -> str:
    """Return under which name something is counted: a file may hold any number of names."""
    return name if name in counts or len(counts) < _MOST_NAMES else _OTHER


def _iterate_files(files: Mapping[str, Path], source: RowsSource, seen: Seen) -> Iterator[Record | Refused]:
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
                    seen.ignored[bounded_name(seen.ignored, key)] += 1
                yield record


def _digest(files: dict[str, Path], root: Path) -> dict[str, str]:
    return digest_files(files, Workspace(root, "").work / "sha256.json") if files else {}
