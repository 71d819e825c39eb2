"""What is flushed to disk, and in which order: a name never becomes durable before what it stands for."""

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


def test_a_tree_is_flushed_files_first(tmp_path, flushed):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"12")
    manifest.sync_tree(tmp_path)
    assert flushed[0] == (tmp_path / "inner" / "a", 2)
    assert set(flushed[1:]) == {tmp_path, tmp_path / "inner"}
