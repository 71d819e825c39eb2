"""`forget`: a record that it names is in no file of the run, and the ledger says how many left."""

import json

import pytest

from ropeway.data.raw_records import iterate_records
from ropeway.data.record_identity import record_digest
from ropeway.data.record_index import RecordIndex, RecordOutcome
from ropeway.models.conversation import Conversation
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import load_manifest, write_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch.stage import describe
from tests.support.fetching import LAPTOP, files_source
from tests.support.freezing import run_fetch
from tests.support.raw_records import TALKS, TEXTS, profile, write_raw
from tests.support.tokenizing import tokenize_and_prepare

ADA, UNKNOWN = "Ada lives in London.", "0" * 32


def fetch_forgetting(root, digests, *, limit=0.0, **options):
    workspace = Workspace(root, "laptop")
    changes = {"sources": {"s": files_source("s.jsonl", **options)}, "max_refused_fraction": limit, "forget": digests}
    run_fetch(workspace, LAPTOP.model_copy(update=changes))
    return workspace, load_manifest(workspace.raw, remedy="")["sources"]["s"]


def test_a_forgotten_record_is_in_no_file_and_is_not_counted_as_refused(tmp_path):
    texts = [ADA, "A rope.", f"  {ADA.replace(' ', chr(10))}", "A way."]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    digest = record_digest(ADA).hex()
    workspace, facts = fetch_forgetting(tmp_path, [digest, UNKNOWN])
    assert list(iterate_records(workspace.raw / "s")) == ["A rope.", "A way."]
    assert (facts["read"], facts["kept"], facts["refused"], facts["forgotten"]) == (4, 2, {}, {digest: 2})
    assert not any(b"London" in path.read_bytes() for path in workspace.raw.rglob("*") if path.is_file())
    assert "2 forgotten" in describe("s", facts)[0]
    _, facts = fetch_forgetting(tmp_path, [])
    assert facts["kept"] == 4
    assert "forgotten" not in facts


def test_a_conversation_is_forgotten_by_its_turns_whatever_its_system_message(tmp_path):
    rows = [{"prompt": "Who?", "completion": "Ada.", "system": system} for system in ("", "Be brief.")]
    (tmp_path / "s.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + json.dumps(rows[0] | {"completion": "Bob."})
    )
    digest = record_digest(Conversation(("Who?", "Ada."))).hex()
    workspace, facts = fetch_forgetting(tmp_path, [digest], rows="prompt_completion", columns={"system": "system"})
    assert [one.turns for one in iterate_records(workspace.raw / "s")] == [("Who?", "Bob.")]
    assert facts["forgotten"] == {digest: 2}


@pytest.fixture
def dropped(tmp_path):
    """A workspace as fetch leaves it that dropped three records with two digests."""
    workspace = write_raw(tmp_path)
    manifest = json.loads((workspace.raw / "manifest.json").read_bytes())
    sources = manifest["sources"]
    sources["talk"] |= {"read": sources["talk"]["read"] + 3, "forgotten": {"1" * 32: 2, "2" * 32: 1}}
    (workspace.raw / "manifest.json").unlink()
    write_manifest(workspace.raw, {"sources": sources})
    return workspace


def test_the_ledger_counts_what_left_and_names_digests_that_match_nothing(dropped):
    tokenize_and_prepare(dropped, profile(forget=["1" * 32, "2" * 32, UNKNOWN, UNKNOWN]))
    ledger = json.loads(dropped.ledger.read_bytes())
    assert ledger["forget"] == {"listed": 3, "matched": 2, "unmatched": [UNKNOWN]}
    assert [one["records"].get("forgotten") for one in ledger["sources"]] == [3, None]
    assert ledger["sources"][0]["records"]["kept"] == len(TALKS)
    data = dropped.record_index.read_bytes()
    index = RecordIndex.open(lambda start, count: data[start : start + count], len(data), "records.index")
    assert index.find([bytes.fromhex("1" * 32)]) == [RecordOutcome("talk", "dropped", "forgotten")]
    assert index.count == len(TALKS) + len(set(TEXTS)) + 2


def test_a_ledger_without_forget_has_no_key_of_it(tmp_path):
    workspace = write_raw(tmp_path)
    tokenize_and_prepare(workspace, profile())
    assert b"forg" not in workspace.ledger.read_bytes()


def test_a_record_that_left_without_being_counted_is_an_error_of_the_sums(dropped):
    sources = json.loads((dropped.raw / "manifest.json").read_bytes())["sources"]
    del sources["talk"]["forgotten"]
    (dropped.raw / "manifest.json").unlink()
    write_manifest(dropped.raw, {"sources": sources})
    with pytest.raises(DataError, match="records read = forgotten"):
        tokenize_and_prepare(dropped, profile())
