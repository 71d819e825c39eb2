import json

import pytest

from ropeway.registry import ANY, Registry
from ropeway.registry.aliases import plan_promotion, plan_rollback
from ropeway.registry.layout import blob_key, manifest_key, tombstone_key
from ropeway.registry.version_manifest import load_version_manifest, package_digest
from ropeway.runtime.errors import ConfigError, DataError, NotFoundError, RegistryError
from ropeway.runtime.manifest import canonical_json
from tests.support.registry_world import flip, is_untouched, make_package, move, put, tiny


@pytest.fixture
def three(fill) -> list[str]:
    """Return the digests of the three versions in `store`."""
    return fill(3)


def test_publish_writes_the_keys_of_the_layout(store, package):
    done = put(store, package)
    document = store.get(f"models/tiny/manifests/{done.digest}.json")
    core = json.loads(document)
    assert document == canonical_json(core)
    assert set(core) == {"format", "name", "files", "facts"}
    assert core["facts"] == {"kind": "package"}
    assert [file["path"] for file in core["files"]] == [
        "config.json", "manifest.json", "model.safetensors", "plots/loss.svg",
    ]  # fmt: skip
    for file in core["files"]:
        key = f"blobs/sha256/{file['sha256'][:2]}/{file['sha256']}"
        assert store.get(key) == (package / file["path"]).read_bytes()
    assert json.loads(store.get("models/tiny/versions/00000001.json"))["digest"] == done.digest
    assert json.loads(store.get("registry.json")) == {"format": "ropeway-registry/1"}
    assert store.list_keys("intents/") == []


def test_equal_packages_are_one_version(store, package, tmp_path):
    first = put(store, package)
    again = tiny(store).publish(package, provenance={"git": "other"}, attachments={})
    copy = put(store, make_package(tmp_path / "elsewhere"))
    assert (first.number, first.created, str(first)) == (1, True, "tiny@v1")
    assert (again.digest, again.number, again.created) == (first.digest, 1, False)
    assert (copy.digest, copy.number) == (first.digest, 1)
    assert len(store.list_keys("models/tiny/versions/")) == 1


def test_the_digest_depends_on_bytes_facts_and_name_only(store, package, tmp_path):
    digest = package_digest(package, "tiny")
    assert not tiny(store).find(digest)
    assert is_untouched(store)
    assert put(store, package).digest == digest
    assert tiny(store).find(digest)
    others = [
        package_digest(package, "other"),
        package_digest(make_package(tmp_path / "a", b"other"), "tiny"),
        package_digest(make_package(tmp_path / "b", steps=3319), "tiny"),
    ]
    assert len({digest, *others}) == 4
    assert not Registry(store).artifact("other").find(others[0])


def test_provenance_and_attachments_do_not_change_the_digest(store, package, tmp_path):
    lock = tmp_path / "dvc.lock"
    lock.write_text("schema: '2.0'\n")
    done = tiny(store).publish(package, provenance={"git": "abc", "seconds": 1.5}, attachments={"dvc.lock": lock})
    event = json.loads(store.get("models/tiny/versions/00000001.json"))
    assert done.digest == package_digest(package, "tiny")
    assert event["provenance"] == {"git": "abc", "seconds": 1.5}
    assert store.get(blob_key(event["attachments"]["dvc.lock"]["sha256"])) == lock.read_bytes()
    assert Registry(store).version("tiny@v1").verify().files == 5


def test_every_kind_of_reference_resolves(store, three):
    move(store, three[1])
    assert [Registry(store).version(f"tiny@v{n}").digest for n in (1, 2, 3)] == three
    assert Registry(store).version("tiny@3").digest == three[2]
    assert Registry(store).version("tiny@candidate").digest == three[1]
    assert (
        Registry(store).version(f"tiny@{three[0]}").digest
        == Registry(store).version(f"tiny@{three[0][:8]}").digest
        == three[0]
    )


@pytest.mark.parametrize("reference", ["tiny@v9", "tiny@v0", "tiny@production", "other@v1", f"tiny@{'0' * 64}"])
@pytest.mark.usefixtures("three")
def test_an_unknown_reference_lists_what_exists(store, reference):
    with pytest.raises(
        RegistryError, match="v1 to v3; aliases: none" if "tiny" in reference else "no version of other"
    ):
        Registry(store).version(reference)


@pytest.mark.parametrize("reference", ["tiny", "@v1", "tiny@", "tiny@../x", "a/b@v1", "tiny@V1", "tiny@abcdefABCDEF"])
def test_a_malformed_reference_is_rejected_with_an_example(store, reference):
    with pytest.raises(ConfigError, match="laptop@candidate"):
        Registry(store).version(reference)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "x.", "a..b", "a b", "x" * 65, "a\0"])
