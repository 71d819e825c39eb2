"""Checkpoints are atomic: a run never resumes from what a kill, a full disk or a flipped bit has damaged."""

import os
import shutil
import subprocess
import time

import pytest

from ropeway.runtime import manifest
from ropeway.runtime.errors import ConfigError
from ropeway.stages.train import checkpoints
from ropeway.stages.train.checkpoints import convert_for_ranks
from tests.support.committed import commit


def write(root, step, *, keep=None, ranks=2):
    partial = checkpoints.partial_folder(root, step)
    (partial / checkpoints.STATE).mkdir(parents=True)
    (partial / checkpoints.STATE / "weights.pt").write_bytes(bytes(range(step)) * 10)
    folder = commit(root, step, [{"step": n + 1, "applied": 1} for n in range(step)], {"ranks": ranks})
    if keep:
        checkpoints.rotate(root, keep=keep, saved=step)
    return folder


def test_the_newest_checkpoint_resumes_with_its_log(tmp_path):
    for step in (5, 10):
        write(tmp_path, step)
    found = checkpoints.newest_valid(tmp_path)
    assert (found.step, found.facts["ranks"], len(found.log())) == (10, 2, 10)


@pytest.mark.parametrize("fault", ["of another run", "of another step"])
def test_a_checkpoint_that_was_copied_or_renamed_is_never_resumed_from(tmp_path, capsys, fault):
    mine, other = tmp_path / "aaaa", tmp_path / "bbbb"
    write(mine, 5)
    copied = write(other, 10)
    if fault == "of another run":
        shutil.copytree(copied, checkpoints.step_folder(mine, 10))
        assert checkpoints.newest_valid(mine).step == 5
        assert "holds step 10 of run bbbb" in capsys.readouterr().out
    else:
        copied.rename(checkpoints.step_folder(other, 12))
        assert checkpoints.newest_valid(other) is None
        assert "step-000012: holds step 10" in capsys.readouterr().out


def test_without_a_saved_checkpoint_none_is_found(tmp_path):
    assert checkpoints.newest_valid(tmp_path / "none") is None


@pytest.mark.parametrize(
    "fault", ["flipped byte", "cut file", "lost file", "no manifest", "broken manifest", "added file"]
)
def test_a_damaged_checkpoint_is_skipped_with_a_message(tmp_path, capsys, fault):
    write(tmp_path, 5)
    folder = write(tmp_path, 10)
    state = folder / checkpoints.STATE / "weights.pt"
    if fault == "flipped byte":
        data = bytearray(state.read_bytes())
        data[3] ^= 1
        state.write_bytes(data)
    elif fault == "cut file":
        state.write_bytes(state.read_bytes()[:-1])
    elif fault == "lost file":
        state.unlink()
    elif fault == "no manifest":
        (folder / "manifest.json").unlink()
    elif fault == "broken manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "stray.pt").write_bytes(b"?")
    assert checkpoints.newest_valid(tmp_path).step == 5
    assert "checkpoint of step 10 is damaged" in capsys.readouterr().out


def test_an_unfinished_save_is_never_a_checkpoint(tmp_path):
    write(tmp_path, 5)
    (checkpoints.partial_folder(tmp_path, 10) / checkpoints.STATE).mkdir(parents=True)
    assert checkpoints.newest_valid(tmp_path).step == 5
    checkpoints.clear_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_rotation_keeps_the_newest(tmp_path):
    for step in (5, 10, 15, 20):
        write(tmp_path, step, keep=2)
    assert [step for step, _ in checkpoints.list_steps(tmp_path)] == [15, 20]


def flip(folder):
    state = folder / checkpoints.STATE / "weights.pt"
    data = bytearray(state.read_bytes())
    data[3] ^= 1
    state.write_bytes(data)


def steps_of(root):
    return [step for step, _ in checkpoints.list_steps(root)]


@pytest.mark.parametrize("new_process", [False, True])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_checkpoint_with_a_higher_step_goes_first_and_nothing_valid_is_lost(tmp_path, keep, new_process):
    write(tmp_path, 100)
    flip(write(tmp_path, 200))
    if new_process:
        checkpoints._VERIFIED.clear()
    assert checkpoints.newest_valid(tmp_path).step == 100  # the run resumes there
    write(tmp_path, 120, keep=keep)
    assert steps_of(tmp_path) == [120] if keep == 1 else [100, 120]
    assert "checkpoint is step 120: " in checkpoints.describe_last_good(tmp_path)
    assert checkpoints.newest_valid(tmp_path).step == 120


def test_the_message_never_names_a_damaged_checkpoint(tmp_path):
    write(tmp_path, 5)
    newest = write(tmp_path, 10)
    flip(newest)
    assert "checkpoint is step 5: " in checkpoints.describe_last_good(tmp_path)
    flip(tmp_path / "step-000005")
    assert "All 2 checkpoints in" in checkpoints.describe_last_good(tmp_path)


def test_a_valid_checkpoint_with_a_higher_step_stays_beside_the_one_that_was_saved(tmp_path):
    for step in (5, 20):
        write(tmp_path, step)
    write(tmp_path, 10, keep=1)
    assert steps_of(tmp_path) == [10, 20]


def test_rotation_reads_no_checkpoint_that_this_process_wrote(tmp_path, monkeypatch):
    for step in (5, 10, 15):
        write(tmp_path, step)
    monkeypatch.setattr(checkpoints, "load_manifest", lambda *_, **__: pytest.fail("a checkpoint was read"))
    checkpoints.rotate(tmp_path, keep=2, saved=15)
    assert steps_of(tmp_path) == [10, 15]


