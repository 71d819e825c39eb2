"""What a power loss leaves in DVC's cache, and what the next start of the machine does about it."""

import hashlib
import json
import os

import pytest

from ropeway.orchestration import dvc_recovery as recovery
from ropeway.runtime.errors import TemporaryError


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.setattr(recovery.graph, "cache_folder", lambda root: root / ".dvc" / "cache")
    restart(monkeypatch, "first")
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    return tmp_path


def restart(monkeypatch, boot):
    monkeypatch.setattr(recovery, "read_boot", lambda: boot)


def put(root, data, suffix=""):
    name = hashlib.md5(data, usedforsecurity=False).hexdigest() + suffix
    path = root / ".dvc" / "cache" / "files" / "md5" / name[:2] / name[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o444)
    return path


def spoil(path, data=b""):
    at = path.stat().st_mtime_ns
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)
    os.utime(path, ns=(at, at))


def lock(root, name, **outs):
    entries = [{"path": path, "md5": md5} for path, md5 in outs.items()]
    (root / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": {name: {"outs": entries}}}))


def test_objects_that_a_power_loss_damaged_are_removed_and_whole_ones_stay(workspace, monkeypatch):
    assert recovery.repair(workspace) == []
    empty, zeros, whole = put(workspace, b"one"), put(workspace, b"two"), put(workspace, b"three")
    listing = put(workspace, b"[]", ".dir")
    spoil(empty)
    spoil(zeros, bytes(3))
    spoil(listing, b"\0\0")
    restart(monkeypatch, "second")
    said = recovery.repair(workspace)
    assert [str(path) in " ".join(said) for path in (empty, zeros, listing, whole)] == [True, True, True, False]
    assert [path.exists() for path in (empty, zeros, listing, whole)] == [False, False, False, True]
    assert recovery.repair(workspace) == []


def test_objects_are_not_read_while_the_machine_runs_nor_once_they_were_flushed(workspace, monkeypatch):
    recovery.repair(workspace)
    path, member = put(workspace, b"a model"), put(workspace, b"a file of a folder")
    folder = put(workspace, json.dumps([{"md5": member.parent.name + member.name, "relpath": "a"}]).encode(), ".dir")
    lock(workspace, "train", model=path.parent.name + path.name, data=folder.parent.name + folder.name)
    recovery.sync_results(workspace, "train", "ran")
    late = put(workspace, b"a later one")
    read = []
    monkeypatch.setattr(recovery, "is_named", lambda one: read.append(one) or True)
    assert recovery.repair(workspace) == []
    assert read == []
    restart(monkeypatch, "second")
    assert recovery.repair(workspace) == []
    assert read == [late]


def test_an_object_that_was_written_again_after_it_was_flushed_is_read(workspace, monkeypatch):
    recovery.repair(workspace)
    path = put(workspace, b"a model")
    lock(workspace, "train", model=path.parent.name + path.name)
    recovery.sync_results(workspace, "train", "ran")
    path.unlink()
    put(workspace, b"a model")
    os.utime(path, ns=(7, 7))
    spoil(path, b"a m")
    restart(monkeypatch, "second")
    assert len(recovery.repair(workspace)) == 1
    assert not path.exists()


@pytest.mark.parametrize("damage", [b"", b"\0\0\0", b"[]", b'{"boot": "first", "files": {"a": "b"}}'])
def test_a_damaged_record_makes_the_next_start_read_every_object(workspace, damage):
    recovery.repair(workspace)
    path = put(workspace, b"one")
    spoil(path)
    (workspace / ".dvc" / "cache" / recovery.DURABLE).write_bytes(damage)
    assert len(recovery.repair(workspace)) == 1
    assert not path.exists()


def test_every_file_that_dvc_wrote_for_a_stage_is_flushed_and_a_disk_that_refuses_is_named(workspace, monkeypatch):
    path, other = put(workspace, b"a model"), put(workspace, b"of another stage")
    entry = workspace / ".dvc" / "cache" / "runs" / "ab" / "abc" / "def"
    entry.parent.mkdir(parents=True)
    entry.write_text("outs: []")
    out = workspace / "model"
    out.write_bytes(b"a model")
    lock(workspace, "train", model=path.parent.name + path.name)
    synced = set()
    monkeypatch.setattr(recovery, "sync_file", synced.add)
    monkeypatch.setattr(recovery, "sync_folder", synced.add)
    recovery.sync_results(workspace, "train", "ran")
    assert {path, entry, path.parent, entry.parent, entry.parent.parent, workspace / "dvc.lock", workspace} <= synced
    assert not {other, out} & synced
    recovery.sync_results(workspace, "train", "restored")
    assert out in synced

    def refuse(_path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(recovery, "sync_file", refuse)
    with pytest.raises(TemporaryError, match=r"stage train.*Input/output error"):
        recovery.sync_results(workspace, "train", "ran")


def test_a_dvc_repro_asks_dvc_for_its_cache_only_at_the_first_stage_after_a_restart(workspace, monkeypatch):
    asked = []

    def cache_folder(root):
        asked.append(root)
        return root / ".dvc" / "cache"

    (workspace / ".dvc").mkdir()
    monkeypatch.setattr(recovery.graph, "cache_folder", cache_folder)
    assert list(recovery.repair_for_dvc(workspace)) == []
    path = put(workspace, b"one")
    spoil(path)
    assert list(recovery.repair_for_dvc(workspace)) == []
    assert asked == [workspace]
    restart(monkeypatch, "second")
    assert len(list(recovery.repair_for_dvc(workspace))) == 1
    assert not path.exists()


def test_a_dvc_lock_beyond_the_limits_is_not_taken_for_a_truncated_one(workspace):
    lock = workspace / "dvc.lock"
    lock.write_text("a: " + "[" * 200 + "]" * 200)
    assert recovery.repair(workspace) == []
    assert lock.exists()


def test_a_listing_that_is_nested_too_deep_has_no_members(workspace):
    path = put(workspace, b"[" * 100_000, ".dir")
    assert list(recovery.graph.folder_members(path.parents[1], path.parent.name + path.name)) == []
