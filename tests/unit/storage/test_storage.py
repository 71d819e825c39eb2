"""Behavior of both stores; test_storage_folder.py and test_storage_s3.py test what only one of them does."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from ropeway.runtime.errors import ConfigError, DataError
from ropeway.storage import MAX_DOCUMENT_BYTES, NotFoundError, open_store

HOSTILE_KEYS = [
    "", "/etc/passwd", "../x", "a/../b", "a//b", "a/", "./a", "a/./b", "a\\b", "a\0b", ".partial/x", "a/.hidden", "a b",
    "C:x", "a/b.", "é", "x" * 241, "a\n",
]  # fmt: skip


def test_a_stored_object_can_be_read_streamed_and_listed(store, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"0123456789")
    assert store.put_if_absent("a/b/blob", source, sha256=hashlib.sha256(b"0123456789").hexdigest())
    assert store.put_if_absent("a/b.json", b"{}")
    assert store.get("a/b/blob") == b"0123456789"
    assert store.size("a/b/blob") == 10
    with store.open_stream("a/b/blob", start_byte=7) as stream:
        assert stream.read() == b"789"
    assert [store.read_range("a/b/blob", *span) for span in ((0, 3), (7, 9), (2, 0))] == [b"012", b"789", b""]
    assert store.list_keys("") == ["a/b.json", "a/b/blob"]
    assert store.list_keys("a/b/") == ["a/b/blob"]
    assert store.list_folders("a/") == ["b"]
    assert store.list_folders("") == ["a"]
    assert store.list_keys("nothing/") == store.list_folders("nothing/") == []
    assert store.list_incomplete_uploads() == []


def test_a_listing_has_sizes_and_modification_times(store):
    store.put_if_absent("a/b", b"12345")
    (entry,) = store.list_entries("a/")
    assert (entry.key, entry.bytes) == ("a/b", 5)
    assert abs(datetime.now(UTC) - entry.modified_at) < timedelta(minutes=5)


def test_an_empty_object_and_the_end_of_an_object_read_as_empty(store):
    store.put_if_absent("empty", b"")
    store.put_if_absent("full", b"123")
    assert store.get("empty") == b""
    for key, start in (("empty", 0), ("full", 3)):
        with store.open_stream(key, start_byte=start) as stream:
            assert stream.read() == b""


def test_nothing_is_ever_overwritten(store, tmp_path):
    assert store.put_if_absent("key", b"first")
    assert not store.put_if_absent("key", b"second")
    (tmp_path / "third").write_bytes(b"third")
    assert not store.put_if_absent("key", tmp_path / "third")
    assert store.get("key") == b"first"


def test_of_many_concurrent_writers_exactly_one_creates_each_key(store):
    def write(writer: int) -> list[bool]:
        return [store.put_if_absent(f"log/{n}", f"{writer}".encode()) for n in range(20)]

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    for n in range(20):
        winners = [writer for writer in range(8) if won[writer][n]]
        assert len(winners) == 1
        assert store.get(f"log/{n}") == str(winners[0]).encode()
    assert store.list_incomplete_uploads() == []


def test_data_with_another_hash_never_becomes_visible(store, tmp_path):
    (tmp_path / "file").write_bytes(b"bytes")
    for data in (b"bytes", tmp_path / "file"):
        with pytest.raises(DataError, match="expected 000000000000"):
            store.put_if_absent("key", data, sha256="0" * 64)
    assert not store.exists("key")
    assert store.list_incomplete_uploads() == []


def test_an_absent_key_raises_absent_error(store):
    for read in (store.get, store.size, store.open_stream):
        with pytest.raises(NotFoundError, match="no object a/b"):
            read("a/b")
    assert not store.exists("a/b")
    store.delete("a/b")
    store.put_if_absent("a", b"")
    assert not store.exists("a/b")
    with pytest.raises(NotFoundError):
        store.get("a/b")


def test_every_method_rejects_hostile_keys(store):
    for key in HOSTILE_KEYS:
        for method in (store.get, store.size, store.open_stream, store.exists, store.delete):
            with pytest.raises(DataError, match="store key"):
                method(key)
        with pytest.raises(DataError, match="store key"):
            store.put_if_absent(key, b"x")
    for prefix in ("a", "../", "/", "a//"):
        for method in (store.list_keys, store.list_folders):
            with pytest.raises(DataError, match=r"store (key|prefix)"):
                method(prefix)
    assert store.list_keys("") == []


def test_a_missing_source_and_an_oversized_document_are_named(store, tmp_path):
    with pytest.raises(DataError, match="expected a file to store as key"):
        store.put_if_absent("key", tmp_path / "none")
    with (tmp_path / "big").open("wb") as file:
        file.truncate(MAX_DOCUMENT_BYTES + 1)
    store.put_if_absent("key", tmp_path / "big")
    with pytest.raises(DataError, match="larger than"):
        store.get("key")


def test_put_of_an_existing_key_does_not_read_the_file(store, tmp_path):
    store.put_if_absent("key", b"first")
    (tmp_path / "other").write_bytes(b"other")
    assert not store.put_if_absent("key", tmp_path / "other", sha256="0" * 64)


def test_a_deleted_object_can_be_created_again(store):
    store.put_if_absent("a/key", b"first")
    store.delete("a/key")
    assert not store.exists("a/key")
    assert store.list_keys("") == []
    assert store.put_if_absent("a/key", b"second")


def test_on_bytes_reports_progress(store, tmp_path):
    told = []
    store.on_bytes = told.append
    (tmp_path / "file").write_bytes(b"x" * 3000)
    store.put_if_absent("key", tmp_path / "file")
    assert sum(told) == 3000


@pytest.mark.parametrize(
    "url", ["registry", "/srv/registry", "file:registry", "file://host/x", "http://x/y", "file:///a?b", "file:///a%00b"]
)
def test_urls_of_other_schemes_are_rejected(url):
    with pytest.raises(ConfigError, match=r"file:///absolute/path or s3://bucket/prefix"):
        open_store(url)


@pytest.mark.parametrize("url", ["s3://", "s3://A/b", "s3://KEY:hunter2@bucket/x", "https://KEY:hunter2@host/x"])
def test_malformed_s3_urls_are_rejected_without_showing_credentials(url):
    with pytest.raises(ConfigError, match="expected") as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)