def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 5)

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "sync_file", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 10)
    assert checkpoints.newest_valid(tmp_path).step == 5


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    folder = write(tmp_path, 5)
    (folder / "manifest.json").unlink()
    write(tmp_path, 5)
    assert checkpoints.newest_valid(tmp_path).step == 5
    shutil.rmtree(folder)


def checkpoint(tmp_path, **facts):
    made = {"ranks": 2, "torch": "2.13.0", "deepspeed": "0.19.8", **facts}
    return checkpoints.Checkpoint(tmp_path / "step-000010", 10, made)


NOW = {"torch": "2.13.0", "deepspeed": "0.19.8"}


def test_resuming_with_another_library_version_is_refused_unless_allowed(tmp_path, monkeypatch):
    monkeypatch.delenv("ROPEWAY_OTHER_VERSIONS", raising=False)
    checkpoints.check_resumable(checkpoint(tmp_path), ranks=2, now=NOW)
    older = checkpoint(tmp_path, deepspeed="0.19.2")
    with pytest.raises(ConfigError, match=r"deepspeed 0\.19\.2 \(now 0\.19\.8\).*ROPEWAY_OTHER_VERSIONS=1"):
        checkpoints.check_resumable(older, ranks=2, now=NOW)
    monkeypatch.setenv("ROPEWAY_OTHER_VERSIONS", "1")
    checkpoints.check_resumable(older, ranks=2, now=NOW)


def test_other_ranks_need_a_converted_checkpoint_which_the_next_save_removes(tmp_path):
    found = checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"written by 2 ranks, this start has 4,.*set ROPEWAY_RANKS=2"):
        checkpoints.check_resumable(found, ranks=4, now=NOW)
    checkpoints.universal_folder(found).mkdir(parents=True)
    checkpoints.check_resumable(found, ranks=4, now=NOW)
    checkpoints.rotate(found.folder.parent, keep=1, saved=10)
    assert not checkpoints.universal_folder(found).exists()


def test_if_the_newest_checkpoint_is_damaged_an_older_one_of_other_ranks_is_converted(tmp_path, monkeypatch):
    commands = []

    def convert(command, **_):
        commands.append(command)
        (tmp_path / ".partial-universal-000005").mkdir()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", convert)
    write(tmp_path, 5, ranks=1)
    newest = write(tmp_path, 10)
    convert_for_ranks(checkpoints.newest_valid(tmp_path), ranks=2)
    assert not commands
    (newest / checkpoints.LOG).write_text("damaged")
    convert_for_ranks(checkpoints.newest_valid(tmp_path), ranks=2)
    assert f"--input_folder={tmp_path / 'step-000005' / 'state'}" in commands[0]
    checkpoints.check_resumable(checkpoints.newest_valid(tmp_path), ranks=2, now={})


def test_the_last_good_checkpoint_is_named(tmp_path):
    assert checkpoints.describe_last_good(tmp_path).startswith("No checkpoint was saved")
    write(tmp_path, 5)
    assert "checkpoint is step 5: " in checkpoints.describe_last_good(tmp_path)


def test_pruning_removes_only_older_runs_of_the_same_profile(tmp_path, capsys):
    for age, (name, profile) in enumerate(
        [("old", "tiny"), ("current", "tiny"), ("other", "laptop"), ("newer", "tiny"), ("newest", "tiny")]
    ):
        checkpoints.write_run_info(tmp_path / name, {"profile": profile})
        write(tmp_path / name, 5)
        os.utime(tmp_path / name / checkpoints.RUN_INFO, ns=(age, age))
    (tmp_path / "unclaimed").mkdir()
    for name, note in (("damaged", b'{"profile": "ti'), ("foreign", b'["tiny"]'), ("no text", b"\xff\xfe")):
        (tmp_path / name).mkdir()
        (tmp_path / name / checkpoints.RUN_INFO).write_bytes(note)
    assert checkpoints.prune_runs(tmp_path, profile="tiny", current="current", keep=2) == ["old", "newer"]
    kept = ["current", "damaged", "foreign", "newest", "no text", "other", "unclaimed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    said = capsys.readouterr().out
    assert all(f"{tmp_path / name / checkpoints.RUN_INFO}: cannot be read" in said for name in ("damaged", "foreign"))
    assert checkpoints.prune_runs(tmp_path, profile="tiny", current="current", keep=1) == ["newest"]
    assert checkpoints.newest_valid(tmp_path / "current").step == 5


@pytest.mark.parametrize("jump", [365, -365])
def test_the_order_of_starts_does_not_depend_on_the_clock(tmp_path, jump):
    for number, name in enumerate("abc"):
        checkpoints.write_run_info(tmp_path / name, {"profile": "tiny"})
        if number == 1:  # started while the clock was wrong
            wrong = time.time_ns() + jump * 86400 * 10**9
            if jump > 0:
                os.utime(tmp_path / name / checkpoints.RUN_INFO, ns=(wrong, wrong))
    if jump < 0:  # b and c started before the clock was set back
        for name in "bc":
            later = (tmp_path / name / checkpoints.RUN_INFO).stat().st_mtime_ns - jump * 86400 * 10**9
            os.utime(tmp_path / name / checkpoints.RUN_INFO, ns=(later, later))
    checkpoints.write_run_info(tmp_path / "d", {"profile": "tiny"})
    checkpoints.write_run_info(tmp_path / "e", {"profile": "tiny"})
    assert checkpoints.prune_runs(tmp_path, profile="tiny", current="e", keep=2) == ["a", "b", "c"]
    checkpoints.write_run_info(tmp_path / "d", {"profile": "tiny"})  # started again
    assert checkpoints.prune_runs(tmp_path, profile="tiny", current="", keep=1) == ["e"]
