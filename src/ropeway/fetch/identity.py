"""What a source is right now, cheaply: asked before every run, so that DVC sees new data (imports nothing heavy)."""

import platform
from pathlib import Path
from typing import Any

from ropeway import hub
from ropeway.fetch.local import digest_files
from ropeway.fetch.places import find_places
from ropeway.fetch.records import check_columns
from ropeway.params import FilesSource, PythonDocsSource, Source
from ropeway.workspace import Workspace


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
        found = find_places(source.paths, root)
        here = {name: one for name, one in found.items() if isinstance(one, Path)}
        there = {name: one.facts for name, one in found.items() if not isinstance(one, Path)}
        digests = digest_files(here, Workspace(root, "").work / "sha256.json") if here else {}
        return {"kind": source.kind, "files": {**digests, **there}}
    commit = hub.resolve_commit(source.repo, source.revision, kind="dataset")
    return {"kind": source.kind, "repo": source.repo, "commit": commit, "files": source.files}