def test_an_invalid_model_name_is_rejected_before_any_write(store, package, name):
    with pytest.raises(ConfigError, match="model name"):
        put(store, package, name)
    assert is_untouched(store)


def test_a_model_name_that_differs_only_in_case_is_rejected(store, package):
    put(store, package, "tiny")
    with pytest.raises(RegistryError, match="Tiny: model tiny exists"):
        put(store, package, "Tiny")


def test_an_empty_store_and_a_newer_registry_have_different_errors(store, package):
    with pytest.raises(RegistryError, match="ROPEWAY_REGISTRY"):
        Registry(store).version("tiny@v1")
    store.put_if_absent("registry.json", b'{"format":"ropeway-registry/2"}')
    with pytest.raises(RegistryError, match=r"ropeway-registry/2.*expected format ropeway-registry/1"):
        put(store, package)


def test_a_file_changed_after_the_manifest_fails_the_publish_before_any_write(store, package):
    (package / "config.json").write_text("[]")
    with pytest.raises(DataError, match="changed after it was written"):
        put(store, package)
    (package / "config.json").unlink()
    with pytest.raises(DataError, match="missing"):
        put(store, package)
    assert is_untouched(store)


def test_a_corrupt_blob_or_manifest_in_the_store_fails_the_publish(store, package):
    digest = put(store, package).digest
    for key in (manifest_key("tiny", digest), blob_key(load_version_manifest(store, "tiny", digest).files[0].sha256)):
        flip(store, key)
        with pytest.raises(DataError, match="hashes to"):
            put(store, package)
        flip(store, key)
    assert not put(store, package).created


def test_provenance_that_is_not_json_is_rejected_before_any_write(store, package):
    for value in ({"at": object()}, {"loss": float("nan")}):
        with pytest.raises(DataError, match="JSON"):
            tiny(store).publish(package, provenance=value, attachments={})
    assert is_untouched(store)


def test_an_alias_log_records_digest_author_and_reason(store, three):
    assert tiny(store).alias("candidate").digest is None
    for digest in three:
        assert move(store, digest, expect=tiny(store).alias("candidate").digest).moved
    history = tiny(store).alias("candidate").events
    assert [event["digest"] for event in history] == three
    assert [event["prev"] for event in history] == [None, *three[:2]]
    assert all(set(event) == {"digest", "prev", "by", "identity", "reason", "review", "at"} for event in history)
    assert tiny(store).aliases() == {"candidate": three[2]}


def test_a_stale_expected_digest_is_rejected_with_the_current_one(store, three):
    move(store, three[0], expect=None)
    for stale in (None, three[1]):
        with pytest.raises(RegistryError, match=f"points to {three[0]}"):
            move(store, three[2], expect=stale)
    assert tiny(store).alias("candidate").digest == three[0]
    assert len(tiny(store).alias("candidate").events) == 1


def test_promoting_the_current_version_adds_no_event(store, three):
    move(store, three[0], expect=None)
    assert not move(store, three[0]).moved
    assert not move(store, three[0], expect=three[0]).moved
    assert not move(store, three[0], expect=None).moved, "a retry after a lost response"
    with pytest.raises(RegistryError, match=f"points to {three[0]}, expected no version"):
        tiny(store).version(three[0]).promote("candidate", expect=None, by="somebody else", reason="it was time")
    assert len(tiny(store).alias("candidate").events) == 1


def test_a_promotion_stores_its_review(store, three):
    review = {"decision": "approve", "reviewer": "ana", "comment": "reads well"}
    tiny(store).version(three[0]).promote("production", expect=None, by="ana", reason="approved", review=review)
    assert tiny(store).alias("production").events[0]["review"] == review


def test_a_withdrawn_version_cannot_be_promoted(store, three):
    store.put_if_absent(tombstone_key("tiny", three[1]), b"{}")
    with pytest.raises(RegistryError, match="withdrawn"):
        move(store, three[1])
    assert tiny(store).alias("candidate").digest is None


def test_a_version_without_a_number_or_a_blob_cannot_be_promoted(store, three):
    with pytest.raises(RegistryError, match="no version 000000000000… of tiny"):
        move(store, "0" * 64)
    store.delete("models/tiny/versions/00000003.json")
    with pytest.raises(RegistryError, match="has no version number"):
        move(store, three[2])
    key = blob_key(next(f.sha256 for f in load_version_manifest(store, "tiny", three[0]).files if "model" in f.path))
    truncated = store.get(key)[:-1]
    store.delete(key)
    with pytest.raises(RegistryError, match=r"incomplete.*model\.safetensors: .* is missing"):
        move(store, three[0])
    store.put_if_absent(key, truncated)
    sizes = f"{len(truncated)} bytes, expected {len(truncated) + 1}"
    with pytest.raises(RegistryError, match=rf"incomplete.*model\.safetensors: .* has {sizes}"):
        move(store, three[0])


