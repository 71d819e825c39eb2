"""However a training run ends, it says so with the right code, and the next start ends with the same bytes."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager

import psutil
import pytest

from tests.support.main_job import STEPS
from tests.support.processes import read_until


@pytest.fixture
def whole(main_jobs):
    """Return a workspace whose training ran once, from one end to the other; not to be changed."""
    return main_jobs.finished


@pytest.fixture
def job(main_jobs, tmp_path):
    """Return a copy of it as it was before training."""
    return main_jobs.prepared.copy(tmp_path / "workspace")


def train(job):
    return job.start("ropeway", "stage", "train")


def finish(process, code):
    rest = process.stdout.read()
    process.stdout.close()
    assert process.wait(300) == code, rest
    return rest


def ranks_of(process):
    below = psutil.Process(process.pid).children(recursive=True)
    found = {int(one.environ()["RANK"]): one for one in below if "RANK" in one.environ() and is_rank(one)}
    assert len(found) == 2
    return found


def is_rank(process):
    words = process.cmdline()
    return "-m" in words and words[words.index("-m") + 1] == "ropeway.stages.train.rank"


def cores_of(process):
    return [one for one in psutil.Process(process.pid).children(recursive=True) if "wandb-core" in one.name()]


def saved(job):
    return sorted(path.name for path in next((job.root / ".checkpoints").iterdir()).glob("step-*"))


def test_the_preflight_step_does_not_change_the_weights(main_jobs, whole, job):
    assert re.search(r"warm-up step: the longest rows fit: 2 x 64 tokens/micro-batch, loss \d", main_jobs.said)
    job.environment["ROPEWAY_SKIP_WARM_UP"] = "1"
    assert "warm-up step:" not in job.stage("train")
    assert job.weights() == whole.weights()
    assert (job.run / "steps.csv").read_bytes() == (whole.run / "steps.csv").read_bytes()
    assert saved(whole) == ["step-000020", "step-000024"]


def test_provenance_records_the_time_of_each_attempt(whole):
    (attempt,) = json.loads((whole.run / "provenance.json").read_text())["attempts"]
    assert attempt["ended"] == "finished"
    assert attempt["tokens"] > attempt["supervised_tokens"] > 0
    assert attempt["tokens_per_second"] > attempt["supervised_tokens_per_second"] > 0
    assert attempt["checkpoints"] == STEPS // 4
    assert 0 < attempt["checkpoint_stall_fraction"] < 1
    assert attempt["mfu"] is None
    assert attempt["peak_memory_bytes"] > 10**8
    assert attempt["wandb"]["mode"] == "off"


@pytest.mark.parametrize(
    "fault", ["disk full", *(pytest.param(each, marks=pytest.mark.slow) for each in ("core killed", "no network"))]
)
def test_a_tracking_failure_does_not_change_the_weights(whole, job, fault, request):
    del job.environment["WANDB_MODE"]
    if fault == "no network":
        with socket.socket() as port:
            port.bind(("127.0.0.1", 0))  # and never listens
            job.environment["WANDB_BASE_URL"] = f"http://127.0.0.1:{port.getsockname()[1]}"
            job.environment["WANDB_API_KEY"] = "0" * 40
            job.stage("train")
    elif fault == "disk full":
        job.environment["WANDB_DIR"] = str(request.getfixturevalue("tiny_disk"))
        job.stage("train")
    else:
        process = train(job)
        core = next(core for _ in process.stdout for core in cores_of(process))
        core.kill()
        finish(process, 0)
    assert job.weights() == whole.weights()
    assert (job.run / "steps.csv").read_bytes() == (whole.run / "steps.csv").read_bytes()
    (attempt,) = json.loads((job.run / "provenance.json").read_text())["attempts"]
    assert attempt["wandb"]["trouble"]


def test_the_evaluation_cadence_changes_no_step(whole, job):
    job.edit("params.yaml", "eval_steps: 8", "eval_steps: 5")
    job.stage("train")
    assert job.weights() == whole.weights()
    with (job.run / "steps.csv").open(newline="") as file:
        validated = [int(line["step"]) for line in csv.DictReader(file) if line["validation_docstrings"]]
    assert validated == [5, 10, 15, 20, STEPS]


def test_a_killed_rank_is_reported_and_the_run_resumes(whole, job):
    process = train(job)
    read_until(process, "step 5/")
    ranks_of(process)[1].kill()
    assert "SIGKILL" in finish(process, 75)
    assert f"of {STEPS}" in job.stage("train")
    assert job.weights() == whole.weights()


def test_a_signal_during_a_save_leaves_a_complete_checkpoint(whole, job):
    process = train(job)
    read_until(process, "step 3/")
    deadline = time.monotonic() + 300
    while not list(job.root.glob(".checkpoints/*/.partial-step-*")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGTERM)
    assert "The last good checkpoint is step" in finish(process, 75)
    assert saved(job)
    assert not list(job.root.glob(".checkpoints/*/.partial-*"))
    job.stage("train")
    assert job.weights() == whole.weights()


@pytest.mark.slow  # in every run: the watchdog in a process that hangs (test_watchdog) and a rank that is killed, above
def test_a_hanging_rank_is_detected_and_every_stack_is_printed(whole, job):
    job.edit("params.yaml", "hang_seconds: null", "hang_seconds: 15")
    process = train(job)
    read_until(process, "step 3/")
    stopped = ranks_of(process)[1]
    stopped.send_signal(signal.SIGSTOP)  # its heartbeats end, and rank 0 waits for it in a collective
    said = "".join(read_until(process, "rank 0: ended; the same command resumes"))
    stopped.kill()  # the launcher would, after 30 s
    finish(process, 75)
    assert re.search(r"rank 0: no heartbeat for 15 s .*stop\.hang_seconds", said)
    assert "ropeway/stages/train/loop.py" in said
    job.edit("params.yaml", "hang_seconds: 15", "hang_seconds: null")
    job.stage("train")
    assert job.weights() == whole.weights()


def test_a_divergence_ends_the_run_and_names_the_last_good_checkpoint(job):
    job.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 1.0")
    job.edit("params.yaml", "spike_window_steps: 8, spike_ratio: 2.0", "spike_window_steps: 3, spike_ratio: 1.2")
    job.edit("params.yaml", "save_steps: 4", "save_steps: 1")
    said = job.stage("train", code=1)
    assert said.count("losses in a row are above stop.spike_ratio") == 1
    begin = int(re.search(r"steps (\d+) to \d+: 3 losses in a row", said)[1])
    good = int(re.search(r"The last good checkpoint is step (\d+): ", said)[1])
    assert good == begin - 1
    assert saved(job)[-1] == f"step-{good:06d}"


@contextmanager
def disk(folder, size):
    """Mount a small disk there."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
    if os.geteuid() or subprocess.run(command, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_disk(job):
    """Put the checkpoints on a disk of 80 MiB of their own."""
    with disk(job.root / ".checkpoints", "80m") as folder:
        yield folder


@pytest.fixture
def tiny_disk(tmp_path):
    """Make a disk of 64 KiB with nothing free on it."""
    with disk(tmp_path / "tiny", "64k") as folder:
        (folder / "other").write_bytes(bytes(shutil.disk_usage(folder).free))
        yield folder


def test_a_disk_too_small_for_checkpoints_is_refused_once_before_anything_is_saved(job):
    with disk(job.root / ".checkpoints", "1m"):
        said = job.stage("train", code=64)
    assert said.count("not enough disk space for this run") == 1
    assert "saving step" not in said


@pytest.mark.slow  # in every run: a save on a full disk (test_train_disk) and a disk that is too small, above
def test_a_disk_that_fills_during_training_keeps_the_previous_checkpoint(whole, job, small_disk):
    process = train(job)
    read_until(process, "warm-up step: ")
    ranks = ranks_of(process).values()
    read_until(process, "step 5/")
    for rank in ranks:  # a step takes milliseconds on a quiet machine: hold them while the disk fills
        rank.suspend()
    with (small_disk / "other").open("wb") as other:
        os.posix_fallocate(other.fileno(), 0, shutil.disk_usage(small_disk).free - 200_000)
    for rank in ranks:
        rank.resume()
    said = finish(process, 75)
    step = int(re.search(r"saving step (\d+) failed: the disk is full", said)[1])
    kept = re.search(r"(step-\d+) is intact", said)[1]
    assert int(kept[5:]) < step
    refused = job.stage("train", code=64)
    assert "not enough disk space for this run. (2 + 1) checkpoints of" in refused
    (small_disk / "other").unlink()
    assert f"resuming after step {int(kept[5:])} of" in job.stage("train")
    assert job.weights() == whole.weights()
