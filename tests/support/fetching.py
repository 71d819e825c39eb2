"""Fetch files as the stage does: the facts of the source, and its records."""

from ropeway.config.load_params import load_profile
from ropeway.config.sections import FilesSource
from ropeway.data.raw_records import iterate_records
from ropeway.runtime.manifest import load_manifest
from ropeway.runtime.workspace import Workspace
from tests.support.freezing import run_fetch
from tests.support.tiny_run import ROOT

_, LAPTOP = load_profile(ROOT / "params.yaml", "laptop")


def files_source(*paths, rows="text", columns=None, ignored=(), splits=()):
    """A source of kind `files`."""
    return FilesSource(
        kind="files",
        paths=list(paths),
        rows=rows,
        columns=columns or {},
        expected_rows=None,
        ignored_keys=list(ignored),
        splits=list(splits),
    )


def fetch_source(root, source, limit=1.0):
    """Fetch one source; return its facts and its records, whose counts agree."""
    profile = LAPTOP.model_copy(update={"sources": {"s": source}, "max_refused_fraction": limit})
    workspace = Workspace(root, "laptop")
    run_fetch(workspace, profile)
    facts = load_manifest(workspace.raw, remedy="")["sources"]["s"]
    records = list(iterate_records(workspace.raw / "s"))
    assert facts["read"] == facts["kept"] + sum(facts["refused"].values()) == sum(facts["files"].values())
    assert facts["kept"] == len(records)
    assert not (workspace.work / "fetch").exists()
    return facts, records


def fetch(root, *paths, **options):
    """Fetch files; `options` as of `files_source`."""
    return fetch_source(root, files_source(*paths, **options))
