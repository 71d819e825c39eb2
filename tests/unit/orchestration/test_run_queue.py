"""The queue of a workspace: a run that waits says for which, and a superfluous one is canceled."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ropeway.orchestration.deployments import build_deployments, read_schedules
from ropeway.orchestration.run_queue import QueuedRun, QueueKeeper, explain_waiting, find_superfluous
from ropeway.runtime.errors import ConfigError

ROOT = Path(__file__).parents[3]
QUEUED = "AwaitingConcurrencySlot"


def queued(number, state=QUEUED, profile="b", *, by_schedule=True, **parameters):
    begun = state in ("Running", "Pending")
    since, given = f"2026-11-30T03:0{number}:00Z", {"profile": profile, **parameters}
    return QueuedRun(number, f"run {number}", profile, since, state, begun, given, by_schedule)


def test_a_waiting_run_names_the_active_one_its_profile_and_its_start():
    queue = [queued("1", "Running", "a"), queued("2"), queued("3", "Late", "c"), queued("4", "Scheduled")]
    words = "waits for run run 1 of profile a, began at 2026-11-30 03:01 UTC"
    assert explain_waiting(queue) == {"2": words, "3": words}
    assert explain_waiting(queue[1:]) == {}


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        ([queued("1"), queued("2"), queued("3")], {"1": "3", "2": "3"}),
        ([queued("1"), queued("2", profile="c")], {}),
        ([queued("1", "Running"), queued("2")], {}),
        ([queued("1", by_schedule=False), queued("2")], {}),  # a person or a changed source asked for it
        ([queued("1"), queued("2", by_schedule=False)], {}),
        ([queued("1", rehearse=True), queued("2", rehearse=False)], {}),
        ([queued("1", "Late"), queued("2", "Scheduled")], {}),
    ],
)
def test_of_scheduled_runs_that_do_the_same_the_last_one_stays(queue, expected):
    assert {number: later.number for number, later in find_superfluous(queue).items()} == expected


def test_the_reason_is_on_the_waiting_runs_page_once_and_a_superfluous_run_is_canceled():
    def run(number, kind, name, profile):
        state = {"type": kind, "name": name}
        facts = {"id": number, "name": f"run {number}", "parameters": {"profile": profile}, "auto_scheduled": True}
        return facts | {"state": state, "start_time": "2026-11-30T03:00:00Z"}

    runs = [run("1", "RUNNING", "Running", None), *(run(one, "SCHEDULED", QUEUED, "b") for one in "23")]
    posted = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.command == "POST" and not self.path.endswith("/filter"):
                posted.append((self.path, json.loads(body)))
            found = runs if self.path.endswith("/filter") else {"id": "d", "parameters": {}}
            text = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET = answer  # noqa: N815 - names of http.server

        def log_message(self, *_):
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        keeper = QueueKeeper(f"http://127.0.0.1:{served.server_port}/api", "a")
        keeper.look()
        runs.pop(1)
        keeper.look()
        served.shutdown()
    assert [path for path, _ in posted] == ["/api/flow_runs/2/set_state", "/api/logs/", "/api/artifacts/"]
    assert posted[0][1]["state"]["type"] == "CANCELLED"
    words = "waits for run run 1 of profile a, began at 2026-11-30 03:00 UTC"
    assert {(line["flow_run_id"], line["message"]) for _, (line,) in posted[1::2]} == {("3", words)}
    assert {page["flow_run_id"] for _, page in posted[2::2]} == {"3"}


@pytest.mark.parametrize(
    ("crons", "profiles", "words"),
    [
        (["b=0 3 * * *"], ["a"], "--profile b"),
        (["0 3 * * *", "0 4 * * *"], [], "already"),
        (["a=0 3 * * *", "a=0 4 * * *"], ["a"], "already"),
        (["a="], ["a"], "cron expression"),
        ([""], [], "cron expression"),
    ],
)
def test_schedules_that_contradict_each_other_are_refused(crons, profiles, words):
    with pytest.raises(ConfigError, match=words):
        read_schedules(crons, profiles)


def test_each_profile_has_its_schedule_in_the_one_deployment_that_lets_one_run_start():
    retrain, *_ = build_deployments(ROOT, read_schedules(["0 3 * * *", "b=0 5 * * *"], ["a", "b"]))
    found = [(one.schedule.cron, one.parameters, one.active) for one in retrain.schedules]
    assert found == [("0 3 * * *", {"profile": "a"}, True), ("0 5 * * *", {"profile": "b"}, True)]
    assert retrain.concurrency_limit == 1
