"""Withdrawal, garbage collection, signatures and comparison, on both stores."""

import json
from datetime import timedelta
from pathlib import Path

import pytest

from ropeway.registry import Registry, garbage_collection
from ropeway.registry.layout import blob_key, intent_key, manifest_key, signature_key, tombstone_key, versions_log
from ropeway.registry.signing import list_signatures, load_signer
from ropeway.registry.signing_keys import make_keys
from ropeway.registry.version_manifest import load_version_manifest
from ropeway.runtime.errors import ConfigError, DataError, RegistryError, TemporaryError
from ropeway.runtime.manifest import canonical_json, write_manifest
from ropeway.storage import FileStore, Store
from tests.support.registry_world import change_event, flip, make_package, move, own_fields, put, replace, tiny

NOW = timedelta(seconds=-60)  # a grace period that every object is past, for any clock of the store
LATER = timedelta(hours=24)


@pytest.fixture
def two(fill) -> list[str]:
    return fill(2)


def weights_of(store: Store, digest: str) -> str:
    return blob_key(
        next(file.sha256 for file in load_version_manifest(store, "tiny", digest).files if "model" in file.path)
    )


# Withdrawal


def test_pull_verify_and_promote_reject_a_withdrawn_version(store, two, tmp_path):
    assert tiny(store).version(two[0]).withdraw(by="ana", reason="leaks")
    assert not tiny(store).version(two[0]).withdraw(by="ana", reason="leaks")
    tombstone = json.loads(store.get(tombstone_key("tiny", two[0])))
    assert (tombstone["digest"], tombstone["by"], tombstone["reason"]) == (two[0], "ana", "leaks")
    for act in (
        lambda: Registry(store).version("tiny@v1").pull(tmp_path / "x"),
        lambda: Registry(store).version("tiny@v1").verify(),
    ):
        with pytest.raises(RegistryError, match="withdrawn"):
            act()
    with pytest.raises(RegistryError, match="withdrawn"):
        move(store, two[0])


def test_retirement_keeps_the_newest_the_aliases_and_what_was_ever_production(store, tmp_path):
    digests = [put(store, make_package(tmp_path / str(number), b"%d" % number)).digest for number in range(6)]
    move(store, digests[0], alias="production")
    move(store, digests[1], alias="production")
    move(store, digests[2])
    tiny(store).version(digests[3]).withdraw(by="ana", reason="leaks")
    assert [version.digest for version in tiny(store).retirable(1)] == [digests[4]]
    assert tiny(store).retirable(5) == tiny(store).retirable(100) == []
    for version in tiny(store).retirable(1):
        version.withdraw(by="ana", reason="old")
    assert tiny(store).retirable(1) == []


def test_a_version_with_an_alias_cannot_be_withdrawn(store, two):
    move(store, two[0])
    with pytest.raises(RegistryError, match=r"tiny@candidate.*not withdrawn"):
        tiny(store).version(two[0]).withdraw(by="ana", reason="leaks")
    assert not store.exists(tombstone_key("tiny", two[0]))
    move(store, two[1])
    assert tiny(store).version(two[0]).withdraw(by="ana", reason="leaks")


def test_a_promotion_during_a_withdrawal_is_reported(store, two, monkeypatch):
    put_if_absent = store.put_if_absent

    def promote_first(key, data, *, sha256=None):
        monkeypatch.undo()
        move(store, two[0])
        return put_if_absent(key, data, sha256=sha256)

    monkeypatch.setattr(store, "put_if_absent", promote_first)
    with pytest.raises(RegistryError, match="is withdrawn, but tiny@candidate"):
        tiny(store).version(two[0]).withdraw(by="ana", reason="leaks")


@pytest.mark.parametrize(
    ("digest", "by", "reason", "error"),
    [("0" * 64, "a", "b", RegistryError), (None, "", "b", ConfigError), (None, "a", "\x1b", ConfigError)],
)
def test_a_withdrawal_needs_a_version_a_name_and_a_reason(store, two, digest, by, reason, error):
    with pytest.raises(error):
        tiny(store).version(digest or two[0]).withdraw(by=by, reason=reason)
    assert store.list_keys("models/tiny/tombstones/") == []


# Garbage collection


def test_referenced_objects_are_never_collected(store, two):
    tiny(store).version(two[0]).withdraw(by="ana", reason="leaks")
    before = store.list_keys("")
    found = Registry(store).collect(grace=NOW, withdrawn=False)
    assert (found.entries, found.incomplete_uploads, found.in_grace_period) == ((), (), 0)
    assert store.list_keys("") == before


