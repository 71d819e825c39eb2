"""A run that continues from another links a valid checkpoint of it or is refused; it never starts over silently."""

import json
import os
from dataclasses import dataclass

import pytest

from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.workspace import Workspace
from ropeway.stages.train import checkpoints, continuing
from ropeway.stages.train.continuing import Fingerprint
from tests.support.committed import commit

A, B, C = "a" * 16, "b" * 16, "c" * 16
PARTS = {"params": "1", "base": "2", "data": "3", "deepspeed": "4", "code": "5"}
PARAMS = {"learning_rate": 0.002, "rng_seed": 1, "resume_from": None}


@dataclass
class Params:
    resume_from: str | None


@pytest.fixture
def workspace(tmp_path):
    """Return a workspace in which run A has checkpoints of steps 4 and 8, and of step 0 from its warm-up."""
    workspace = Workspace(tmp_path, "tiny")
    start_run(workspace, A)
    for step in (0, 4, 8):
        save(workspace.checkpoints / A, step)
    return workspace


def start_run(workspace, name, **changed):
    parts = PARTS | {key: value for key, value in changed.items() if key in PARTS}
    params = PARAMS | {key: value for key, value in changed.items() if key in PARAMS}
    checkpoints.write_run_info(workspace.checkpoints / name, {"profile": "tiny", "parts": parts, "params": params})
    return Fingerprint(name, parts, params)


def save(root, step):
    state = checkpoints.partial_folder(root, step) / checkpoints.STATE
    state.mkdir(parents=True)
    (state / "weights.pt").write_bytes(bytes([step]) * 100)
    log = [{"step": n + 1, "applied": 1} for n in range(step)]
    return commit(root, step, log, {"ranks": 2, "rewinds": []})


def continue_from(workspace, resume_from, name=B, **changed):
    continuing.continue_run(
        workspace, Params(resume_from), start_run(workspace, name, resume_from=resume_from, **changed)
    )
    return workspace.checkpoints / name


def test_the_newest_checkpoint_becomes_the_first_of_the_new_run_and_what_changed_is_recorded(workspace, capsys):
    folder = continue_from(workspace, A, learning_rate=0.001, code="6")
    found = checkpoints.newest_valid(folder)
    assert (found.step, len(found.log()), found.facts["ranks"]) == (8, 8, 2)
    record = continuing.read_continued_from(folder)
    assert (record["fingerprint"], record["step"]) == (A, 8)
    assert record["changed"] == {"learning_rate": "0.002 -> 0.001", "training code": "5 -> 6"}
    said = capsys.readouterr().out
    assert f"from step 8 of run {A}: learning_rate 0.002 -> 0.001, training code 5 -> 6" in said
    assert json.loads(json.dumps(record)) == record


def test_its_files_are_linked_and_survive_the_removal_of_the_other_run(workspace):
    folder = continue_from(workspace, A)
    mine, other = (
        checkpoints.step_folder(root, 8) / checkpoints.STATE / "weights.pt"
        for root in (folder, workspace.checkpoints / A)
    )
    assert mine.samefile(other)
    checkpoints.rotate(folder, keep=1, saved=8)
    assert checkpoints.newest_valid(workspace.checkpoints / A).step == 8
    checkpoints.remove(other.parents[1])
    assert checkpoints.newest_valid(folder).step == 8


