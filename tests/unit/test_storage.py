import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ropeway.errors import ConfigError, DataError, TemporaryError
from ropeway.storage import MAX_DOCUMENT_BYTES, AbsentError, FileStore, Store, open_store

HOSTILE_KEYS = [
    "", "/etc/passwd", "../x", "a/../b", "a//b", "a/", "./a", "a/./b", "a\\b", "a\0b", ".partial/x", "a/.hidden", "a b",
    "C:x", "a/b.", "é", "x" * 241, "a\n",
]  # fmt: skip


@pytest.fixture
def store(tmp_path) -> Store:
    return open_store((tmp_path / "store").as_uri())


def left_aside(store: FileStore) -> list[Path]:
    return list((store.root / ".partial").glob("*"))


def test_what_is_put_can_be_got_streamed_sized_and_listed(store, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"0123456789")
    assert store.put_if_absent("a/b/blob", source, sha256=hashlib.sha256(b"0123456789").hexdigest())
    assert store.put_if_absent("a/b.json", b"{}")
    assert store.get("a/b/blob") == b"0123456789"
    assert store.size("a/b/blob") == 10
    with store.open_stream("a/b/blob", start_byte=7) as stream:
        assert stream.read() == b"789"
    assert store.list_keys("") == ["a/b.json", "a/b/blob"]
    assert store.list_keys("a/b/") == ["a/b/blob"]
    assert store.list_folders("a/") == ["b"]
    assert store.list_keys("nothing/") == store.list_folders("nothing/") == []
    assert left_aside(store) == []


def test_nothing_is_ever_overwritten_and_stored_files_are_read_only(store):
    assert store.put_if_absent("key", b"first")
    assert not store.put_if_absent("key", b"second")
    assert store.get("key") == b"first"
    assert (store.root / "key").stat().st_mode & 0o222 == 0


def test_of_many_racing_writers_exactly_one_wins_each_key(store):
    def write(writer: int) -> list[bool]:
        return [store.put_if_absent(f"log/{n}", f"{writer}".encode()) for n in range(40)]

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    for n in range(40):
        winners = [writer for writer in range(8) if won[writer][n]]
        assert len(winners) == 1
        assert store.get(f"log/{n}") == str(winners[0]).encode()
    assert left_aside(store) == []


def test_a_writer_that_loses_between_looking_and_linking_is_told_so(store, monkeypatch):
    link = os.link

    def link_late(source, target):
        Path(target).write_bytes(b"theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", link_late)
    assert not store.put_if_absent("key", b"ours")
    assert store.get("key") == b"theirs"
    assert left_aside(store) == []


def test_bytes_that_hash_to_something_else_never_become_visible(store):
    with pytest.raises(DataError, match="expected 000000000000"):
        store.put_if_absent("key", b"bytes", sha256="0" * 64)
    assert not store.exists("key")
    assert left_aside(store) == []


def test_absent_keys_are_told_from_other_failures(store):
    for read in (store.get, store.size, store.open_stream):
        with pytest.raises(AbsentError, match="holds no a/b"):
            read("a/b")
    assert not store.exists("a/b")
    store.delete("a/b")
    store.put_if_absent("a", b"")
    assert not store.exists("a/b")
    with pytest.raises(AbsentError):
        store.get("a/b")


@pytest.mark.parametrize("key", HOSTILE_KEYS)
def test_hostile_keys_are_refused_by_every_method(store, key):
    for method in (store.get, store.size, store.open_stream, store.exists, store.delete):
        with pytest.raises(DataError, match="store key"):
            method(key)
    with pytest.raises(DataError, match="store key"):
        store.put_if_absent(key, b"x")
    assert not store.root.exists()


def test_a_missing_source_and_an_oversized_document_are_named(store, tmp_path):
    with pytest.raises(DataError, match="expected a file to store as key"):
        store.put_if_absent("key", tmp_path / "none")
    with (tmp_path / "big").open("wb") as file:
        file.truncate(MAX_DOCUMENT_BYTES + 1)
    store.put_if_absent("key", tmp_path / "big")
    with pytest.raises(DataError, match="larger than"):
        store.get("key")


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [(errno.ENOSPC, TemporaryError, "disk is full"), (errno.EPERM, ConfigError, "hard links")],
)
def test_a_file_system_that_fails_is_explained_and_leaves_nothing(store, monkeypatch, code, error, words):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(error, match=words):
        store.put_if_absent("a/key", b"x")
    assert store.list_keys("") == []
    assert left_aside(store) == []


@pytest.mark.parametrize(
    "url", ["registry", "/srv/registry", "file:registry", "file://host/x", "http://x/y", "file:///a?b", "file:///a%00b"]
)
def test_urls_that_name_no_folder_are_refused(url):
    with pytest.raises(ConfigError, match=r"file:///absolute/path"):
        open_store(url)


def test_s3_is_refused_in_words_and_a_file_is_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="folder only"):
        open_store("s3://bucket/prefix")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="found a file"):
        open_store((tmp_path / "file").as_uri())


def test_opening_a_store_creates_nothing_and_urls_are_unquoted(tmp_path):
    store = open_store((tmp_path / "with space").as_uri())
    assert list(tmp_path.iterdir()) == []
    store.put_if_absent("key", b"")
    assert (tmp_path / "with space" / "key").exists()


def test_what_is_there_already_is_not_read_again(store, tmp_path):
    store.put_if_absent("key", b"first")
    (tmp_path / "other").write_bytes(b"other")
    assert not store.put_if_absent("key", tmp_path / "other", sha256="0" * 64)
