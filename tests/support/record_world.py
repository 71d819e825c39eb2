"""Versions as the flow publishes them, each with the index of records that a test states."""

from ropeway.data.data_profile import FILE
from ropeway.data.record_identity import exact_keys, identity_texts
from ropeway.data.record_index import RecordGroup, RecordOutcome, build_record_index
from ropeway.orchestration.publish import publish_package
from ropeway.runtime.manifest import describe_files, write_json, write_manifest
from tests.support.drift_world import COMMIT, Profile
from tests.support.registry_world import make_pages

SOURCES = {
    "chat": {"kind": "files", "rows": "sharegpt", "columns": {"conversations": "talk"}, "ignored_keys": ["note"]}
}


def publish_records(workspace, number, outcomes, *, stated=None):
    """Publish a version with the records of each outcome; None: an older version without an index.

    `stated` is put in place of the index's sha256 in the data profile.
    """
    loss = 5.0 - number / 100
    workspace.package.mkdir(parents=True, exist_ok=True)
    write_json(workspace.package / "weights.json", {"loss": loss})
    write_json(workspace.package / "run.json", {"params": {"sources": SOURCES}})
    write_manifest(workspace.package, {})
    metrics = {"sources": {"docs": {"base": {"loss": 8.0}, "tuned": {"loss": loss}}}, "validation": "rows"}
    write_json(workspace.evaluation, {**metrics, "mean": {"base": 8.0, "tuned": loss}})
    workspace.pages.mkdir(exist_ok=True)
    workspace.record_index.unlink(missing_ok=True)
    facts = {}
    if outcomes is not None:
        groups = [
            RecordGroup(RecordOutcome("chat", *outcome), exact_keys([identity_texts(one) for one in records]))
            for outcome, records in outcomes.items()
        ]
        workspace.record_index.write_bytes(build_record_index(groups))
        facts = {"record_index": describe_files(workspace.run, ["records.index"])["records.index"]}
        facts["record_index"] |= {"sha256": stated} if stated else {}
    write_json(workspace.pages / FILE, facts)
    make_pages(workspace.package, workspace.pages, f"# {number}\n")
    return publish_package(workspace, Profile(None), COMMIT, lambda *_: None)
