"""Listings that show an older state of the bucket, and clocks that are wrong: nothing that is needed is deleted."""

import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest

from ropeway.registry import Registry, garbage_collection, publishing
from ropeway.registry.layout import (
    COLLECTION_MARKER,
    INTENT_SLOTS,
    blob_key,
    intent_key,
    manifest_key,
    tombstone_key,
    versions_log,
)
from ropeway.registry.log import read_events
from ropeway.registry.names import all_models
from ropeway.runtime.errors import RegistryError, TemporaryError
from ropeway.runtime.manifest import canonical_json
from ropeway.storage import open_store
from tests.support.fake_s3 import fake_s3
from tests.support.memory_store import MemoryStore
from tests.support.registry_world import check_whole, make_package, move, put, tiny

PAST = timedelta(seconds=-60)  # a grace period that every object is past
YEAR = timedelta(days=365)


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def published(memory, package) -> str:
    return put(memory, package).digest


def collect(store, **options):
    return Registry(store).collect(grace=PAST, withdrawn=False, **options)


def during_publish(monkeypatch, act) -> None:
    """Run `act` once in the next publish, after its manifest was stored and before its version has a number."""
    real = publishing.load_version_manifest

    def first(*arguments):
        monkeypatch.setattr(publishing, "load_version_manifest", real)
        act()
        return real(*arguments)

    monkeypatch.setattr(publishing, "load_version_manifest", first)


# Listings


def test_a_collection_keeps_the_versions_of_a_model_that_the_listing_leaves_out(memory, package):
    put(memory, package)
    memory.objects = {key: data for key, data in memory.objects.items() if not key.startswith(("models/", "names/"))}
    memory.freeze_listing()  # blobs of a model that is gone, as an interrupted publish leaves them
    put(memory, package, "other")
    assert memory.list_folders("models/") == []
    assert all_models(memory) == ["other"]
    assert collect(memory).entries == ()
    assert Registry(memory).version("other@v1").verify().files == 4


def test_a_collection_keeps_a_version_that_the_listing_leaves_out(memory, published, tmp_path):
    memory.freeze_listing()
    done = put(memory, make_package(tmp_path / "new", b"new"))
    move(memory, done.digest)
    assert [entry.key for entry in collect(memory).entries] == [versions_log("tiny").head_key(1)]  # deleted before
    memory.thaw_listing()
    assert collect(memory).entries == ()
    check_whole(memory)
    assert [version.digest for version in tiny(memory).versions()] == [published, done.digest]


def test_deleted_objects_that_are_still_listed_change_nothing(memory, published):
    orphan = "blobs/sha256/aa/" + "a" * 64
    memory.put_if_absent(orphan, b"orphan")
    memory.freeze_listing()
    assert [entry.key for entry in collect(memory).entries] == [orphan]
    assert [entry.key for entry in collect(memory).entries] == [orphan]
    assert Registry(memory).version("tiny@v1").verify().digest == published


def test_a_collection_keeps_the_objects_of_a_publish_whose_intent_is_not_listed(memory, package, monkeypatch):
    put(memory, package)
    for key in [key for key in memory.objects if key.startswith(("models/", "names/"))]:
        memory.delete(key)  # blobs that no version needs, old enough to be collected
    memory.freeze_listing()
    during_publish(monkeypatch, lambda: collect(memory))
    put(memory, package)
    assert Registry(memory).version("tiny@v1").verify().files == 4


@pytest.mark.usefixtures("published")
def test_a_publish_sees_a_collection_that_is_not_listed(memory, tmp_path, monkeypatch):
    memory.freeze_listing()
    real = garbage_collection.find_garbage

    def publish_first(*arguments, **options):
        with pytest.raises(TemporaryError, match="garbage collection"):
            put(memory, make_package(tmp_path / "new", b"new"))
        return real(*arguments, **options)

    monkeypatch.setattr(garbage_collection, "find_garbage", publish_first)
    collect(memory)
    assert [key for key in memory.objects if key.startswith(("intents/", "collections/"))] == []


def test_intents_and_markers_of_an_older_ropeway_count(memory, published, tmp_path):
    orphan = "blobs/sha256/aa/" + "a" * 64
    memory.put_if_absent(orphan, b"orphan")
    intent = {"name": "tiny", "digest": published, "blobs": [orphan], "at": "now"}
    memory.put_if_absent(f"intents/{'1' * 32}.json", canonical_json(intent))
    assert collect(memory).entries == ()
    memory.put_if_absent(f"collections/{'1' * 32}.json", b"{}")
    with pytest.raises(TemporaryError, match="garbage collection"):
        put(memory, make_package(tmp_path / "new", b"new"))


