"""A run that is cancelled or suspended in the Prefect UI, and a server that is unreachable for 90 seconds."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import psutil
import pytest

from tests.support.flow_processes import (
    FLOW,
    SERVE,
    TRAINING,
    Api,
    await_deaths,
    check_it_saved,
    free_port,
    wait_for,
)
from tests.support.processes import is_server, kill_all

pytestmark = pytest.mark.filterwarnings(
    # dvc 3.67.1 (repo/trie.py, repo/graph.py) on pygtrie 2.6
    "ignore:_NoneStep.value will soon raise:DeprecationWarning"
)
RUNNER = (
    "import sys; from pathlib import Path; from ropeway.orchestration.deployments import serve_flows; "
    "serve_flows(Path(sys.argv[1]))"
)
TELLING = TRAINING.replace("while True:", "Path('begun').write_text('training')\nwhile True:")
WAITING = "Path('begun').write_text('training')\nPath('may-end').read_text()\n"
OUTAGE_SECONDS = 90


@pytest.fixture
def start():
    """Start Python programs in sessions of their own; whatever a failing test leaves of them is killed."""
    started = []

    def begin(program, *arguments, **environment):
        command = [sys.executable, "-u", "-c", program, *arguments]
        told = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True, **told))
        return started[-1]

    yield begin
    for each in started:
        with suppress(ProcessLookupError):
            os.killpg(each.pid, signal.SIGKILL)
        each.communicate()


@pytest.fixture
def open_api():
    """Ask servers by their addresses."""
    opened = []

    def begin(url):
        opened.append(Api(url))
        return opened[-1]

    yield begin
    for each in opened:
        each.client.close()


def break_training(workspace, program):
    workspace.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 3e-3")
    workspace.trouble("train", program)
    os.mkfifo(workspace.root / "begun")


def await_training(workspace, describe_end):
    """Return once the stage trains; fail at once with what `describe_end()` says when the run has ended before."""
    begun = os.open(workspace.root / "begun", os.O_RDONLY | os.O_NONBLOCK)

    def has_begun():
        with suppress(BlockingIOError):
            if os.read(begun, 100):
                return True
        if end := describe_end():
            pytest.fail(f"the run ended before it trained: {end}")
        return False

    try:
        assert wait_for(has_begun), "the run did not come to training"
    finally:
        os.close(begun)


def end_of_process(process):
    """Return the exit code and output of a process that has ended, else None."""
    return None if process.poll() is None else f"exit code {process.returncode}\n{process.communicate()[0]}"


def end_of_run(api, run, runner):
    """Return state and log of a served run that has ended, or the end of its runner; else None."""
    state = api.ask("GET", f"/flow_runs/{run}")["state"]
    if state["type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
        return end_of_process(runner)
    log = api.ask("POST", "/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC"})
    return "\n".join([f"{state['name']}: {state['message']}", *(entry["message"] for entry in log)])


def serve_run(start, api, workspace, url):
    """Serve the flows and start one run; return (the runner's process, the run's id), once it trains."""
    break_training(workspace, TELLING)
    runner = start(RUNNER, str(workspace.root), PREFECT_API_URL=url)
    assert any(line.startswith("serving retrain") for line in runner.stdout)

    def served():
        found = api.ask("POST", "/deployments/filter", {"deployments": {"name": {"any_": ["retrain"]}}})
        here = [each for each in found if each["parameters"].get("root") == str(workspace.root)]
        return here and here[0]["status"] == "READY" and here[0]["id"]

    run = api.ask("POST", f"/deployments/{wait_for(served)}/create_flow_run", {})["id"]
    await_training(workspace, lambda: end_of_run(api, run, runner))
    return runner, run


def test_a_served_run_that_is_cancelled_saves_and_leaves_no_process(start, made_workspace, on_prefect, open_api):
    api = open_api(on_prefect)
    runner, run = serve_run(start, api, made_workspace, on_prefect)
    members = psutil.Process(runner.pid).children(recursive=True)
    assert len(members) > 3  # the flow's process, supervisor, dvc, the stage and what it started
    began = time.monotonic()
    api.set_state(run, "CANCELLING", "Cancelling")
    await_deaths(members)
    print(f"last process gone {time.monotonic() - began:.1f} s after the cancel")
    assert wait_for(lambda: api.state(run) == "Cancelled")
    check_it_saved(made_workspace)


def test_a_suspended_served_run_saves_and_resumes(start, made_workspace, on_prefect, open_api):
    api = open_api(on_prefect)
    runner, run = serve_run(start, api, made_workspace, on_prefect)
    members = psutil.Process(runner.pid).children(recursive=True)
    limit = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    # What the page's Suspend sends. Source: Prefect 3.9.1's UI, FlowRunSuspendModal.
    details = {"pause_timeout": limit, "pause_reschedule": True}
    state = {"type": "PAUSED", "name": "Suspended", "state_details": details}
    assert api.ask("POST", f"/flow_runs/{run}/set_state", {"state": state})["status"] == "ACCEPT"
    await_deaths(members)
    assert api.state(run) == "Suspended"
    check_it_saved(made_workspace)
    made_workspace.trouble("train", None)
    assert api.ask("POST", f"/flow_runs/{run}/resume", {})["status"] == "ACCEPT"
    assert wait_for(lambda: api.state(run) in ("Published", "Failed", "Crashed") and api.state(run)) == "Published"


def test_a_temporary_server_that_is_killed_is_started_again_and_the_run_is_published(start, own_prefect):
    break_training(own_prefect, WAITING)
    os.mkfifo(own_prefect.root / "may-end")
    flow = start(FLOW, str(own_prefect.root), "prefect")
    await_training(own_prefect, lambda: end_of_process(flow))
    killed = [one for one in psutil.Process(flow.pid).children(recursive=True) if is_server(one)]
    assert killed
    kill_all(killed)
    (own_prefect.root / "may-end").open("w").close()
    said, _ = flow.communicate(timeout=500)
    assert flow.returncode == 0, said
    assert said.count("the temporary Prefect server exited; restarting it") == 1
    assert "Published" in said


@pytest.mark.slow
def test_a_run_survives_a_server_outage(start, own_prefect, open_api):
    break_training(own_prefect, WAITING)
    os.mkfifo(own_prefect.root / "may-end")
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"

    def serve():
        server = start(SERVE, str(own_prefect.root), str(port))
        assert any(line.startswith("Prefect UI:") for line in server.stdout)
        return server

    server = serve()
    flow = start(FLOW, str(own_prefect.root), "prefect", PREFECT_API_URL=url)
    await_training(own_prefect, lambda: end_of_process(flow))
    for process in (*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)):
        process.kill()
    (own_prefect.root / "may-end").open("w").close()  # the stage ends while no server answers
    time.sleep(OUTAGE_SECONDS)  # the outage itself
    assert flow.poll() is None
    serve()
    back = time.monotonic()
    said, _ = flow.communicate(timeout=600)
    print(f"the run ended {time.monotonic() - back:.0f} s after the server was back")
    assert flow.returncode == 0, said
    assert said.count(f"the Prefect server at {url} does not answer") == said.count("answers again") == 1
    api = open_api(url)
    runs = api.ask("POST", "/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})
    assert runs[0]["state_name"] == "Published"
    tasks = api.ask("POST", "/task_runs/filter", {"flow_runs": {"id": {"any_": [runs[0]["id"]]}}})
    assert {"train", "evaluate", "package"} <= {each["name"] for each in tasks}
    assert {each["state_type"] for each in tasks} == {"COMPLETED"}
