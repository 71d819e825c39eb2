"""The hand-over: what a worker gets, byte for byte, without signed URLs; and what it refuses."""

import json
import stat

import pytest

from ropeway.config.frozen import FrozenInputs
from ropeway.orchestration.remote import handover
from ropeway.orchestration.remote.handover import Handover
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.manifest import write_manifest

SIGNED = "https://h/x.parquet?X-Amz-Signature=canary"


@pytest.fixture
def store(monkeypatch):
    """A DVC remote as a mapping."""
    kept = {}

    def push(_root, data):
        kept["0" * 32] = data
        return "0" * 32

    monkeypatch.setattr(handover.exchange, "push_document", push)
    monkeypatch.setattr(handover.exchange, "pull_document", lambda _root, digest: kept[digest])
    return kept


@pytest.fixture
def calling(tmp_path):
    folder = tmp_path / "calling" / ".identity"
    folder.mkdir(parents=True)
    (folder / "params-train.json").write_text('{"digest": "a", "of": {}}')
    (folder / "addresses.json").write_text(json.dumps({"digest": "b", "of": {"x": SIGNED}}))
    (folder / "params.yaml").write_text("profile: tiny\n")
    write_manifest(folder, {"profile": "tiny"})
    (folder.parent / "dvc.lock").write_text("schema: '2.0'\n")
    return folder.parent


def test_a_worker_gets_lock_and_frozen_inputs_without_signed_urls_unless_it_fetches(calling, store, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / ".identity").mkdir()
    (there / ".identity" / "code-old.json").touch()  # of an earlier request
    digest = Handover.collect(calling, "train").send(calling)
    assert b"canary" not in store[digest]
    Handover.receive(there, digest).write(there)
    assert (there / "dvc.lock").read_bytes() == (calling / "dvc.lock").read_bytes()
    loaded = FrozenInputs.load(there)  # verifies every file against the manifest
    assert loaded.profile_name == "tiny"
    assert loaded.value("addresses") == {}
    assert stat.S_IMODE((there / ".identity" / "addresses.json").stat().st_mode) == 0o600
    assert not (there / ".identity" / "code-old.json").exists()
    assert b"canary" in store[Handover.collect(calling, "fetch").send(calling)]


def test_equal_hand_overs_have_equal_bytes(calling, store):
    sent = [store[Handover.collect(calling, "train").send(calling)] for _ in range(2)]
    assert sent[0] == sent[1]


@pytest.mark.parametrize(
    "change",
    [
        {"identity": {"../../evil": "x"}},
        {"identity": {".hidden": "x"}},
        {"identity": {"a.json": 1}},
        {"lock": None},
        {"more": 1},
    ],
)
def test_a_document_that_is_no_hand_over_is_refused(calling, store, change):
    digest = Handover.collect(calling, "train").send(calling)
    store[digest] = json.dumps({**json.loads(store[digest]), **change}).encode()
    if "more" in change:
        store[digest] = store[digest].replace(b'"lock"', b'"lacks"')
    with pytest.raises(DataError):
        Handover.receive(calling, digest)


@pytest.mark.parametrize(("key", "value"), [("python", "2.7"), ("format", 9)])
def test_another_python_and_another_format_are_refused(calling, store, key, value):
    digest = Handover.collect(calling, "train").send(calling)
    store[digest] = json.dumps({**json.loads(store[digest]), key: value}).encode()
    with pytest.raises(ConfigError):
        Handover.receive(calling, digest)


def test_other_versions_of_libraries_are_named(calling):
    given = Handover.collect(calling, "train")
    assert given.other_versions() == []
    other = Handover(given.python, {**given.versions, "torch": "0.1"}, given.lock, given.identity)
    (sentence,) = other.other_versions()
    assert sentence.startswith("torch ")
    assert "0.1 at the calling run" in sentence