def test_models_of_an_older_ropeway_are_recorded_by_a_collection(memory, published):
    move(memory, published)
    for key in [key for key in memory.objects if key.startswith("names/")]:
        memory.delete(key)
    collect(memory)
    memory.listed = {}
    assert all_models(memory) == ["tiny"]
    assert list(tiny(memory).aliases()) == []
    with pytest.raises(RegistryError, match="tiny@candidate"):
        tiny(memory).version(published).withdraw(by="ana", reason="old")


def test_a_version_with_an_alias_that_is_not_listed_is_neither_retired_nor_withdrawn(memory, published, tmp_path):
    put(memory, make_package(tmp_path / "new", b"new"))
    assert [version.digest for version in tiny(memory).retirable(1)] == [published]
    memory.freeze_listing()
    move(memory, published, alias="night")
    assert tiny(memory).retirable(1) == []
    with pytest.raises(RegistryError, match="tiny@night"):
        tiny(memory).version(published).withdraw(by="ana", reason="old")
    assert not memory.exists(tombstone_key("tiny", published))


def test_logs_go_on_and_references_are_right_while_the_listing_is_old(memory, published, tmp_path):
    memory.freeze_listing()
    digests = [published, *(put(memory, make_package(tmp_path / name, name.encode())).digest for name in "ab")]
    for number, digest in enumerate(digests, 1):
        assert move(memory, digest).number == number
        assert tiny(memory).alias("candidate").digest == digest
    assert read_events(memory, versions_log("tiny")).digests == digests
    assert tiny(memory).rollback("candidate", by="ana", reason="worse").digest == digests[1]
    assert Registry(memory).version("tiny@candidate").pull(tmp_path / "pulled").created
    memory.thaw_listing()
    check_whole(memory)


