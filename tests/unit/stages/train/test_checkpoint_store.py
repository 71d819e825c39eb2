"""Checkpoints in a store: uploaded while training goes on, fetched verified, the newest valid one first."""

import os
import threading

import pytest

from ropeway.runtime.errors import TemporaryError
from ropeway.runtime.manifest import NAME, describe_files, load_manifest
from ropeway.stages.train import checkpoints
from ropeway.stages.train.checkpoint_store import StoredRun, Uploader, remove_old_runs
from ropeway.storage import FileStore
from tests.support.memory_store import MemoryStore

RUN = "0" * 64


def save(root, step, content=b""):
    partial = checkpoints.partial_folder(root, step)
    (partial / checkpoints.STATE).mkdir(parents=True)
    (partial / checkpoints.STATE / "weights.pt").write_bytes(content or b"weights of step %d" % step)
    checkpoints.write_log(root, step, [{"step": one} for one in range(1, step + 1)])
    names = [f"{checkpoints.STATE}/weights.pt", checkpoints.LOG]
    return checkpoints.publish(root, step, {"ranks": 2}, describe_files(partial, names))


@pytest.fixture
def here(tmp_path):
    return tmp_path / "here" / RUN


@pytest.fixture
def there(tmp_path):
    root = tmp_path / "there" / RUN
    root.mkdir(parents=True)
    return root


@pytest.fixture
def stored(tmp_path):
    return StoredRun(FileStore(tmp_path / "store"), f"tiny/{RUN}/")


@pytest.fixture
def memory():
    return StoredRun(MemoryStore(), f"checkpoints/tiny/{RUN}/")


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_newest_checkpoint_arrives_byte_for_byte_and_two_are_kept(here, there, stored):
    for step in (4, 8, 12):
        stored.upload(save(here, step), step)
    assert [step for step, _ in stored.steps()] == [8, 12]
    assert len(stored.store.list_keys(f"{stored.prefix}blobs/")) == 4  # a state and a log of each
    assert stored.download_newest(there, above=0) == 12
    assert files(checkpoints.step_folder(there, 12)) == files(checkpoints.step_folder(here, 12))
    assert checkpoints.newest_valid(there).step == 12
    assert stored.download_newest(there, above=12) is None


def test_an_upload_that_was_cut_short_is_not_found(here, there, stored, monkeypatch):
    stored.upload(save(here, 4), 4)
    put, seen = stored.store.put_if_absent, []

    def fail(key, data, **more):
        seen.append(key)
        if "/steps/" in key:
            raise TemporaryError("the store is full")
        return put(key, data, **more)

    monkeypatch.setattr(stored.store, "put_if_absent", fail)
    with pytest.raises(TemporaryError):
        stored.upload(save(here, 8), 8)
    assert "/steps/" in seen[-1]  # the manifest goes last
    assert stored.download_newest(there, above=0) == 4


def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(here, there, stored, capsys):
    for step in (4, 8):
        stored.upload(save(here, step), step)
    facts = load_manifest(checkpoints.step_folder(here, 8), remedy="-")["files"]["state/weights.pt"]
    place = stored.store.root / stored.prefix / "blobs" / facts["sha256"]
    place.chmod(0o644)
    place.write_bytes(b"x" * facts["bytes"])
    assert stored.download_newest(there, above=0) == 4
    assert "checkpoint of step 8" in capsys.readouterr().out
    assert checkpoints.newest_valid(there).step == 4


def test_a_manifest_cannot_write_outside_the_checkpoint(here, there, stored):
    folder = save(here, 4)
    manifest = (folder / NAME).read_text().replace("state/weights.pt", "../../evil")
    stored.store.put_if_absent(f"{stored.prefix}steps/000004-{'0' * 12}.json", manifest.encode())
    assert stored.download_newest(there, above=0) is None
    assert not (there.parent / "evil").exists()


@pytest.mark.parametrize(
    "manifest",
    ["", "{", "{}", "null", "[1]", '{"files": []}', '{"files": {}, "step": 8, "ranks": 2}', "[" * 5000],
)
def test_a_damaged_manifest_neither_hides_an_older_checkpoint_nor_stops_uploads(here, there, stored, manifest, capsys):
    stored.upload(save(here, 4), 4)
    stored.store.put_if_absent(f"{stored.prefix}steps/000008-{'0' * 12}.json", manifest.encode())
    assert stored.download_newest(there, above=0) == 4
    stored.upload(save(here, 12), 12)
    assert [step for step, _ in stored.steps()][-1] == 12
    assert "checkpoint of step 8" in capsys.readouterr().out


def test_an_upload_that_fails_in_any_way_is_said(here, stored, monkeypatch, capsys):
    monkeypatch.setattr(StoredRun, "upload", lambda *_: {}["missing"])
    save(here, 4)
    with Uploader(stored, here).running():
        pass
    assert "on this machine only" in capsys.readouterr().out


def test_a_rewind_makes_later_steps_of_the_store_old(here, there, stored):
    for step in (4, 8, 12):
        stored.upload(save(here, step), step)
    checkpoints.remove(checkpoints.step_folder(here, 8))
    stored.upload(save(here, 8, b"other weights"), 8)
    assert [step for step, _ in stored.steps()] == [8, 8]
    assert stored.download_newest(there, above=0) == 8


