"""Slurm's options, states, and what follows from the end of a job; no Slurm is needed."""

import json
from types import SimpleNamespace

import pytest

from ropeway.runtime import slurm, slurm_job
from ropeway.runtime.devices import count_ranks, spans_machines
from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.runtime.grace import StopFiles
from ropeway.runtime.launcher import build_launch_command, rank_environment
from ropeway.runtime.slurm import JobRecord, JobState, count_job_tasks, parse_state, submits_jobs
from ropeway.runtime.slurm_job import judge_end, settle_earlier_job

LOGIN = {"ROPEWAY_SLURM": "1", "ROPEWAY_SLURM_ARGS": "-N 2 --ntasks-per-node=4"}
NAME = "ropeway-tiny-0123456789ab"


@pytest.mark.parametrize(
    ("options", "tasks"),
    [("--nodes=2 --ntasks-per-node=8", 16), ("-N2 -p gpu", 2), ("--ntasks 4 --nodes=2", 4), ("--ntasks-per-node=8", 8)],
)
def test_ranks_are_the_tasks_that_the_options_ask_for(options, tasks):
    assert count_ranks({"ROPEWAY_SLURM": "1", "ROPEWAY_SLURM_ARGS": options}) == tasks


@pytest.mark.parametrize("options", ["", "--partition=gpu", "--nodes=2-4", "--nodes=0", "--nodes 'x", "--nodes"])
def test_options_without_a_fixed_number_of_tasks_are_refused(options):
    with pytest.raises(ConfigError, match="ROPEWAY_SLURM_ARGS"):
        count_job_tasks({"ROPEWAY_SLURM_ARGS": options})


@pytest.mark.parametrize("option", ["--output=x", "-o x", "-ox", "--wrap=x", "--array=1-2", "--chdir /"])
def test_options_that_ropeway_sets_are_refused(option):
    with pytest.raises(ConfigError, match="is set by Ropeway"):
        slurm.job_options({"ROPEWAY_SLURM_ARGS": f"--nodes=2 {option}"})


def test_a_run_inside_an_allocation_submits_nothing():
    assert submits_jobs(LOGIN)
    assert not submits_jobs({**LOGIN, "SLURM_JOB_ID": "7"})
    with pytest.raises(ConfigError, match="ROPEWAY_SLURM"):
        submits_jobs({"ROPEWAY_SLURM": "yes"})


def test_the_launcher_submits_a_job_and_leaves_the_device_to_its_nodes():
    assert spans_machines(LOGIN)
    planned = rank_environment(LOGIN, ranks=8)
    assert {"DS_ACCELERATOR", "OMP_NUM_THREADS"}.isdisjoint(planned)
    command = build_launch_command(planned, ["/w", "tiny", "ab"], ranks=8, port=1)
    assert command[1:] == ["-m", "ropeway.runtime.slurm_job", "8", "/w", "tiny", "ab"]


def test_srun_gets_the_cores_of_a_task(monkeypatch):
    monkeypatch.setattr("ropeway.runtime.launcher.find_node_address", lambda _node: "10.0.0.1")
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "no.such.host.invalid"}
    command = build_launch_command({**job, "SLURM_CPUS_PER_TASK": "6"}, ["/w"], ranks=2, port=5)
    assert "--cpus-per-task=6" in command
    assert "--export=ALL,MASTER_ADDR=10.0.0.1,MASTER_PORT=5" in command
    assert rank_environment({**job, "SLURM_CPUS_PER_TASK": "6"}, ranks=2)["OMP_NUM_THREADS"] == "6"


def test_a_state_is_read_with_signal_reason_and_nodes():
    text = "JobId=3 JobName=x JobState=FAILED Reason=NonZeroExitCode Restarts=2 ExitCode=0:9 NodeList=n[1-2] WorkDir=/w"
    assert parse_state(text) == JobState("FAILED", "NonZeroExitCode", 137, 2, "n[1-2]")


@pytest.mark.parametrize(
    ("state", "code", "has_progressed", "expected"),
    [
        ("COMPLETED", 0, False, 0),
        ("PREEMPTED", None, False, None),
        ("NODE_FAIL", None, False, None),
        ("FAILED", 75, True, None),
        ("FAILED", 75, False, 75),
        ("TIMEOUT", None, True, None),
        ("TIMEOUT", None, False, 64),
        ("CANCELLED", 75, True, 1),
        ("OUT_OF_MEMORY", 137, True, 64),
        ("DEADLINE", None, False, 64),
        ("FAILED", 65, True, 65),
        ("FAILED", 137, True, 137),
    ],
)
def test_the_end_of_a_job_decides_what_follows(state, code, has_progressed, expected):
    assert judge_end(1, JobState(state), code, has_progressed=has_progressed).code == expected