def test_garbage_older_than_the_grace_period_is_deleted(store, two):
    orphan = "blobs/sha256/aa/" + "a" * 64
    core = canonical_json({"name": "tiny"})
    store.put_if_absent(orphan, b"orphan")
    store.put_if_absent(manifest_key("tiny", "b" * 64), core)
    store.put_if_absent(signature_key("tiny", "b" * 64, "c" * 16), b"x")
    store.put_if_absent(signature_key("tiny", two[0], "c" * 16), b"x")
    store.put_if_absent("somebody/elses", b"x")
    young = Registry(store).find_garbage(grace=LATER, withdrawn=False)
    assert (young.entries, young.in_grace_period) == ((), 3)
    found = Registry(store).find_garbage(grace=NOW, withdrawn=False)
    expected = {orphan, manifest_key("tiny", "b" * 64), signature_key("tiny", "b" * 64, "c" * 16)}
    assert {entry.key for entry in found.entries} == expected
    assert found.bytes == 6 + len(core) + 1
    assert store.exists(orphan)
    assert {entry.key for entry in Registry(store).collect(grace=NOW, withdrawn=False).entries} == expected
    assert not any(store.exists(key) for key in expected)
    assert store.exists("somebody/elses")
    assert list_signatures(store, "tiny", two[0]) == ["c" * 16]
    assert store.list_keys("collections/") == []
    assert Registry(store).version("tiny@v1").verify().files == Registry(store).version("tiny@v2").verify().files == 4


def test_blobs_of_withdrawn_versions_are_deleted_on_request(store, two):
    tiny(store).version(two[0]).withdraw(by="ana", reason="leaks")
    gone = {entry.key for entry in Registry(store).collect(grace=NOW, withdrawn=True).entries}
    assert weights_of(store, two[0]) in gone
    assert Registry(store).version("tiny@v2").verify().files == 4
    assert store.exists(manifest_key("tiny", two[0]))


@pytest.mark.usefixtures("two")
def test_an_intent_keeps_its_objects_until_it_expires(store, monkeypatch):
    orphan = "blobs/sha256/aa/" + "a" * 64
    store.put_if_absent(orphan, b"orphan")
    intent = {"name": "tiny", "digest": "d" * 64, "blobs": [orphan], "at": "now"}
    store.put_if_absent(intent_key(7), canonical_json(intent))
    assert Registry(store).collect(grace=NOW, withdrawn=False).entries == ()
    monkeypatch.setattr(garbage_collection, "INTENT_TTL", NOW)
    for key in (intent_key(7), orphan):  # the publish is stopped first; a later collection takes its objects
        assert [entry.key for entry in Registry(store).collect(grace=NOW, withdrawn=False).entries] == [key]


def test_a_publish_during_a_collection_fails_and_a_retry_succeeds(store, two, tmp_path, monkeypatch):
    package = make_package(tmp_path / "new", b"new")
    real = garbage_collection.find_garbage

    def publish_first(*arguments, **options):
        with pytest.raises(TemporaryError, match=r"garbage collection .* UTC"):
            put(store, package)
        assert store.list_keys("intents/") == []
        return real(*arguments, **options)

    monkeypatch.setattr(garbage_collection, "find_garbage", publish_first)
    Registry(store).collect(grace=NOW, withdrawn=False)
    assert put(store, package).number == len(two) + 1


def test_the_marker_of_a_dead_collection_expires(store, two, tmp_path, monkeypatch):
    store.put_if_absent("collections/" + "1" * 32 + ".json", b"{}")
    monkeypatch.setattr("ropeway.registry.publishing.COLLECTION_TTL", NOW)
    assert put(store, make_package(tmp_path / "new", b"new")).number == len(two) + 1
    assert Registry(store).collect(grace=NOW, withdrawn=False).entries == ()
    monkeypatch.setattr(garbage_collection, "COLLECTION_TTL", NOW)
    assert "collections/" + "1" * 32 + ".json" in [
        entry.key for entry in Registry(store).collect(grace=NOW, withdrawn=False).entries
    ]


def test_nothing_is_deleted_if_a_manifest_is_damaged_or_missing(store, two):
    orphan = "blobs/sha256/aa/" + "a" * 64
    store.put_if_absent(orphan, b"orphan")
    flip(store, manifest_key("tiny", two[0]))
    with pytest.raises(DataError):
        Registry(store).collect(grace=NOW, withdrawn=False)
    store.delete(manifest_key("tiny", two[0]))
    with pytest.raises(RegistryError):
        Registry(store).collect(grace=NOW, withdrawn=False)
    assert store.exists(orphan)
    assert store.list_keys("collections/") == []


