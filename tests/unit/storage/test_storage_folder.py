"""Behavior of the folder store: read-only files, no leftover partial files, translated file system errors."""

import errno
import io
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ropeway.runtime.errors import ConfigError, DataError, NotFoundError, TemporaryError
from ropeway.storage import FileStore, IncompleteUpload, open_store
from ropeway.storage.folder import _File


@pytest.fixture
def folder(tmp_path) -> FileStore:
    return open_store((tmp_path / "store").as_uri())


def partial_files(store: FileStore) -> list[Path]:
    return list((store.root / ".partial").glob("*"))


def test_stored_files_are_read_only(folder):
    folder.put_if_absent("key", b"first")
    assert (folder.root / "key").stat().st_mode & 0o222 == 0


def test_a_writer_that_loses_the_race_returns_false(folder, monkeypatch):
    link = os.link

    def link_late(source, target, **folders):
        (folder.root / target).write_bytes(b"theirs")
        link(source, target, **folders)

    monkeypatch.setattr(os, "link", link_late)
    assert not folder.put_if_absent("key", b"ours")
    assert folder.get("key") == b"theirs"
    assert partial_files(folder) == []


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [(errno.ENOSPC, TemporaryError, "disk is full"), (errno.EPERM, ConfigError, "hard links")],
)
def test_a_file_system_error_is_translated_and_writes_nothing(folder, monkeypatch, code, error, words):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(error, match=words):
        folder.put_if_absent("a/key", b"x")
    assert folder.list_keys("") == []
    assert partial_files(folder) == []


def test_a_file_is_rejected_as_a_store(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="found a file"):
        open_store((tmp_path / "file").as_uri())


def test_open_store_creates_nothing_and_unquotes_the_url(tmp_path):
    store = open_store((tmp_path / "with space").as_uri())
    assert not store.exists("key")
    assert list(tmp_path.iterdir()) == []
    store.put_if_absent("key", b"")
    assert (tmp_path / "with space" / "key").exists()


def test_an_incomplete_upload_is_listed_and_removed(folder):
    folder.put_if_absent("key", b"")
    (folder.root / ".partial" / "dead").write_bytes(b"half")
    (upload,) = folder.list_incomplete_uploads()
    assert upload.name == ".partial/dead"
    folder.remove_incomplete_upload(upload)
    folder.remove_incomplete_upload(upload)
    assert folder.list_incomplete_uploads() == []
    assert folder.get("key") == b""


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux")
def test_a_read_error_in_the_middle_of_an_object_names_the_object(folder):
    """Reading the memory at address 0 is a real input/output error."""
    file = _File(os.open("/proc/self/mem", os.O_RDONLY), lambda: folder._translate_errors("a/b"))
    with io.BufferedReader(file) as stream, pytest.raises(ConfigError, match="Input/output error at a/b"):
        stream.read(10)


def test_an_object_is_read_from_its_middle_on(folder):
    folder.put_if_absent("a/b", bytes(300_000) + b"end")
    with folder.open_stream("a/b", start_byte=299_999) as stream:
        assert (stream.read(2), stream.read()) == (b"\0e", b"nd")


def test_a_write_whose_unfinished_file_was_collected_can_be_repeated(folder, monkeypatch):
    link = os.link

    def collect_first(source, target, **folders):
        monkeypatch.undo()
        for upload in folder.list_incomplete_uploads():  # by a clock that is a year ahead
            folder.remove_incomplete_upload(upload)
        link(source, target, **folders)

    monkeypatch.setattr(os, "link", collect_first)
    with pytest.raises(TemporaryError, match="clocks"):
        folder.put_if_absent("key", b"x")
    assert folder.put_if_absent("key", b"x")


@pytest.fixture
def victim(tmp_path) -> Path:
    """Files of someone else, which no link may lead to."""
    place = tmp_path / "victim"
    place.mkdir()
    (place / "thesis").write_bytes(b"precious")
    return place


@pytest.mark.parametrize("link", ["logs", "logs/inner", "logs/inner/thesis"])
def test_a_link_below_the_root_is_refused_by_name_and_leads_nowhere(folder, victim, link):
    folder.put_if_absent("other", b"")
    place = folder.root / link
    place.parent.mkdir(parents=True, exist_ok=True)
    target = {"logs": victim.parent, "logs/inner": victim, "logs/inner/thesis": victim / "thesis"}[link]
    if link == "logs":
        victim.rename(victim.with_name("inner"))
        victim = victim.with_name("inner")
    place.symlink_to(target)
    key = "logs/inner/thesis"
    acts = [
        lambda: folder.put_if_absent(key, b"x"),
        lambda: folder.get(key),
        lambda: folder.exists(key),
        lambda: folder.size(key),
        lambda: folder.delete(key),
        lambda: folder.list_entries(""),
    ]
    if link != key:
        acts += [
            lambda: folder.put_if_absent("logs/inner/new", b"x"),
            lambda: folder.list_names("logs/inner/", ""),
            lambda: folder.first_key("logs/inner/"),
        ]
    for act in acts:
        with pytest.raises(DataError, match=f"'{link}' is a symbolic link"):
            act()
    with pytest.raises(DataError, match=link):
        folder.list_folders(link.rpartition("/")[0] + "/" if "/" in link else "")
    assert [path.name for path in victim.iterdir()] == ["thesis"]
    assert (victim / "thesis").read_bytes() == b"precious"


def test_a_link_instead_of_the_partial_folder_is_refused(folder, victim):
    folder.put_if_absent("key", b"")
    (upload,) = [IncompleteUpload(".partial/thesis", datetime.now(UTC), ".partial/thesis")]
    (folder.root / ".partial").rmdir()
    (folder.root / ".partial").symlink_to(victim)
    for act in (
        folder.list_incomplete_uploads,
        lambda: folder.remove_incomplete_upload(upload),
        lambda: folder.put_if_absent("new", b"x"),
    ):
        with pytest.raises(DataError, match=r"'\.partial' is a symbolic link"):
            act()
    assert [path.name for path in victim.iterdir()] == ["thesis"]


def test_the_root_can_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    store = open_store((tmp_path / "store").as_uri())
    store.put_if_absent("a/key", b"x")
    assert store.list_keys("") == ["a/key"]
    assert (tmp_path / "disk" / "a" / "key").read_bytes() == b"x"


def test_a_named_pipe_is_refused_and_a_folder_is_no_object(folder):
    folder.put_if_absent("a/b/key", b"x")
    os.mkfifo(folder.root / "a" / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        folder.get("a/pipe")
    with pytest.raises(NotFoundError):
        folder.get("a/b")
    assert not folder.exists("a/b")
