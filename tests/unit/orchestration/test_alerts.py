"""Alerts: reason and severity, once per run and reason, bounded retries, no secret in what is printed."""

import json
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ropeway.orchestration import alert_sender
from ropeway.orchestration.alert_sender import AlertRecord, AlertSender, read_hook, read_limits
from ropeway.orchestration.alerts import (
    DRIFT_EVENT,
    SEVERITIES,
    Alert,
    AlertLimits,
    alert_body,
    alerts_of_events,
    find_alerts,
    report_drift,
)
from ropeway.runtime.errors import ConfigError

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
LIMITS = AlertLimits(review_hours=24, late_minutes=30)
FLOWS = {"1": "retrain", "2": "review"}
URL = "http://127.0.0.1:9/api"
SECRET = "s3cr3t-path"  # noqa: S105 - of a test


def run(state, *, flow="1", hours=0.0, name="night", number="r"):
    """Return a flow run that entered a state some hours ago, as the API describes it."""
    at = (NOW - timedelta(hours=hours)).isoformat()
    return {
        "id": number,
        "name": name,
        "flow_id": flow,
        "expected_start_time": at,
        "state": {"name": state, "message": "why", "timestamp": at},
    }


def reasons(*runs):
    return [alert.reason for alert in find_alerts(runs, FLOWS, LIMITS, NOW, URL)]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (run("Failed"), ["failed"]),
        (run("TimedOut"), ["failed"]),
        (run("Crashed"), ["crashed"]),
        (run("Rejected"), ["rejected"]),
        (run("Published"), []),
        (run("Late", hours=0.4), []),
        (run("Late", hours=0.6), ["schedule_missed"]),
        (run("AwaitingConcurrencySlot", hours=9), []),  # it waits for another run
        (run("Suspended", flow="2", hours=23), ["review"]),
        (run("Suspended", flow="2", hours=25), ["review", "review_overdue"]),
        (run("Suspended", hours=25), []),  # a person suspended a training
    ],
)
def test_each_state_has_its_reasons(found, expected):
    assert reasons(found) == expected


def test_the_body_has_the_fields_of_before_a_severity_and_what_slack_reads():
    (alert,) = find_alerts([run("Failed")], FLOWS, LIMITS, NOW, URL)
    body = alert_body(alert)
    assert body["text"] == "retrain night: Failed why"
    assert body["page"] == "http://127.0.0.1:9/runs/flow-run/r"
    assert (body["severity"], body["reason"], body["id"]) == ("error", "failed", "r failed")
    (attachment,) = body["attachments"]
    assert attachment["title_link"] == body["page"]
    assert {field["title"]: field["value"] for field in attachment["fields"]} == {
        "severity": "error",
        "reason": "failed",
    }
    shouting = alert_body(Alert("r", "failed", "<!channel> " + "x" * 5000, "", ""))
    assert "<" not in shouting["text"]
    assert len(shouting["text"]) < 3000
    assert all(alert_body(Alert("r", reason, "x", "", ""))["severity"] for reason in SEVERITIES)


def test_a_missed_run_names_its_profile():
    late = run("Late", hours=1) | {"parameters": {"profile": "laptop"}}
    (alert,) = find_alerts([late], FLOWS, LIMITS, NOW, URL)
    assert "laptop" in alert.text