def test_incomplete_uploads_are_collected(store, two):
    if isinstance(store, FileStore):
        (store.root / ".partial").mkdir(exist_ok=True)
        (store.root / ".partial" / "dead").touch()
    else:
        for key in ("blobs/sha256/aa/dead", "checkpoints/of/others"):
            store.client.create_multipart_upload(Bucket=store._bucket, Key=store._path(key))
    assert len(Registry(store).find_garbage(grace=LATER, withdrawn=False).incomplete_uploads) == 0
    assert len(Registry(store).collect(grace=NOW, withdrawn=False).incomplete_uploads) == 1
    others = [] if isinstance(store, FileStore) else ["checkpoints/of/others"]
    assert [upload.name for upload in store.list_incomplete_uploads()] == others
    assert Registry(store).version(f"tiny@v{len(two)}").verify().files == 4


# Signatures


@pytest.fixture
def keys(tmp_path, monkeypatch) -> Path:
    """Create two key pairs: the first one signs, both public keys are in `trusted/`, no policy is set."""
    (tmp_path / "trusted").mkdir()
    for name in ("one", "two"):
        make_keys(tmp_path / name)
        (tmp_path / f"{name}.pub").rename(tmp_path / "trusted" / f"{name}.pub")
    monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "one"))
    monkeypatch.delenv("ROPEWAY_TRUSTED_KEYS", raising=False)
    return tmp_path


def test_a_published_version_is_signed_and_passes_the_policy(store, keys, monkeypatch, tmp_path):
    done = put(store, make_package(tmp_path / "package"))
    assert list_signatures(store, "tiny", done.digest) == [load_signer().keyid]
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(keys / "trusted"))
    assert move(store, done.digest).moved
    assert Registry(store).version("tiny@candidate").pull(tmp_path / "pulled").created
    assert Registry(store).version("tiny@candidate").verify().files == 4


def test_the_policy_rejects_missing_untrusted_and_invalid_signatures(store, two, keys, monkeypatch, tmp_path):
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(keys / "trusted"))
    acts = [
        lambda: Registry(store).version("tiny@v1").pull(tmp_path / "x"),
        lambda: Registry(store).version("tiny@v1").verify(),
        lambda: tiny(store).version(two[0]).promote("candidate", expect=None, by="a", reason="b"),
    ]

    def check_rejected(message):
        for act in acts:
            with pytest.raises(DataError, match=message):
                act()
        assert not (tmp_path / "x").exists()

    check_rejected("no signature of a trusted key")
    core, signer = load_version_manifest(store, "tiny", two[0]), load_signer()
    good, key = signer.sign(core), signature_key("tiny", two[0], signer.keyid)
    untrusted = signature_key("tiny", two[0], "0" * 16)
    store.put_if_absent(untrusted, good)
    check_rejected("no signature of a trusted key")
    other = signer.sign(load_version_manifest(store, "tiny", two[1]))
    for bad in (other, good[:-1], b"", b"x" * 64, good + b"x"):
        replace(store, key, bad)
        check_rejected("is not a valid signature")
    replace(store, key, good)
    assert Registry(store).version("tiny@v1").verify().files == 4


def test_keys_are_rotated_by_a_second_signature(store, two, keys, monkeypatch):
    from ropeway.registry.signing import sign

    core = load_version_manifest(store, "tiny", two[0])
    assert sign(store, core, load_signer())
    assert not sign(store, core, load_signer())
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(keys / "trusted"))
    (keys / "trusted" / "one.pub").unlink()
    with pytest.raises(DataError, match="no signature"):
        Registry(store).version("tiny@v1").verify()
    monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(keys / "two"))
    assert sign(store, core, load_signer())
    assert Registry(store).version("tiny@v1").verify().files == 4
    assert len(list_signatures(store, "tiny", two[0])) == 2


def test_invalid_readable_and_existing_keys_are_rejected(keys, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="never overwritten"):
        make_keys(keys / "one")
    (keys / "one").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_signer()
    for content in (b"", b"not a key", (keys / "trusted" / "one.pub").read_bytes()):
        (tmp_path / "bad").write_bytes(content)
        (tmp_path / "bad").chmod(0o600)
        monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "bad"))
        with pytest.raises(ConfigError, match="keygen"):
            load_signer()
    monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="keygen"):
        load_signer()


