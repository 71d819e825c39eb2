"""A run that goes on from another takes over a whole checkpoint of it, or says why it cannot; it never begins anew."""

import json
import os
from dataclasses import dataclass

import pytest

from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.workspace import Workspace
from ropeway.stages.train import checkpoints, continuing
from ropeway.stages.train.continuing import Fingerprint

A, B, C = "a" * 16, "b" * 16, "c" * 16
PARTS = {"params": "1", "base": "2", "data": "3", "deepspeed": "4", "code": "5"}
PARAMS = {"learning_rate": 0.002, "rng_seed": 1, "resume_from": None}


@dataclass
class Wish:
    resume_from: str | None


@pytest.fixture
def workspace(tmp_path):
    """Return a workspace in which run A has checkpoints of steps 4 and 8, and the trial's of step 0."""
    workspace = Workspace(tmp_path, "tiny")
    begin(workspace, A)
    for step in (0, 4, 8):
        save(workspace.checkpoints / A, step)
    return workspace


def begin(workspace, name, **changed):
    parts = PARTS | {key: value for key, value in changed.items() if key in PARTS}
    params = PARAMS | {key: value for key, value in changed.items() if key in PARAMS}
    checkpoints.claim(workspace.checkpoints / name, {"profile": "tiny", "parts": parts, "params": params})
    return Fingerprint(name, parts, params)


def save(root, step):
    state = checkpoints.partial_folder(root, step) / checkpoints.STATE
    state.mkdir(parents=True)
    (state / "weights.pt").write_bytes(bytes([step]) * 100)
    log = [{"step": n + 1, "applied": 1} for n in range(step)]
    return checkpoints.commit(root, step, log, {"ranks": 2, "rewinds": []})


def go_on(workspace, wish, name=B, **changed):
    continuing.go_on(workspace, Wish(wish), begin(workspace, name, resume_from=wish, **changed))
    return workspace.checkpoints / name


def test_the_newest_checkpoint_becomes_the_first_of_the_new_run_and_what_changed_is_recorded(workspace, capsys):
    folder = go_on(workspace, A, learning_rate=0.001, code="6")
    found = checkpoints.newest_valid(folder)
    assert (found.step, len(found.log()), found.facts["ranks"]) == (8, 8, 2)
    record = continuing.read_record(folder)
    assert (record["fingerprint"], record["step"]) == (A, 8)
    assert record["changed"] == {"learning_rate": "0.002 -> 0.001", "training code": "5 -> 6"}
    said = capsys.readouterr().out
    assert f"going on from step 8 of run {A}: learning_rate 0.002 -> 0.001, training code 5 -> 6" in said
    assert json.loads(json.dumps(record)) == record


def test_its_bytes_are_linked_and_outlive_the_other_run(workspace):
    folder = go_on(workspace, A)
    mine, other = (
        checkpoints.step_folder(root, 8) / checkpoints.STATE / "weights.pt"
        for root in (folder, workspace.checkpoints / A)
    )
    assert mine.samefile(other)
    checkpoints.rotate(folder, keep=1, saved=8)
    assert checkpoints.newest_valid(workspace.checkpoints / A).step == 8
    checkpoints.remove(other.parents[1])
    assert checkpoints.newest_valid(folder).step == 8