def test_the_uploader_uploads_the_newest_before_it_ends_and_survives_a_store_that_fails(here, stored, capsys):
    uploader = Uploader(stored, here)
    save(here, 4)
    with uploader.running():
        save(here, 8)
    assert [step for step, _ in stored.steps()][-1] == 8
    assert 8 in uploader.uploaded

    class Full(FileStore):
        def put_if_absent(self, *_arguments, **_more):
            raise TemporaryError("the store is full")

    broken = Uploader(StoredRun(Full(stored.store.root), stored.prefix), here)
    with broken.running():
        pass
    assert broken.uploaded == set()
    assert "on this machine only" in capsys.readouterr().out


def test_a_checkpoint_that_is_rotated_away_during_its_upload_is_left(here, stored, capsys):
    begun, go = threading.Event(), threading.Event()

    class Slow(FileStore):
        def put_if_absent(self, key, data, **more):
            begun.set()
            go.wait(60)
            return super().put_if_absent(key, data, **more)

    uploader = Uploader(StoredRun(Slow(stored.store.root), stored.prefix), here)
    folder = save(here, 4)
    with uploader.running():
        begun.wait(60)
        checkpoints.remove(folder)
        save(here, 8)
        go.set()
    assert "checkpoint of step 4 was not uploaded" in capsys.readouterr().out
    assert [step for step, _ in stored.steps()] == [8]


def test_older_runs_of_a_profile_leave_the_store(here, stored):
    folder = save(here, 4)
    stored.store.put_if_absent("tiny/registry.json", b"{}")  # of somebody else
    for run in ("a", "b", "c"):
        StoredRun(stored.store, f"checkpoints/tiny/{run}/").upload(folder, 4)
    StoredRun(stored.store, "checkpoints/other/d/").upload(folder, 4)
    assert remove_old_runs(stored.store, "tiny", current="a", keep=2) == ["b"]
    assert {key.split("/")[2] for key in stored.store.list_keys("checkpoints/")} == {"a", "c", "d"}
    assert stored.store.exists("tiny/registry.json")
    assert remove_old_runs(stored.store, "tiny", current="a", keep=2) == []  # a folder store keeps empty folders


def test_a_checkpoint_that_is_not_listed_is_kept_and_found(here, there, memory):
    memory.upload(save(here, 4), 4)
    memory.store.freeze_listing()
    for step in (8, 12):
        memory.upload(save(here, step), step)
        assert memory.steps()[-1][0] == step
    assert memory.download_newest(there, above=0) == 12
    for blobs_listed in (True, False):  # the listing of blobs can be newer than that of manifests
        shown = memory.store._current()
        memory.store.listed = {key: one for key, one in shown.items() if ("blobs/" in key) == blobs_listed}
        memory.upload(save(here, 16 + blobs_listed), 16 + blobs_listed)
        for _, key in memory.steps()[-2:]:
            files_of = memory._read(key)["files"].values()
            assert all(memory.store.exists(f"{memory.prefix}blobs/{facts['sha256']}") for facts in files_of)


def test_removed_checkpoints_that_are_still_listed_are_no_error(here, there, memory):
    for step in (4, 8, 12):
        memory.upload(save(here, step), step)
    memory.store.freeze_listing()
    for step in (16, 20):
        memory.upload(save(here, step), step)
    memory.upload(save(here, 24), 24)
    assert [step for step, _ in memory.steps()] == [20, 24]
    assert memory.download_newest(there, above=0) == 24


@pytest.mark.parametrize("weights", [b"a", b"b", b"c", b"d"])
def test_of_one_step_the_checkpoint_uploaded_last_is_the_newest(here, there, memory, weights):
    for step in (4, 8):
        memory.upload(save(here, step), step)
    checkpoints.remove(checkpoints.step_folder(here, 8))
    memory.upload(save(here, 8, weights), 8)  # after a rewind, by whichever digest
    assert memory.download_newest(there, above=0) == 8
    assert (checkpoints.step_folder(there, 8) / checkpoints.STATE / "weights.pt").read_bytes() == weights


def test_the_run_that_was_written_last_is_kept_although_its_upload_is_not_listed(here, memory):
    folder, store = save(here, 4), memory.store
    for run in ("a", "b", "c"):
        StoredRun(store, f"checkpoints/tiny/{run}/").upload(folder, 4)
    store.freeze_listing()
    StoredRun(store, "checkpoints/tiny/a/").upload(save(here, 8), 8)
    assert remove_old_runs(store, "tiny", current="c", keep=2) == ["b"]


def set_clock(folder, days):
    at = (folder / NAME).stat().st_mtime_ns + days * 86400 * 10**9
    os.utime(folder / NAME, ns=(at, at))


@pytest.mark.parametrize("days", [365, -365])
def test_the_newest_checkpoint_is_uploaded_whatever_the_clock_says(here, stored, days):
    uploader = Uploader(stored, here)
    for number, step in enumerate((4, 8, 12, 8)):  # the last one is after a rewind
        if number == 3:
            for old in (8, 12):
                checkpoints.remove(checkpoints.step_folder(here, old))
        set_clock(save(here, step, b"%d" % number), days * number)
        newest = uploader._find_newest()
        assert newest == (step, checkpoints.step_folder(here, step))
        assert step not in uploader.uploaded
        uploader._upload(*newest)
    assert uploader._find_newest()[0] in uploader.uploaded


def test_after_a_restart_the_highest_step_is_the_newest_as_in_the_resume(here, stored):
    for step, days in ((4, 365), (8, 0)):
        set_clock(save(here, step), days)
    assert Uploader(stored, here)._find_newest()[0] == checkpoints.newest_valid(here).step == 8
