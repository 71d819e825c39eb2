"""What a source is right now, cheaply: asked before every run, so that DVC sees new data (imports nothing heavy)."""

import glob
import platform
import re
from pathlib import Path
from typing import Any

from ropeway.errors import ConfigError
from ropeway.manifest import file_sha256
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
    if isinstance(source, FilesSource):
        found = find_files(source.paths, root)
        return {"kind": source.kind, "files": {name: file_sha256(path) for name, path in found.items()}}
    return {"kind": source.kind, "repo": source.repo, "commit": _hub_commit(source), "files": source.files}


def find_files(patterns: list[str], root: Path) -> dict[str, Path]:
    """Return the files that these paths or globs name, by the name they have below `root`, sorted.

    Raises:
        ConfigError: A pattern names no file.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        if "://" in pattern:
            raise ConfigError(
                f"sources: '{pattern}': addresses are not fetched yet in this version; copy the file below "
                f"{root} and name it in `paths`"
            )
        names = glob.glob(pattern, root_dir=root, recursive=True)  # noqa: PTH207 - absolute patterns too
        files = {name: root / name for name in names if (root / name).is_file()}
        if not files:
            raise ConfigError(f"sources: '{pattern}' names no file below {root}; put it there or mend `paths`")
        found |= files
    return dict(sorted(found.items()))


def _hub_commit(source: HuggingfaceSource) -> str:
    if _COMMIT.fullmatch(source.revision):
        return source.revision
    raise ConfigError(
        f"sources: {source.repo} at '{source.revision}': branches of the Hub are not resolved yet in this version; "
        "write a commit (40 hex digits) as `revision`"
    )
