"""What is flushed to disk, and in which order: a name never becomes durable before what it stands for."""

import errno
import os

import pytest

from ropeway.runtime import manifest


@pytest.fixture
def flushed(monkeypatch):
    """Everything flushed, in order; a file with its size at that time."""
    done = []
    monkeypatch.setattr(manifest, "sync_file", lambda path: done.append((path, path.stat().st_size)))
    monkeypatch.setattr(manifest, "sync_folder", done.append)
    return done


def test_a_manifest_is_written_after_all_its_files_and_folders_are_on_disk(tmp_path, flushed, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"1")
    before = []
    monkeypatch.setattr(manifest, "write_json", lambda *_: before.extend(flushed))
    manifest.write_manifest(tmp_path, {})
    assert {(tmp_path / "inner" / "a", 5), (tmp_path / "b", 1), tmp_path / "inner", tmp_path} <= set(before)


def test_a_whole_folder_and_each_new_folder_above_it_are_made_durable(tmp_path, flushed):
    target = tmp_path / "one" / "two" / "result"
    with manifest.whole_folder(target) as folder:
        assert flushed == [tmp_path, tmp_path / "one", tmp_path / "one" / "two"]
        (folder / "a").write_bytes(b"1")
    assert flushed[-1] == target.parent


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_folder_that_the_disk_does_not_flush_is_not_called_durable(tmp_path, monkeypatch, number):
    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        manifest.sync_folder(tmp_path)


def test_a_file_system_that_flushes_no_folders_is_no_error(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    manifest.sync_folder(tmp_path)


def test_a_tree_is_flushed_files_first(tmp_path, flushed):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"12")
    manifest.sync_tree(tmp_path)
    assert flushed[0] == (tmp_path / "inner" / "a", 2)
    assert set(flushed[1:]) == {tmp_path, tmp_path / "inner"}
