"""A stop inside a step or a validation saves the step before and changes no byte; checkpoints by time do not either."""

import json
import os
import shutil
import sys

import pytest

from tests.support import forked
from tests.support.tiny_run import BLOCK, make_run
from tests.support.training import EDITS, start, zero

# One attempt each: the look at which it is stopped -> the newest checkpoint after it. A step has 2 looks, one of them
# between its micro-batches; every second step and the last have a validation with 3, after each batch and at its end.
STOPS = {
    1: 0,  # inside step 1: nothing to save
    5: 2,  # inside the validation after step 2
    4: 2,  # validation, then inside step 3
    8: 4,  # inside the validation after step 4
    6: 5,  # inside step 6
    15: 9,  # inside the validation after the last step
}


def make(root, stage=2, **edits):
    """Return the workspace of a training: 9 steps of 2 micro-batches, a validation per 2 steps, one save at the end."""
    block = BLOCK + EDITS.replace("num_train_epochs: 1", "num_train_epochs: 3")
    for key, value in {"save_steps": 1000, **edits}.items():
        block = block.replace("  save_steps: 1\n", "") + f"  {key}: {value}\n"
    block += "  eval_steps: 2\n"
    workspace, _ = make_run(root, block=block, configs={"ds.json": json.dumps(zero(stage))})
    return workspace


def stop_at(workspace, look):
    """Run the stage until its ranks are asked at this look, or to its end; return its exit code and what it printed."""
    shutil.rmtree(workspace.model, ignore_errors=True)
    here = {"ROPEWAY_RANKS": "2", "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.support.stopped_train", str(look)]
    done = forked.run(command, cwd=workspace.root, env={**os.environ, **here})
    return done.returncode, done.stdout


def result(workspace):
    return (workspace.model / "model.safetensors").read_bytes(), workspace.steps.read_bytes()


def saved(workspace):
    (run,) = [path for path in workspace.checkpoints.iterdir() if path.is_dir()]
    return sorted(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return weights and steps of a training that is never stopped."""
    workspace = make(tmp_path_factory.mktemp("whole"))
    start(workspace)
    return result(workspace)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_stops_inside_steps_and_validations_change_no_byte(whole, tmp_path, stage):
    workspace = make(tmp_path / "workspace", stage)
    if stage == 2:
        expected = whole
    else:
        start(workspace)
        expected = result(workspace)
        shutil.rmtree(workspace.checkpoints)
    for look, step in STOPS.items():
        code, printed = stop_at(workspace, look)
        assert code == 75, printed
        assert f"stopped after step {step}. " in printed
        assert max(saved(workspace), default=0) == step
    code, printed = stop_at(workspace, 0)
    assert code == 0, printed
    assert result(workspace) == expected


def test_checkpoints_by_time_change_no_byte(whole, tmp_path):
    workspace = make(tmp_path / "workspace", save_minutes=1e-6, save_total_limit=100)
    start(workspace)
    steps = saved(workspace)
    assert steps == list(range(1, steps[-1] + 1))
    assert result(workspace) == whole