def test_a_policy_without_valid_keys_is_an_error(store, two, keys, monkeypatch, tmp_path):
    (tmp_path / "none").mkdir()
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"has no \*\.pub"):
        Registry(store).version(f"tiny@v{len(two)}").verify()
    (tmp_path / "none" / "x.pub").write_text("broken")
    with pytest.raises(ConfigError, match=r"x\.pub is not a public key"):
        Registry(store).version("tiny@v1").verify()
    assert keys.exists()


def test_a_private_key_has_mode_600_and_is_never_stored(store, keys, tmp_path):
    assert (keys / "one").stat().st_mode & 0o777 == 0o600
    put(store, make_package(tmp_path / "package"))
    secret = (keys / "one").read_bytes().splitlines()[1]
    for key in store.list_keys(""):
        with store.open_stream(key) as stream:
            assert secret not in stream.read()


# Comparison


def test_two_versions_are_compared_by_facts_and_files(store, tmp_path):
    for name, seed, loss in (("a", 1, 2.5), ("b", 2, 2.25)):
        folder = make_package(tmp_path / name, name.encode())
        (folder / "run.json").write_text(json.dumps({"params": {"seed": seed, "lr": 0.1}, "metrics": {"loss": loss}}))
        if name == "b":
            (folder / "notes.txt").write_text("new")
        (folder / "manifest.json").unlink()
        write_manifest(folder, {"steps": seed})
        put(store, folder)
    found = Registry(store).version("tiny@v1").compare(Registry(store).version("tiny@v2"))
    assert found["facts"] == {
        "facts.steps": [1, 2],
        "run.json: metrics.loss": [2.5, 2.25],
        "run.json: params.seed": [1, 2],
    }
    assert found["files"] == {
        "manifest.json": "changed", "model.safetensors": "changed", "notes.txt": "added", "run.json": "changed",
    }  # fmt: skip
    assert Registry(store).version("tiny@v1").compare(Registry(store).version("tiny@v1"))["facts"] == {}
    assert (
        Registry(store).version("tiny@v2").compare(Registry(store).version("tiny@v1"))["files"]["notes.txt"]
        == "removed"
    )
    flip(
        store,
        blob_key(
            next(
                f.sha256 for f in load_version_manifest(store, "tiny", found["old"]["digest"]).files if "run" in f.path
            )
        ),
    )
    with pytest.raises(DataError, match=r"run\.json"):
        Registry(store).version("tiny@v1").compare(Registry(store).version("tiny@v2"))


def test_events_are_never_collected(store, two):
    Registry(store).collect(grace=NOW, withdrawn=True)
    assert len(store.list_keys(versions_log("tiny").folder)) == len(two)


def _set_listed(store, number, listed):
    """Write a version's event again as an older Ropeway, or a person, would have it: without seals."""
    for each in (1, 2):
        change_event(store, versions_log("tiny"), each)
    key = versions_log("tiny").key(number)
    event = own_fields(store, key)
    event.pop("blobs")
    replace(store, key, canonical_json(event if listed is None else {**event, "blobs": listed}))


def test_an_event_lists_the_blobs_of_its_version(store, two):
    for number, digest in enumerate(two, 1):
        listed = json.loads(store.get(versions_log("tiny").key(number)))["blobs"]
        assert sorted({file.sha256 for file in tiny(store).version(digest).manifest.files}) == listed


def test_a_plan_reads_the_manifests_of_versions_whose_events_list_no_blobs_only(store, two, monkeypatch):
    loaded = []
    real = garbage_collection.load_version_manifests

    def load(store, name, digests):
        loaded.extend(digests)
        return real(store, name, digests)

    monkeypatch.setattr(garbage_collection, "load_version_manifests", load)
    orphan = "blobs/sha256/aa/" + "a" * 64
    store.put_if_absent(orphan, b"orphan")
    for listed, read_digests in (("as published", []), (None, two[:1]), (["no digest"], two[:1])):
        if listed != "as published":
            put_back = own_fields(store, versions_log("tiny").key(1))
            _set_listed(store, 1, listed)
        loaded.clear()
        found = Registry(store).find_garbage(grace=NOW, withdrawn=True)
        assert ({entry.key for entry in found.entries}, loaded) == ({orphan}, read_digests)
        if listed != "as published":
            replace(store, versions_log("tiny").key(1), canonical_json(put_back))


def test_a_collection_deletes_no_blob_of_a_manifest_whatever_an_event_lists(store, two):
    for number in (1, 2):
        _set_listed(store, number, [])
    assert Registry(store).find_garbage(grace=NOW, withdrawn=False).entries
    assert Registry(store).collect(grace=NOW, withdrawn=False).entries == ()
    for digest in two:
        assert store.exists(weights_of(store, digest))
    assert Registry(store).version("tiny@v1").verify().files == 4
