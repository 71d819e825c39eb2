"""What a source is right now, cheaply: asked before every run, so that DVC sees new data (imports nothing heavy)."""

import platform
import re
from pathlib import Path
from typing import Any

from ropeway.errors import ConfigError
from ropeway.fetch.local import digest_file, find_files
from ropeway.fetch.records import check_columns
from ropeway.params import FilesSource, HuggingfaceSource, PythonDocsSource, Source

_COMMIT = re.compile(r"[0-9a-f]{40}")


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
        found = find_files(source.paths, root)
        return {"kind": source.kind, "files": {name: digest_file(path) for name, path in found.items()}}
    return {"kind": source.kind, "repo": source.repo, "commit": _hub_commit(source), "files": source.files}


def _hub_commit(source: HuggingfaceSource) -> str:
    if _COMMIT.fullmatch(source.revision):
        return source.revision
    raise ConfigError(
        f"sources: {source.repo} at '{source.revision}': branches of the Hub are not resolved yet in this version; "
        "write a commit (40 hex digits) as `revision`"
    )