def test_a_job_that_slurm_forgot_ends_with_the_code_that_it_wrote():
    assert judge_end(1, None, 0, has_progressed=False).code == 0
    assert judge_end(1, None, 64, has_progressed=False).code == 64
    assert judge_end(1, None, None, has_progressed=True).code == 75


@pytest.fixture
def recorded(tmp_path):
    """Return a workspace whose job 7 was submitted by a start that was killed."""
    (tmp_path / ".work").mkdir()
    options = slurm.job_options(LOGIN)
    JobRecord(7, NAME, 8, tuple(options), "2026-11-30T12:00:00+00:00").write(tmp_path)
    return tmp_path


def answer(monkeypatch, *states):
    """Let Slurm answer with these states, the last one again and again; return the commands that were given."""
    given, left = [], list(states)

    def run(*command, given_text="", **_):
        given.append(command)
        if command[0] != "scontrol":
            return SimpleNamespace(returncode=0, stdout=f"9|{given_text}", stderr="")
        state = left.pop(0) if len(left) > 1 else left[0]
        if state is None:
            return SimpleNamespace(returncode=1, stdout="", stderr="slurm_load_jobs error: Invalid job id specified")
        if state == "silent":
            return SimpleNamespace(returncode=1, stdout="", stderr="Unable to contact slurm controller")
        return SimpleNamespace(returncode=0, stdout=f"JobId=7 JobState={state} Reason=None", stderr="")

    monkeypatch.setattr(slurm, "_run", run)
    monkeypatch.setattr(slurm_job.time, "sleep", lambda _: None)
    return given


def test_a_job_of_the_same_run_is_waited_for(recorded, monkeypatch):
    given = answer(monkeypatch, "PENDING")
    assert settle_earlier_job(recorded, NAME, 8, LOGIN)
    assert [command[0] for command in given] == ["scontrol"]
    assert JobRecord.read(recorded).job == 7


@pytest.mark.parametrize(
    ("name", "ranks", "environment"),
    [
        ("another", 8, LOGIN),
        (NAME, 4, LOGIN),
        (NAME, 8, {"ROPEWAY_SLURM": "0"}),
        (NAME, 8, {**LOGIN, "ROPEWAY_SLURM_ARGS": "--ntasks=8"}),
    ],
)
def test_a_job_of_another_run_saves_and_ends_before_this_one_starts(recorded, monkeypatch, name, ranks, environment):
    given = answer(monkeypatch, "RUNNING", "RUNNING", "COMPLETED")
    assert not settle_earlier_job(recorded, name, ranks, environment)
    assert ("scancel", "--signal=TERM", "7") in given
    assert JobRecord.read(recorded) is None


def test_a_job_that_waits_in_the_queue_is_canceled_at_once(recorded, monkeypatch):
    given = answer(monkeypatch, "PENDING", "CANCELLED")
    assert not settle_earlier_job(recorded, "another", 8, LOGIN)
    assert ("scancel", "--quiet", "7") in given


def test_nothing_starts_while_slurm_does_not_answer(recorded, monkeypatch):
    answer(monkeypatch, "silent")
    with pytest.raises(TemporaryError, match="may still train"):
        settle_earlier_job(recorded, NAME, 8, LOGIN)
    assert JobRecord.read(recorded).job == 7


def test_a_job_that_slurm_forgot_is_no_longer_recorded(recorded, monkeypatch):
    answer(monkeypatch, None)
    assert not settle_earlier_job(recorded, NAME, 8, LOGIN)
    assert JobRecord.read(recorded) is None


def test_a_job_whose_id_was_not_recorded_is_found_by_name_and_folder(recorded, monkeypatch):
    found = JobRecord.read(recorded)
    JobRecord(None, found.name, found.ranks, found.options, found.since).write(recorded)
    answer(monkeypatch, "RUNNING")
    lines = f"5|/elsewhere\n9|{recorded}\n"
    fake = slurm._run

    def run(*command, **more):
        return (
            SimpleNamespace(returncode=0, stdout=lines, stderr="") if command[0] == "squeue" else fake(*command, **more)
        )

    monkeypatch.setattr(slurm, "_run", run)
    assert settle_earlier_job(recorded, NAME, 8, LOGIN)
    assert JobRecord.read(recorded).job == 9


def test_the_stop_file_of_a_recorded_job_is_kept(recorded):
    files = StopFiles(recorded / ".work", "train")
    files.open()
    files.remove()
    assert files.request_stop()
    JobRecord.read(recorded).remove(recorded)
    files.remove()
    assert not files.request_stop()


def test_a_damaged_record_is_refused(recorded):
    slurm.record_path(recorded).write_text(json.dumps({"job": 7}))
    with pytest.raises(ConfigError, match="squeue"):
        JobRecord.read(recorded)