def test_without_hard_links_the_files_are_copied(workspace, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert checkpoints.newest_valid(continue_from(workspace, A)).step == 8


def test_an_earlier_step_may_be_named(workspace):
    assert checkpoints.newest_valid(continue_from(workspace, f"{A}@4")).step == 4
    with pytest.raises(ConfigError, match=r"no checkpoint of step 5; existing steps: 4, 8"):
        continue_from(workspace, f"{A}@5", C)


def test_a_run_with_a_checkpoint_of_its_own_resumes_from_that(workspace):
    folder = continue_from(workspace, f"{A}@4")
    save(folder, 6)
    save(workspace.checkpoints / A, 12)
    continue_from(workspace, f"{A}@4")
    assert [step for step, _ in checkpoints.list_steps(folder)] == [4, 6]


@pytest.mark.parametrize("left", ["the record alone", "half of the files", "the warm-up checkpoint"])
def test_killed_while_it_links_a_checkpoint_the_next_start_links_it_again(workspace, left):
    folder = continue_from(workspace, A)
    taken = checkpoints.step_folder(folder, 8)
    if left == "half of the files":
        taken.rename(checkpoints.partial_folder(folder, 8))
        (checkpoints.partial_folder(folder, 8) / "manifest.json").unlink()
    else:
        checkpoints.remove(taken)
    if left == "the warm-up checkpoint":
        save(folder, 0)
    assert checkpoints.newest_valid(continue_from(workspace, A)).step == 8


def test_a_chain_of_continued_runs_is_recorded_completely(workspace):
    save(continue_from(workspace, f"{A}@4", learning_rate=0.001), 6)
    record = continuing.read_continued_from(continue_from(workspace, B, C, learning_rate=0.0005))
    assert (record["step"], record["earlier"]["fingerprint"], record["earlier"]["step"]) == (6, A, 4)
    assert record["changed"]["learning_rate"] == "0.001 -> 0.0005"
    assert record["earlier"]["earlier"] == {}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rng_seed": 2}, "rng_seed: 1 in that run, 2 in this one"),
        ({"data": "9"}, "data: sha256 3… in that run, 9… in this one"),
        ({"base": "9"}, "base: sha256 2… in that run, 9… in this one"),
        ({"deepspeed": "9"}, "deepspeed: sha256 4… in that run, 9… in this one"),
    ],
)
def test_params_that_change_rows_or_shapes_are_refused(workspace, changed, words):
    with pytest.raises(ConfigError, match="set resume_from to null to train from the beginning") as error:
        continue_from(workspace, A, **changed)
    assert words in str(error.value)
    assert not checkpoints.list_steps(workspace.checkpoints / B)


def test_a_run_that_does_not_exist_is_refused_with_the_runs_that_do(workspace):
    with pytest.raises(ConfigError, match=rf"{C} does not exist; existing runs: {A}"):
        continue_from(workspace, C)


@pytest.mark.parametrize(("text", "words"), [("{", "not JSON"), ('{"profile": "tiny"}', "has no params")])
def test_a_run_without_readable_params_is_refused(workspace, text, words):
    (workspace.checkpoints / A / checkpoints.RUN_INFO).write_text(text)
    with pytest.raises((ConfigError, DataError), match=words):
        continue_from(workspace, A)


def test_a_damaged_checkpoint_is_not_linked(workspace):
    newest = checkpoints.step_folder(workspace.checkpoints / A, 8) / checkpoints.STATE / "weights.pt"
    newest.write_bytes(b"?" * 100)
    assert checkpoints.newest_valid(continue_from(workspace, A)).step == 4
    with pytest.raises(DataError, match=r"weights\.pt.*existing steps: 4, 8"):
        continue_from(workspace, f"{A}@8", C)


def test_a_run_without_a_valid_checkpoint_is_refused(workspace):
    start_run(workspace, C)
    save(workspace.checkpoints / C, 0)
    with pytest.raises(ConfigError, match="has no valid checkpoint"):
        continue_from(workspace, C)


def test_it_does_not_start_over_when_all_its_checkpoints_are_damaged(workspace):
    folder = continue_from(workspace, A)
    with pytest.raises(DataError, match=f"continues from run {A}, and all its checkpoints are damaged"):
        continuing.check_continued(folder, None, total_steps=20)
    continuing.check_continued(folder, checkpoints.newest_valid(folder), total_steps=20)


def test_continuing_from_the_last_step_is_refused(workspace):
    folder = continue_from(workspace, A)
    with pytest.raises(ConfigError, match=r"step 8 .* is the last of 8 steps.*Raise num_train_epochs"):
        continuing.check_continued(folder, checkpoints.newest_valid(folder), total_steps=8)
    save(folder, 10)  # its own last step: it was killed before it had exported
    continuing.check_continued(folder, checkpoints.newest_valid(folder), total_steps=10)


def test_a_run_that_continues_from_none_has_no_record(workspace):
    assert continuing.read_continued_from(continue_from(workspace, None)) == {}
    continuing.check_continued(workspace.checkpoints / B, None, total_steps=8)