def test_a_promotion_that_loses_a_race_fails_or_is_planned_again(store, three, monkeypatch):
    put_if_absent = store.put_if_absent

    def lose_race(key, data, *, sha256=None):
        monkeypatch.undo()
        move(store, three[1])
        return put_if_absent(key, data, sha256=sha256)

    monkeypatch.setattr(store, "put_if_absent", lose_race)
    with pytest.raises(RegistryError, match=f"points to {three[1]}, expected no version"):
        move(store, three[0], expect=None)
    move(store, three[2])
    monkeypatch.setattr(store, "put_if_absent", lose_race)
    assert move(store, three[0]).prev == three[1]
    assert [event["digest"] for event in tiny(store).alias("candidate").events] == [
        three[1], three[2], three[1], three[0],
    ]  # fmt: skip


@pytest.mark.parametrize("alias", ["", "v3", "3", "Production", "a", "../x", "deadbeef", "x" * 51, "a b"])
def test_an_ambiguous_alias_name_is_rejected(store, three, alias):
    with pytest.raises(ConfigError, match="alias"):
        move(store, three[0], alias=alias)


@pytest.mark.parametrize("text", ["", "  ", "\x1b[2J", "x" * 2001])
def test_a_promotion_needs_a_printable_name_and_reason(store, three, text):
    with pytest.raises(ConfigError, match="reason is"):
        tiny(store).version(three[0]).promote("candidate", expect=ANY, by="a test", reason=text)


def test_a_second_rollback_goes_one_version_further_back(store, three):
    for digest in three:
        move(store, digest)
    assert tiny(store).rollback("candidate", by="a test", reason="worse").digest == three[1]
    assert tiny(store).rollback("candidate", by="a test", reason="worse too").digest == three[0]
    with pytest.raises(RegistryError, match="no earlier version"):
        tiny(store).rollback("candidate", by="a test", reason="and now")
    prevs = [event["prev"] for event in tiny(store).alias("candidate").events]
    assert prevs == [None, three[0], three[1], three[2], three[1]]


def test_a_rollback_with_a_stale_digest_or_no_alias_is_rejected(store, three):
    with pytest.raises(NotFoundError, match="no such alias"):
        tiny(store).rollback("candidate", by="a test", reason="x")
    for digest in three:
        move(store, digest)
    with pytest.raises(RegistryError, match=f"points to {three[2]}"):
        tiny(store).rollback("candidate", by="a test", reason="x", expect=three[0])


@pytest.mark.parametrize(
    ("path", "target"), [("ab", "a"), ("abc", "b"), ("abcb", "a"), ("abcbd", "b"), ("abac", "a"), ("abb", "a")]
)
def test_plan_rollback_treats_a_return_as_a_rollback(path, target):
    assert plan_rollback(path, where="x") == target


def test_plan_promotion_is_a_function_of_the_events():
    promotion = {"digest": "b", "by": "x", "reason": "y", "review": None}
    last = {"digest": "a", "prev": None, "by": "x", "reason": "y", "review": None}
    assert plan_promotion([], promotion, None, where="x")["prev"] is None
    assert plan_promotion([last], promotion, "a", where="x")["prev"] == "a"
    assert plan_promotion([last], {**promotion, "digest": "a"}, ANY, where="x") == 1


def test_a_missing_event_and_a_malformed_event_are_named(store, three):
    store.delete("models/tiny/versions/00000002.json")
    with pytest.raises(DataError, match=r"00000002.json is missing"):
        Registry(store).version("tiny@v3").verify()
    for key in store.list_keys("models/tiny/heads/"):
        store.delete(key)
    with pytest.raises(DataError, match=r"00000002.json is missing"):
        tiny(store).find(three[2])
    for document in (b"{", b"[]", b'{"digest":1}', canonical_json({"digest": three[1]}), b"[" * 100_000):
        store.put_if_absent("models/tiny/versions/00000002.json", document)
        with pytest.raises(DataError, match=r"00000002\.json is not a valid event"):
            tiny(store).find(three[2])
        store.delete("models/tiny/versions/00000002.json")


def test_an_event_missing_from_a_listing_is_found(store, three, monkeypatch):
    for key in store.list_keys("models/tiny/heads/"):
        store.delete(key)
    listed = store.list_keys
    monkeypatch.setattr(store, "list_keys", lambda prefix: [key for key in listed(prefix) if "00000002" not in key])
    assert Registry(store).version(f"tiny@{three[2]}").digest == three[2]
