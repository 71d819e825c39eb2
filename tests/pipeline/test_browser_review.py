"""A review as a user does it: `server`, `serve` and `run` on the command line, the rest in a real browser."""

import os
import re
import socket
import subprocess
import sys
import time

import httpx
import pytest

from ropeway.orchestration.prefect_server import find_server
from ropeway.registry import Registry

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800)]
ANSWER = {"decision": "approve", "reviewer": "anna", "comment": "reads well"}


def wait_for(what, seconds=300):
    deadline = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert found, f"waited {seconds} s"
    return found


class CommandLine:
    """Runs `ropeway` commands in the workspace."""

    def __init__(self, root, log):
        self.root, self.log, self.started = root, log, []
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}

    def start(self, *command):
        with self.log.open("ab") as log:
            started = subprocess.Popen(
                [sys.executable, "-m", "ropeway.cli.main", *command],
                cwd=self.root,
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        self.started.append(started)

    def run(self):
        """Return what `ropeway run` printed."""
        return subprocess.run(
            [sys.executable, "-m", "ropeway.cli.main", "run"],
            cwd=self.root,
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    def stop_all(self):
        """Stop the started processes, the last one first: `serve` deregisters at the server."""
        for each in reversed(self.started):
            each.terminate()
            try:
                each.wait(90)
            except subprocess.TimeoutExpired:
                each.kill()
                each.wait()


@pytest.fixture
def commands(flow_workspace, tmp_path):
    commands = CommandLine(flow_workspace.root, tmp_path / "log")
    yield commands
    commands.stop_all()


def has_report(api, run):
    asked = {"artifacts": {"flow_run_id": {"any_": [run]}, "key": {"any_": ["laptop-review"]}}}
    answer = httpx.post(f"{api}/artifacts/filter", json=asked, trust_env=False)
    return answer.status_code == httpx.codes.OK and answer.json()  # otherwise the server's database is busy


def test_a_review_in_the_browser_moves_the_production_alias(commands, tmp_path):
    from tests.support.browser_walk import fill_form, open_browser, screenshot_report, screenshot_run

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    commands.start("server", "--port", str(port))
    api = wait_for(lambda: find_server(commands.root))
    commands.start("serve")
    wait_for(lambda: "being served" in commands.log.read_text())
    said = " ".join(commands.run().split())  # a long line is wrapped
    run = re.search(r"run page http://[^/]+/runs/flow-run/([0-9a-f-]{36})", said)[1]
    review = re.search(r"answer the review at http://[^/]+/runs/flow-run/([0-9a-f-]{36})", said)[1]

    url = api.removesuffix("/api")
    registry = Registry.open((commands.root / "registry").as_uri())
    with open_browser() as page:
        shown = screenshot_run(page, url, run, tmp_path / "run.png")
        assert {"identity", "fetch", "train", "evaluate", "package", "publish"} <= set(shown.split())
        wait_for(lambda: has_report(api, review))  # the page loads artifacts once, when it is opened
        shown = screenshot_report(page, url, review, tmp_path / "report.png")
        assert "Promote laptop@v1 to production?" in shown
        assert registry.artifact("laptop").alias("production").digest is None
        fill_form(page, url, review, ANSWER, tmp_path / "form.png")
    candidate = registry.artifact("laptop").alias("candidate").digest
    wait_for(lambda: registry.artifact("laptop").alias("production").digest == candidate)
    (event,) = registry.artifact("laptop").alias("production").events
    assert (event["by"], event["reason"]) == ("anna", "reads well")
    assert event["review"]["via"] == f"flow run {review}"
