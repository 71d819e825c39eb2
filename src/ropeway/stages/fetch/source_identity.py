"""What a source is right now, cheaply: asked before every run, so that DVC sees new data (imports nothing heavy)."""

import platform
from pathlib import Path
from typing import Any

from ropeway.config.params import FilesSource, PythonDocsSource, Source
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch.local import digest_files, find_files
from ropeway.stages.fetch.places import find_places
from ropeway.stages.fetch.records import check_columns
from ropeway.storage import hub


def source_identity(source: Source, root: Path) -> dict[str, Any]:
    """Return a source's identity: equal identities promise equal records.

    Args:
        source: As in params.
        root: The workspace; paths of `files` are relative to it.

    Raises:
        ConfigError: A path names no file, or a Hub branch cannot be resolved to a commit.
    """
    if isinstance(source, PythonDocsSource):
        return {"kind": source.kind, "part": source.part, "python": platform.python_version()}
    check_columns(source.rows, source.columns)
    if isinstance(source, FilesSource):
        found = find_places(source.paths, root, source.splits)
        here = {name: one for name, one in found.items() if isinstance(one, Path)}
        there = {name: one.facts for name, one in found.items() if not isinstance(one, Path)}
        return {"kind": source.kind, "files": {**_digest(here, root), **there}}
    commit = hub.resolve_commit(source.repo, source.revision, kind="dataset")
    return {"kind": source.kind, "repo": source.repo, "commit": commit, "files": source.files}


def find_changes(source: Source, identity: dict[str, Any], root: Path) -> list[str]:
    """Return what of a source is not as its identity says any more: the Python, or the names of local files.

    Servers are not asked again: what is fetched from them is compared with the identity while it comes.
    """
    if isinstance(source, PythonDocsSource):
        return [] if source_identity(source, root) == identity else [f"Python {identity['python']}"]
    if not isinstance(source, FilesSource):
        return []
    now = _digest(find_files([path for path in source.paths if "://" not in path], root, source.splits), root)
    before = {name: digest for name, digest in identity["files"].items() if isinstance(digest, str)}
    return [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


def _digest(files: dict[str, Path], root: Path) -> dict[str, str]:
    return digest_files(files, Workspace(root, "").work / "sha256.json") if files else {}
