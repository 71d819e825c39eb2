"""Flows and servers in processes of their own, and Prefect's API asked as a browser asks it."""

import os
import select
import socket
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime

import httpx

from ropeway.runtime.lock import workspace_lock

FLOW = """
import sys
from pathlib import Path
from types import SimpleNamespace
from ropeway.orchestration import dvc_graph as graph
from ropeway.orchestration.dvc_recovery import repair_after_kill
from ropeway.orchestration.sequence import run_retrain
from ropeway.runtime.errors import RopewayError
try:
    run_retrain(Path(sys.argv[1]), use_prefect=sys.argv[2] == "prefect")
except RopewayError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)
"""
# What train does instead: a process beside it in a session of its own, and time to save when asked.
TRAINING = """
import signal, subprocess
def save(*_):
    Path("saved").write_text("checkpoint")
    os._exit(75)
signal.signal(signal.SIGTERM, save)
beside = subprocess.Popen(["sleep", "1000"], start_new_session=True)
print("training", os.getpid(), beside.pid)
while True:
    signal.pause()
"""


def await_deaths(processes, seconds=120):
    """Return once all have ended; each may take `seconds`."""
    for process in processes:
        with suppress(ProcessLookupError):
            end = os.pidfd_open(process.pid)  # readable at its death, reaped or not
            assert select.select([end], [], [], seconds)[0], f"still alive: {process}"
            os.close(end)


def check_it_saved(workspace):
    assert (workspace.root / "saved").read_text() == "checkpoint"
    with workspace_lock(workspace.root, command="a test"):
        pass


SERVE = """
import sys
from pathlib import Path
from ropeway.orchestration.prefect_server import serve_ui
serve_ui(Path(sys.argv[1]), port=int(sys.argv[2]))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(what, seconds=300):
    """Return the first true value of `what()`; a false one after `seconds`, which only a failure takes."""
    deadline = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < deadline:
        time.sleep(0.2)  # the server's own loops take seconds
    return found


class Api:
    """The session's server, asked as a browser would ask."""

    def __init__(self, url):
        self.url, self.client = url, httpx.Client(trust_env=False)
        flow = self.ask("POST", "/flows/", {"name": "automations"})
        self.flow = flow["id"]

    def ask(self, method, path, body=None):
        def once():
            answer = self.client.request(method, f"{self.url}{path}", json=body)
            return None if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE else answer  # its database is busy

        answer = wait_for(once).raise_for_status()
        return answer.json() if answer.content else None

    def start(self):
        state = {"type": "RUNNING", "name": "Running"}
        return self.ask("POST", "/flow_runs/", {"flow_id": self.flow, "state": state})["id"]

    def beat(self, run):
        event = {
            "id": str(uuid.uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": "prefect.flow-run.heartbeat",
            "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
        }
        self.ask("POST", "/events", [event])

    def set_state(self, run, kind, name):
        self.ask("POST", f"/flow_runs/{run}/set_state", {"state": {"type": kind, "name": name}, "force": True})

    def state(self, run):
        return self.ask("GET", f"/flow_runs/{run}")["state"]["name"]