def test_where_there_are_no_links_they_are_copied(workspace, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert checkpoints.newest_valid(go_on(workspace, A)).step == 8


def test_an_earlier_step_may_be_named(workspace):
    assert checkpoints.newest_valid(go_on(workspace, f"{A}@4")).step == 4
    with pytest.raises(ConfigError, match=r"no checkpoint of step 5; there are: 4, 8"):
        go_on(workspace, f"{A}@5", C)


def test_a_run_with_a_checkpoint_of_its_own_resumes_from_that(workspace):
    folder = go_on(workspace, f"{A}@4")
    save(folder, 6)
    save(workspace.checkpoints / A, 12)
    go_on(workspace, f"{A}@4")
    assert [step for step, _ in checkpoints.list_steps(folder)] == [4, 6]


@pytest.mark.parametrize("left", ["the record alone", "half of the files", "the trial's checkpoint"])
def test_killed_while_it_takes_over_it_takes_over_again(workspace, left):
    folder = go_on(workspace, A)
    taken = checkpoints.step_folder(folder, 8)
    if left == "half of the files":
        taken.rename(checkpoints.partial_folder(folder, 8))
        (checkpoints.partial_folder(folder, 8) / "manifest.json").unlink()
    else:
        checkpoints.remove(taken)
    if left == "the trial's checkpoint":
        save(folder, 0)
    assert checkpoints.newest_valid(go_on(workspace, A)).step == 8


def test_a_chain_of_runs_is_recorded_whole(workspace):
    save(go_on(workspace, f"{A}@4", learning_rate=0.001), 6)
    record = continuing.read_record(go_on(workspace, B, C, learning_rate=0.0005))
    assert (record["step"], record["earlier"]["fingerprint"], record["earlier"]["step"]) == (6, A, 4)
    assert record["changed"]["learning_rate"] == "0.001 -> 0.0005"
    assert record["earlier"]["earlier"] == {}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rng_seed": 2}, "rng_seed: 1 there, 2 here"),
        ({"data": "9"}, "data: sha256 3… there, 9… here"),
        ({"base": "9"}, "base: sha256 2… there, 9… here"),
        ({"deepspeed": "9"}, "deepspeed: sha256 4… there, 9… here"),
    ],
)
def test_other_rows_or_shapes_cannot_go_on(workspace, changed, words):
    with pytest.raises(ConfigError, match="set resume_from to null to train from the beginning") as error:
        go_on(workspace, A, **changed)
    assert words in str(error.value)
    assert not checkpoints.list_steps(workspace.checkpoints / B)


def test_a_run_that_is_not_here_is_asked_for_by_name(workspace):
    with pytest.raises(ConfigError, match=rf"{C} does not exist; runs here: {A}"):
        go_on(workspace, C)


@pytest.mark.parametrize(("text", "words"), [("{", "not JSON"), ('{"profile": "tiny"}', "does not say with which")])
def test_a_run_that_does_not_say_what_it_was_begun_with_is_refused(workspace, text, words):
    (workspace.checkpoints / A / checkpoints.OWNER).write_text(text)
    with pytest.raises((ConfigError, DataError), match=words):
        go_on(workspace, A)


def test_a_damaged_checkpoint_is_not_taken_over(workspace):
    newest = checkpoints.step_folder(workspace.checkpoints / A, 8) / checkpoints.STATE / "weights.pt"
    newest.write_bytes(b"?" * 100)
    assert checkpoints.newest_valid(go_on(workspace, A)).step == 4
    with pytest.raises(DataError, match=r"weights\.pt.*Name another step; there are: 4, 8"):
        go_on(workspace, f"{A}@8", C)


def test_a_run_without_a_whole_checkpoint_is_nothing_to_go_on_from(workspace):
    begin(workspace, C)
    save(workspace.checkpoints / C, 0)
    with pytest.raises(ConfigError, match="holds no checkpoint that is whole"):
        go_on(workspace, C)


def test_it_does_not_begin_anew_when_all_it_took_over_is_damaged(workspace):
    folder = go_on(workspace, A)
    with pytest.raises(DataError, match=f"it went on from run {A}, and none of its checkpoints is whole"):
        continuing.check_taken_over(folder, None, total_steps=20)
    continuing.check_taken_over(folder, checkpoints.newest_valid(folder), total_steps=20)


def test_going_on_from_the_last_step_would_train_nothing(workspace):
    folder = go_on(workspace, A)
    with pytest.raises(ConfigError, match=r"step 8 .* is the last of 8.*Raise num_train_epochs"):
        continuing.check_taken_over(folder, checkpoints.newest_valid(folder), total_steps=8)
    save(folder, 10)  # its own last step: it was killed before it had exported
    continuing.check_taken_over(folder, checkpoints.newest_valid(folder), total_steps=10)


def test_a_run_that_went_on_from_none_says_nothing(workspace):
    assert continuing.read_record(go_on(workspace, None)) == {}
    continuing.check_taken_over(workspace.checkpoints / B, None, total_steps=8)