@contextmanager
def serving(respond):
    """Serve POSTs with `respond(path, body) -> (status, JSON)`; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, found = respond(self.path, body)
            text = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


class World:
    """A Prefect server with runs and events, and a receiver that answers with a status."""

    def __init__(self):
        self.ended, self.waiting, self.events, self.heard, self.status = [], [], [], [], 200

    def prefect(self, path, body):
        if path == "/api/events":
            self.events += body
        if path == "/api/flow_runs/filter":
            return 200, self.ended if "end_time" in body["flow_runs"] else self.waiting
        return 200, {
            "/api/flows/filter": [{"id": key, "name": name} for key, name in FLOWS.items()],
            "/api/events/filter": {"events": self.events},
        }.get(path)

    def hook(self, path, body):
        assert path == f"/{SECRET}"
        self.heard.append(body)
        return self.status, {}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Yield the world and a function that starts a sender as `ropeway server` does."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    found = World()
    with serving(found.prefect) as server, serving(found.hook) as hook:
        found.start = lambda: AlertSender(tmp_path, f"{server}/api", f"{hook}/{SECRET}", LIMITS)
        found.url = f"{server}/api"
        yield found


def test_an_alert_is_sent_once_over_repeated_states_and_restarts(world):
    sender = world.start()
    world.ended, world.waiting = [run("Failed")], [run("Suspended", flow="2", hours=1, number="v")]
    for now in (1.0, 2.0):
        sender.find(NOW)
        sender.deliver(now)
    assert [body["id"] for body in world.heard] == ["r failed", "v review"]
    world.ended = [run("Crashed"), run("Failed", number="other")]  # the first one was run again and crashed
    again = world.start()
    for later in (NOW, NOW + timedelta(hours=25), NOW + timedelta(hours=26)):
        again.find(later)
        again.deliver(3.0)
    assert [body["id"] for body in world.heard[2:]] == ["r crashed", "other failed", "v review_overdue"]


def test_drift_is_an_event_that_is_alerted_once_per_version(world):
    sender = world.start()
    for words in ("lengths: PSI 0.31, limit 0.25", "again"):
        report_drift(world.url, version="laptop@v3", digest="ab" * 32, words=words, page="http://page")
    assert {event["event"] for event in world.events} == {DRIFT_EVENT}
    for _ in range(2):
        sender.find(NOW)
        sender.deliver(1.0)
    (body,) = world.heard
    assert (body["reason"], body["severity"], body["page"]) == ("drift", "warning", "http://page")
    assert body["text"] == "laptop@v3: drift lengths: PSI 0.31, limit 0.25"
    assert alerts_of_events([{"id": "e", "event": DRIFT_EVENT}])[0].subject == "e"  # a foreign event without more


def test_a_receiver_that_fails_is_asked_again_with_pauses_and_given_up_and_its_path_is_not_printed(world, capsys):
    sender = world.start()
    world.status, world.ended = 500, [run("Failed"), run("Failed", number="second")]
    sender.find(NOW)
    sender.deliver(0.0)
    sender.deliver(9.0)  # during the pause
    assert len(world.heard) == 1
    for number in range(1, 10):
        sender.deliver(number * 1e4)
    assert [body["id"] for body in world.heard] == ["r failed"] * 10
    world.status = 200
    sender.deliver(1e6)
    assert world.heard[-1]["id"] == "second failed"
    said = capsys.readouterr().out
    assert "given up after 10 attempts" in said
    assert "500" in said
    assert SECRET not in said
    world.start().deliver(2e6)
    assert len(world.heard) == 11


def test_an_alert_that_the_receiver_refuses_does_not_hold_up_the_next_one(world, capsys):
    sender = world.start()
    world.status, world.ended = 400, [run("Failed"), run("Failed", number="second")]
    sender.find(NOW)
    sender.deliver(0.0)
    assert [body["id"] for body in world.heard] == ["r failed", "second failed"]
    assert capsys.readouterr().out.count("given up after 1 attempts") == 2
    sender.find(NOW)
    sender.deliver(1e6)
    assert len(world.heard) == 2


def test_a_receiver_that_is_down_or_slow_is_named_without_its_path_and_the_alert_is_kept(world, monkeypatch, capsys):
    monkeypatch.setattr(alert_sender, "_TIMEOUT_SECONDS", 0.2)
    release = threading.Event()
    hook, world.hook = world.hook, lambda _path, _body: (release.wait(20), (200, {}))[1]
    sender = world.start()
    world.ended = [run("Failed")]
    sender.find(NOW)
    with serving(world.hook) as slow:
        sender._hook = f"{slow}/{SECRET}"
        sender.deliver(0.0)
        release.set()
    sender._hook = f"http://127.0.0.1:9/{SECRET}"
    sender.deliver(100.0)
    said = capsys.readouterr().out
    assert said.count("cannot be reached") == 2
    assert SECRET not in said
    world.hook = hook
    world.start().deliver(0.0)
    assert [body["id"] for body in world.heard] == ["r failed"]


def test_what_happened_before_the_first_start_is_not_looked_for(world, tmp_path):
    asked = []
    answer, world.prefect = world.prefect, lambda path, body: (asked.append(body), answer(path, body))[1]
    with serving(world.prefect) as server:
        AlertSender(tmp_path, f"{server}/api", "http://127.0.0.1:9/x", LIMITS).find(datetime.now(UTC))
    since = json.loads((tmp_path / "ropeway-alerts.json").read_bytes())["since"]
    chosen = [body["flow_runs"] for body in asked if "flow_runs" in body]
    assert [one.get("end_time", one.get("expected_start_time"))["after_"] for one in chosen] == [since, since]


@pytest.mark.parametrize("days", [365, -365])
def test_alerts_that_were_sent_are_remembered_over_a_wrong_clock(days):
    record, now = AlertRecord(NOW.isoformat()), NOW
    jumps = [timedelta(), timedelta(days=days), timedelta(hours=1)]
    for number, jump in enumerate(jumps):
        record.add([Alert(str(number), "failed", "", "", "")])
        record.end(record.waiting[0], now + jump)
    assert list(record.sent) == ["0 failed", "1 failed", "2 failed"]


def test_a_first_start_by_a_clock_that_was_ahead_does_not_end_alerts(world):
    sender = world.start()
    sender._record.since = (datetime.now(UTC) + timedelta(days=365)).isoformat()
    sender.find(datetime.now(UTC))
    assert datetime.fromisoformat(sender._record.since) <= datetime.now(UTC)


ALERT = {"subject": "a", "reason": "failed", "text": "", "page": "", "at": ""}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"since": "x"}',
        '{"since": "2026-01-01", "waiting": [{"alert": {}}]}',
        '{"since": "2026-01-01", "sent": []}',
        '{"since": "2026-01-01", "sent": {"a": "x"}}',
        '{"since": "2026-01-01", "waiting": {}, "sent": {"a": 1}}',
        json.dumps({"since": "2026-01-01", "waiting": [{"attempts": 0, "alert": {**ALERT, "reason": "other"}}]}),
        '{"since": ' + "[" * 5000,
    ],
)
def test_a_damaged_record_begins_a_new_one(tmp_path, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    assert AlertRecord.load(path, NOW) == AlertRecord(NOW.isoformat())


def test_a_server_that_does_not_answer_ends_nothing_and_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setattr(alert_sender, "_POLL_SECONDS", 0.001)
    sender = AlertSender(tmp_path, URL, "http://127.0.0.1:9/x", LIMITS)
    polls = threading.Semaphore(0)
    find, sender.find = sender.find, lambda now: (polls.release(), find(now))
    sender.start()
    for _ in range(3):
        assert polls.acquire(timeout=60)
    sender.stop()
    assert capsys.readouterr().out.count("does not answer") == 1


@pytest.mark.parametrize(
    "text", ["slack", "ftp://host/x", "https://", "https://[::1", "https://h:abc", "https://h:99999", "https://.."]
)
def test_an_invalid_address_is_refused_without_being_shown(monkeypatch, text):
    monkeypatch.setenv("ROPEWAY_ALERT_URL", text)
    with pytest.raises(ConfigError, match="ROPEWAY_ALERT_URL") as caught:
        read_hook()
    assert text not in str(caught.value) or text == "https://"


def test_limits_are_of_the_environment(monkeypatch):
    assert read_limits() == AlertLimits(24, 30)
    monkeypatch.setenv("ROPEWAY_ALERT_REVIEW_HOURS", "0.5")
    monkeypatch.setenv("ROPEWAY_ALERT_LATE_MINUTES", "5")
    assert read_limits() == AlertLimits(0.5, 5)
    for wrong in ("", "0", "-1", "soon", "nan", "inf", "1e308"):
        monkeypatch.setenv("ROPEWAY_ALERT_LATE_MINUTES", wrong)
        with pytest.raises(ConfigError, match="ROPEWAY_ALERT_LATE_MINUTES"):
            read_limits()