def test_a_registry_on_s3_works_on_while_its_listings_are_old(package, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with fake_s3() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        store = open_store("s3://bucket/registry")
        put(store, package)
        server.listed = dict(server.objects)
        done = put(store, make_package(tmp_path / "new", b"new"))
        move(store, done.digest)
        other = put(store, package, "other")
        found = Registry(store).collect(grace=PAST, withdrawn=False)
        assert [entry.key for entry in found.entries] == [versions_log("tiny").head_key(1)]  # deleted before
        assert Registry(store).version("tiny@candidate").pull(tmp_path / "pulled").created
        assert Registry(store).version("other@v1").verify().digest == other.digest
        with pytest.raises(RegistryError, match="tiny@candidate"):
            tiny(store).version(done.digest).withdraw(by="ana", reason="old")
        server.listed = None
        check_whole(store)


@pytest.mark.usefixtures("published")
def test_a_name_that_differs_in_case_is_refused_although_it_is_not_listed(memory, package):
    memory.listed = {}
    with pytest.raises(RegistryError, match="case"):
        put(memory, package, "Tiny")
    assert not memory.exists(versions_log("Tiny").key(1))


# Clocks


@pytest.mark.parametrize("jump", [YEAR, -YEAR])
def test_a_publish_survives_a_collection_after_the_clock_was_set(memory, package, monkeypatch, jump):
    put(memory, package)
    for key in [key for key in memory.objects if key.startswith(("models/", "names/"))]:
        memory.delete(key)

    def collect_by_a_wrong_clock():
        memory.clock_offset = jump
        Registry(memory).collect(grace=timedelta(hours=24), withdrawn=False)

    during_publish(monkeypatch, collect_by_a_wrong_clock)
    with suppress(TemporaryError):
        put(memory, package)
    check_whole(memory)
    put(memory, package)
    assert Registry(memory).version("tiny@v1").verify().files == 4


@pytest.mark.parametrize("collections", [1, 2])
def test_a_publish_taken_for_dead_stops_before_its_version_has_a_number(memory, package, monkeypatch, collections):
    memory.put_if_absent("registry.json", canonical_json({"format": "ropeway-registry/1"}))

    def collect_by_a_wrong_clock():
        memory.clock_offset = YEAR
        for _ in range(collections):
            collect(memory)

    during_publish(monkeypatch, collect_by_a_wrong_clock)
    with pytest.raises(TemporaryError, match="clocks"):
        put(memory, package)
    assert read_events(memory, versions_log("tiny")).digests == []
    assert put(memory, package).number == 1
    check_whole(memory)


def test_a_publish_stores_again_what_was_collected_after_its_last_check(memory, package, monkeypatch):
    real = publishing.append_event

    def append_late(*arguments, **options):
        memory.clock_offset = YEAR
        collect(memory)
        collect(memory)
        return real(*arguments, **options)

    monkeypatch.setattr(publishing, "append_event", append_late)
    put(memory, package)
    check_whole(memory)


def test_no_object_is_collected_by_a_clock_of_a_year_ago(memory, published):
    memory.put_if_absent("blobs/sha256/aa/" + "a" * 64, b"orphan")
    memory.clock_offset = -YEAR
    assert Registry(memory).collect(grace=timedelta(hours=24), withdrawn=False).entries == ()
    assert Registry(memory).version(f"tiny@{published}").verify().files == 4


def test_a_collection_whose_marker_is_gone_deletes_nothing_more(memory, published, monkeypatch):
    orphans = [f"blobs/sha256/aa/{digit * 64}" for digit in "abc"]
    for key in orphans:
        memory.put_if_absent(key, b"orphan")
    monkeypatch.setattr(garbage_collection, "_RECHECK_SECONDS", -1.0)
    delete = memory.delete

    def fence(key):
        delete(key)
        delete(COLLECTION_MARKER)

    monkeypatch.setattr(memory, "delete", fence)
    with pytest.raises(TemporaryError, match=r"running\.json was removed"):
        collect(memory)
    assert [memory.exists(key) for key in orphans] == [False, True, True]
    assert published


@pytest.mark.parametrize("clock", ["monotonic", "time"])
@pytest.mark.parametrize("jump", [YEAR.total_seconds(), -YEAR.total_seconds()])
def test_a_collection_stops_when_one_of_its_clocks_is_past_the_limit(memory, published, monkeypatch, clock, jump):
    orphan = "blobs/sha256/aa/" + "a" * 64
    memory.put_if_absent(orphan, b"orphan")
    real, find = getattr(time, clock), garbage_collection.find_garbage

    def jump_first(*arguments, **options):
        monkeypatch.setattr(garbage_collection.time, clock, lambda: real() + jump)
        return find(*arguments, **options)

    monkeypatch.setattr(garbage_collection, "find_garbage", jump_first)
    with pytest.raises(TemporaryError, match="limit"):
        collect(memory)
    assert memory.exists(orphan)
    assert not memory.exists(COLLECTION_MARKER)
    assert published


@pytest.mark.usefixtures("published")
def test_one_collection_runs_at_a_time_and_a_dead_one_is_replaced(memory, package):
    memory.put_if_absent(COLLECTION_MARKER, b"{}")
    with pytest.raises(TemporaryError, match="another garbage collection"):
        collect(memory)
    assert memory.exists(COLLECTION_MARKER)
    memory.times[COLLECTION_MARKER] = datetime.now(UTC) - publishing.COLLECTION_TTL
    collect(memory)
    assert not memory.exists(COLLECTION_MARKER)
    memory.put_if_absent(COLLECTION_MARKER, b"{}")
    memory.times[COLLECTION_MARKER] = datetime.now(UTC) - publishing.COLLECTION_TTL
    assert put(memory, package).number == 1
    assert not memory.exists(COLLECTION_MARKER)


def test_a_publish_needs_a_free_slot_and_a_failed_one_frees_its_own(memory, package, published, monkeypatch):
    for slot in range(INTENT_SLOTS - 1):
        memory.put_if_absent(intent_key(slot), b"{}")

    def fail():
        assert memory.exists(intent_key(INTENT_SLOTS - 1))
        raise TemporaryError("the network is down")

    during_publish(monkeypatch, fail)
    with pytest.raises(TemporaryError, match="network"):
        put(memory, package)
    assert not memory.exists(intent_key(INTENT_SLOTS - 1))
    memory.put_if_absent(intent_key(INTENT_SLOTS - 1), b"{}")
    with pytest.raises(TemporaryError, match="slots"):
        put(memory, package)
    assert memory.exists(manifest_key("tiny", published))
    assert all(memory.exists(blob_key(file.sha256)) for file in Registry(memory).version("tiny@v1").manifest.files)
