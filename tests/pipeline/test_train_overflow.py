"""fp16 that overflows, on a real DeepSpeed engine: what is skipped is counted, and too much of it ends the run."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.support.tiny_run import ROOT, make_run

CASES = {"recovers": "22:20:0", "in a row": "60:3:0", "floor": "40:20:38", "never": "60:50:0"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("overflow")
    make_run(root, "train")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, **group, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.support.overflow", str(root), *CASES.values()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(CASES, lines, strict=True))


def test_a_run_that_overflows_early_finds_its_loss_scale_and_trains(runs):
    log = runs["recovers"]["log"]
    assert runs["recovers"]["ended"] == "finished"
    skipped = [line for line in log if not line["applied"]]
    assert skipped
    assert all(line["grad_norm"] is None for line in skipped)
    assert [line["loss_scale"] for line in skipped] == [2.0 ** (21 - n) for n in range(len(skipped))]
    assert (log[-1]["applied_steps"], log[-1]["skipped_steps"]) == (len(log) - len(skipped), len(skipped))
    # The schedule stands still on a skipped step: rates count applied steps only.
    rates = [line["learning_rate"] for line in log if line["applied"]]
    assert rates[:4] == pytest.approx([0.0, 0.0, 5e-4, 1e-3])
    assert log[-1]["loss"] < log[0]["loss"]


def test_too_many_consecutive_skipped_steps_end_the_run(runs):
    assert runs["in a row"]["ended"].startswith("step 3: 3 steps in a row were skipped")
    assert len(runs["in a row"]["log"]) == 3


def test_an_overflow_at_the_lowest_scale_ends_the_run_before_deepspeed_raises(runs):
    assert runs["floor"]["ended"].startswith("step 2: gradient overflow at the lowest loss scale, 2.74878e+11")


def test_a_run_in_which_no_step_was_applied_fails(runs):
    assert runs["never"]["ended"].startswith("0 of 12 steps were applied")
