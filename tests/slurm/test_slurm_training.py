"""Training in a real Slurm of two nodes: submitted from a login node, or by a run inside an allocation."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from ropeway.runtime import launcher
from ropeway.runtime.lock import is_held

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


ROOT = Path(__file__).parents[2]


def names_of_nodes(job):
    return {process.environ()["SLURMD_NODENAME"] for process in job.ranks()}


def test_a_run_without_an_allocation_trains_on_both_nodes_and_publishes(slurm_job, long_job):
    process = slurm_job.start_until("step 80/", "ropeway", "run", "--no-prefect")
    assert names_of_nodes(slurm_job) == {"node1", "node2"}
    ((number, state),) = slurm_job.jobs()
    assert state == "RUNNING"
    assert slurm_job.cluster.command("squeue", "--noheader", "--format=%j").startswith("ropeway-tiny-")
    shown = json.loads(slurm_job.do("ropeway", "status", "--json"))["slurm"]
    assert (str(shown["job"]), shown["state"], shown["nodes"]) == (number, "RUNNING", "node[1-2]")
    printed = slurm_job.finish(process)
    assert "tiny: Published" in printed
    assert slurm_job.weights() == long_job.weights
    assert not list((slurm_job.root / ".work").glob("*slurm*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stopped_or_killed_run_saves_ends_its_job_and_resumes_to_the_same_bytes(slurm_job, long_job, number, code):
    process = slurm_job.start_until("step 96/", "ropeway", "run", "--no-prefect")
    process.send_signal(number)
    slurm_job.finish(process, code=code)
    slurm_job.wait_until(lambda: not is_held(slurm_job.root))  # the stages of a killed run save
    assert "stopped after step" in (slurm_job.root / ".work" / "logs" / "train.log").read_text()
    assert slurm_job.steps()[-1] % 40  # saved because of the stop
    assert (slurm_job.ranks(), slurm_job.jobs()) == ([], [])
    assert "resuming after step" in slurm_job.do("dvc", "repro", "train")
    assert slurm_job.weights() == long_job.weights


def test_a_preempted_job_saves_and_another_one_resumes_to_the_same_bytes(slurm_job, long_job):
    process = slurm_job.start_until("step 96/")
    until = slurm_job.root / ".work" / "urgent-may-end"
    urgent = ["--partition=urgent", "--nodes=2", "--output=/dev/null"]
    slurm_job.cluster.command("sbatch", *urgent, f"--wrap=until test -e {until}; do sleep 0.1; done")
    slurm_job.follow_until(process, "PENDING, reason Resources")
    until.touch()
    printed = slurm_job.finish(process)
    assert "resuming after step" in printed
    assert printed.count("ranks; sbatch") == 2
    assert slurm_job.weights() == long_job.weights


def test_a_job_whose_node_dies_is_requeued_and_resumes_to_the_same_bytes(slurm_job, long_job, cluster):
    process = slurm_job.start_until("step 96/")
    cluster.kill_node("node2")
    cluster.wait_until(lambda: "down" in cluster.command("sinfo", "--noheader", "--nodes=node2", "--format=%T"), 90)
    cluster.start_node("node2")
    printed = slurm_job.finish(process)
    assert "resuming after step" in printed
    assert slurm_job.weights() == long_job.weights


def test_a_job_that_the_administrator_cancels_is_not_submitted_again(slurm_job):
    process = slurm_job.start_until("step 96/")
    ((number, _),) = slurm_job.jobs()
    slurm_job.cluster.command("scancel", number)
    printed = slurm_job.finish(process, code=1)
    assert f"Slurm job {number} was canceled, not by this run" in printed
    assert slurm_job.steps()[-1] % 40
    assert slurm_job.ranks() == []


def test_a_job_that_waits_says_why_and_is_canceled_with_its_run(slurm_job):
    slurm_job.environment["ROPEWAY_SLURM_ARGS"] += " --begin=now+1hour"
    process = slurm_job.start_until("reason BeginTime")
    assert json.loads(slurm_job.do("ropeway", "status", "--json"))["slurm"]["reason"] == "BeginTime"
    process.send_signal(signal.SIGTERM)
    slurm_job.finish(process, code=143)  # nothing was there to be saved
    assert slurm_job.jobs() == []


def test_exit_codes_of_sbatch_and_of_the_ranks_come_back(slurm_job):
    slurm_job.edit("params.yaml", "save_steps: 40", "save_steps: 40\n  fused_kernels: true")  # refused by the ranks
    assert "fused_kernels" in slurm_job.do("ropeway", "stage", "train", code=64)
    slurm_job.environment["ROPEWAY_SLURM_ARGS"] = "--ntasks=2 --partition=none"
    assert "invalid partition" in slurm_job.do("ropeway", "stage", "train", code=64)
    assert not list((slurm_job.root / ".work").glob("*slurm*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_code_of_the_one_rank_that_fails_comes_back(cluster, tmp_path, monkeypatch, rank):
    monkeypatch.setattr(launcher, "RANK_MODULE", "tests.support.failing_rank")
    (tmp_path / ".work").mkdir()
    planned = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost"}
    command = launcher.build_launch_command(planned, [str(tmp_path), str(rank)], ranks=2, port=1)
    environment = {**os.environ, **cluster.environment}
    done = subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 64, done.stderr
    assert list((tmp_path / ".work").iterdir()) == []


def test_the_job_of_a_killed_login_node_is_waited_for_and_trains_once(slurm_job, long_job):
    slurm_job.kill_login(slurm_job.start_until("step 1/"))
    ((number, _),) = slurm_job.jobs()
    printed = slurm_job.do("ropeway", "stage", "train")
    assert f"Slurm job {number} of an earlier start" in printed
    assert "ranks; sbatch" not in printed
    assert slurm_job.weights() == long_job.weights


def test_the_job_of_a_killed_login_node_saves_before_a_training_elsewhere_starts(slurm_job, long_job):
    slurm_job.kill_login(slurm_job.start_until("step 1/"))
    slurm_job.environment |= {"ROPEWAY_SLURM": "0", "ROPEWAY_RANKS": "2"}
    printed = slurm_job.do("ropeway", "stage", "train")
    assert "is not the one that this start needs" in printed
    assert "resuming after step" in printed
    assert slurm_job.jobs() == []
    assert slurm_job.weights() == long_job.weights


def test_a_run_inside_an_allocation_saves_at_a_signal_and_resumes_in_the_next(slurm_job, long_job, cluster):
    def submit():
        log = slurm_job.root / ".work" / "allocation.log"
        words = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}", "--open-mode=append"]
        slurm_job.environment |= {"ROPEWAY_SLURM": "0"}
        number = slurm_job.do(*words, "--wrap=exec ropeway run --no-prefect").strip()
        return log, number

    def state(number):
        return cluster.command("scontrol", "--oneliner", "show", "job", number).partition("JobState=")[2].split()[0]

    log, number = submit()
    slurm_job.wait_until(lambda: log.exists() and "step 96/" in log.read_text(), 120)
    cluster.command("scancel", "--batch", "--signal=TERM", number)
    slurm_job.wait_until(lambda: state(number) == "FAILED")
    assert slurm_job.steps()[-1] % 40
    assert slurm_job.ranks() == []
    log, number = submit()
    slurm_job.wait_until(lambda: state(number) in ("FAILED", "COMPLETED"), 180)
    assert "tiny: Published" in log.read_text()
    assert slurm_job.weights() == long_job.weights
    assert os.environ.get("SLURM_JOB_ID") is None
