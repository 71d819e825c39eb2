"""Whatever is killed, no process of the run survives, a terminated stage can save, and the next run resumes."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ropeway.orchestration import dvc_graph as graph
from ropeway.orchestration.dvc_recovery import repair_after_kill
from ropeway.orchestration.guarded_dvc import COMMAND as DVC
from ropeway.orchestration.sequence import run_retrain
from ropeway.runtime.errors import TemporaryError
from tests.support.flow_processes import FLOW, TRAINING, await_deaths, check_it_saved
from tests.support.processes import command_of, is_server

pytestmark = pytest.mark.filterwarnings(
    # dvc 3.67.1 (repo/trie.py, repo/graph.py) on pygtrie 2.6
    "ignore:_NoneStep.value will soon raise:DeprecationWarning"
)


class Running:
    """A flow in a process of its own, come as far as training."""

    def __init__(self, workspace, mode, training=TRAINING):
        workspace.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 3e-3")
        workspace.trouble("train", training)
        self.flow = subprocess.Popen(
            [sys.executable, "-u", "-c", FLOW, str(workspace.root), mode],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        for line in self.flow.stdout:
            if line.startswith("  training "):
                break
        else:
            raise AssertionError("the flow ended before training")
        self.members = psutil.Process(self.flow.pid).children(recursive=True)
        assert {int(word) for word in line.split()[1:]} <= {process.pid for process in self.members}

    def find_dvc(self):
        """Return the member that runs dvc; a supervisor names it too, but later."""
        return next(process for process in self.members if command_of(process)[1:3] == list(DVC[1:]))

    def await_end(self):
        """Wait for the death of each member; return what the flow printed after training began."""
        await_deaths(self.members)
        return self.flow.communicate(timeout=300)[0]


@pytest.fixture
def start():
    """Start flows; whatever a failing test leaves of them goes with their flow."""
    flows = []

    def begin(*arguments):
        flows.append(Running(*arguments))
        return flows[-1]

    yield begin
    for running in flows:
        running.flow.kill()
        running.flow.communicate()


def cut_in_a_word(lock):
    """Return a dvc.lock that ends where YAML cannot; cut elsewhere it is one that knows less."""
    return lock[: lock.rindex(b"md5:") + 2]


# In every run: a killed flow whose stage saves, and one on Prefect that gets TERM, below.
@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGKILL, signal.SIGTERM))]
)
def test_a_terminated_flow_leaves_no_process(start, made_workspace, number):
    running = start(made_workspace, "plain")
    running.flow.send_signal(number)
    running.await_end()
    code = running.flow.wait(120)
    assert code == {signal.SIGTERM: 128 + signal.SIGTERM}.get(number, -number)
    check_it_saved(made_workspace)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_terminated_dvc_ends_its_stage_and_the_flow_does_not_retry_it(start, made_workspace, number):
    running = start(made_workspace, "plain")
    running.find_dvc().send_signal(number)
    words = running.await_end()
    assert running.flow.wait(120) == TemporaryError.exit_code
    assert f"StoppedError: stage train: dvc was ended from outside ({number.name})" in words
    assert made_workspace.calls() == ["train"]
    check_it_saved(made_workspace)


def test_a_killed_flow_keeps_its_lock_while_its_stage_saves_and_the_next_run_resumes(start, made_workspace):
    os.mkfifo(made_workspace.root / "may-save")
    slow = TRAINING.replace("    Path(", "    Path('may-save').read_text()\n    Path(")
    running = start(made_workspace, "plain", slow)
    running.flow.kill()
    running.flow.wait()
    saving = (made_workspace.root / "may-save").open("w")  # returns once the stage has begun to save
    with saving, pytest.raises(TemporaryError, match="it was killed and its stages are still saving"):
        run_retrain(made_workspace.root, use_prefect=False)
    running.await_end()
    check_it_saved(made_workspace)
    made_workspace.trouble("train", None)
    made_workspace.calls()
    assert run_retrain(made_workspace.root, use_prefect=False).publication.version == "laptop@v2"
    assert made_workspace.calls() == ["train", "evaluate", "package"]


@pytest.mark.parametrize(
    ("names", "empty", "mode"),
    [
        ((".dvc/tmp/rwlock", "dvc.lock"), True, "plain"),
        pytest.param((".dvc/tmp/rwlock", "dvc.lock"), True, "prefect", marks=pytest.mark.slow),
        pytest.param(("dvc.lock",), False, "plain", marks=pytest.mark.slow),
        (("dvc.lock",), False, "prefect"),
    ],
)
def test_files_a_killed_dvc_truncated_are_rewritten_without_running_a_stage(
    made_workspace, mode, names, empty, request, capsys
):
    if mode == "prefect":
        request.getfixturevalue("on_prefect")
    paths, lock = [made_workspace.root / name for name in names], made_workspace.root / "dvc.lock"
    whole = lock.read_bytes()
    for path in paths:
        path.write_bytes(b"" if empty else cut_in_a_word(path.read_bytes()))
    result = run_retrain(made_workspace.root, use_prefect=mode == "prefect")
    said = capsys.readouterr().out
    for path in paths:
        assert f"removed {path}: " in said
    assert made_workspace.calls() == []
    assert result.publication.version == "laptop@v1"
    assert lock.read_bytes() == whole


def test_files_a_running_dvc_writes_are_not_touched(made_workspace):
    path = made_workspace.root / "dvc.lock"
    path.write_bytes(cut_in_a_word(path.read_bytes()))
    with graph.exclusive(made_workspace.root), pytest.raises(graph.BusyError):
        repair_after_kill(made_workspace.root)
    assert path.exists()


def test_a_killed_flow_on_prefect_leaves_no_temporary_server(start, own_prefect):
    running = start(own_prefect, "prefect")
    assert any(map(is_server, running.members))
    running.flow.kill()
    running.await_end()
    check_it_saved(own_prefect)


def test_a_flow_on_prefect_that_gets_sigterm_ends_its_stage_and_is_shown_as_crashed(start, made_workspace, on_prefect):
    running = start(made_workspace, "prefect")
    running.flow.terminate()
    running.await_end()
    assert running.flow.wait(120) == 128 + signal.SIGTERM
    check_it_saved(made_workspace)
    import httpx

    with httpx.Client(trust_env=False) as client:
        run = client.post(f"{on_prefect}/flow_runs/filter", json={"sort": "START_TIME_DESC", "limit": 1}).json()[0]
    assert run["state_name"] == "Crashed"


def test_a_flow_waits_for_another_dvc_that_holds_the_locks(made_workspace, monkeypatch, capsys, request):
    os.mkfifo(made_workspace.root / "may-end")
    made_workspace.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 3e-3")
    made_workspace.trouble("train", "print('begun', flush=True)\nPath('may-end').read_text()")
    command = [sys.executable, "-m", "dvc", "repro", "train"]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    person = subprocess.Popen(command, cwd=made_workspace.root, stdout=subprocess.PIPE, text=True)
    request.addfinalizer(person.communicate)
    request.addfinalizer(person.kill)
    assert any(line.startswith("begun") for line in person.stdout)

    def let_it_end(_seconds):
        (made_workspace.root / "may-end").open("w").close()
        person.wait(300)

    monkeypatch.setattr("ropeway.orchestration.dvc_stage.time", SimpleNamespace(sleep=let_it_end))
    result = run_retrain(made_workspace.root, use_prefect=False)
    assert "another dvc process is running in this workspace" in capsys.readouterr().out
    assert made_workspace.calls() == ["train", "evaluate", "package"]  # the person's run was not made again
    assert result.stages["train"] == "Unchanged"
