"""A watch asks for a run only if a source changed, once per change, and names what changed."""

import json
import os
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from ropeway.cli.main import app
from ropeway.orchestration import source_watcher
from ropeway.orchestration.source_watch import (
    SourceLook,
    WatchState,
    describe_changes,
    find_baseline,
    has_recorded_since,
    identify_package,
    judge_look,
    look_at_sources,
    parse_interval,
    state_path,
    used_by_active_run,
)
from ropeway.orchestration.source_watcher import EVENT, SourceWatcher, notify_data
from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.runtime.lock import workspace_lock
from tests.support.shipped_params import read_shipped_params

OLD, NEW = ({"docs": {"kind": "files", "files": {"a.jsonl": digit * 64}}} for digit in "12")
CHANGE = {"docs": "a.jsonl 111111111111 -> 222222222222"}


def test_a_change_is_acted_on_once_two_looks_agree():
    state = WatchState()
    assert judge_look(state, SourceLook(OLD), OLD, None).action == "nothing"
    found = judge_look(state, SourceLook(NEW), OLD, None)
    assert (found.action, found.changed) == ("settle", CHANGE)
    assert judge_look(state, SourceLook(NEW), OLD, None).action == "run"


def test_a_source_that_keeps_changing_does_not_settle_and_one_that_is_back_starts_nothing():
    state, third = WatchState(), {"docs": {"kind": "files", "files": {"a.jsonl": "3" * 64}}}
    assert [judge_look(state, SourceLook(one), OLD, None).action for one in (NEW, third, NEW, OLD, NEW)] == [
        "settle",
        "settle",
        "settle",
        "nothing",
        "settle",
    ]


def test_a_source_that_cannot_be_read_is_no_change_and_holds_the_run_back():
    state = WatchState()
    both = {**OLD, "web": {"kind": "files", "files": {}}}
    found = judge_look(state, SourceLook(OLD, {"web": "no network"}), both, None)
    assert (found.action, found.changed) == ("wait", {})
    assert any("web" in words for words in found.words)
    for _ in range(3):
        found = judge_look(state, SourceLook(NEW, {"web": "no network"}), both, None)
        assert (found.action, found.changed) == ("wait", CHANGE)
    assert judge_look(state, SourceLook({**both, **NEW}), both, None).action == "settle"


def test_what_an_active_run_reads_starts_no_other_and_counts_as_handled():
    state = WatchState(seen="x")
    assert judge_look(state, SourceLook(NEW), OLD, NEW).action == "nothing"
    assert state.handled == NEW
    assert judge_look(WatchState(), SourceLook(NEW), OLD, OLD).action == "settle"


def test_a_source_that_is_new_in_params_starts_nothing():
    found = judge_look(WatchState(), SourceLook({**OLD, "more": {"kind": "files"}}), OLD, None)
    assert (found.action, found.changed) == ("nothing", {})
    assert any("more" in words for words in found.words)


def test_without_any_run_changes_count_from_the_first_look_at_which_all_can_be_read():
    state = WatchState()
    assert judge_look(state, SourceLook(OLD, {"web": "no network"}), None, None).action == "wait"
    assert state.handled is None
    assert judge_look(state, SourceLook(OLD), None, None).action == "nothing"
    assert state.handled == OLD


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({"python": "3.11.2"}, {"python": "3.12.0"}, "python 3.11.2 -> 3.12.0"),
        ({"commit": "a" * 40}, {"commit": "b" * 40}, f"commit {'a' * 12} -> {'b' * 12}"),
        ({"files": {"x": {"etag": '"1"'}}}, {"files": {"x": {"etag": '"2"'}}}, "x 1 -> 2"),
        ({"files": {"x": "1"}}, {"files": {}}, "x 1 -> none"),
        (
            {"files": {}},
            {"files": dict.fromkeys("abcdefg", "1")},
            ", ".join(f"{one} none -> 1" for one in "abcde") + ", 2 more",
        ),
    ],
)
def test_a_change_is_named_with_old_and_new(old, new, words):
    assert describe_changes({"s": old}, {"s": new}) == {"s": words}


@pytest.mark.parametrize("text", ["10", "m", "0s", "10 m", "-1m", "often"])
def test_an_interval_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="--watch"):
        parse_interval(text)


def test_the_later_of_a_run_and_the_watch_is_the_baseline(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWAY_REGISTRY", (tmp_path / "registry").as_uri())
    state = WatchState()
    assert find_baseline(tmp_path, "p", state) is None
    state.handle(OLD)
    state.save(tmp_path, "p")
    state = WatchState.load(tmp_path, "p")
    assert find_baseline(tmp_path, "p", state) == OLD
    record = tmp_path / "runs" / "p" / "package" / "run.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"sources": NEW}))
    os.utime(record, (1, 1))
    assert find_baseline(tmp_path, "p", state) == OLD
    assert find_baseline(tmp_path, "p", WatchState()) == NEW
    os.utime(record, (2e9, 2e9))
    assert find_baseline(tmp_path, "p", state) == NEW


@pytest.mark.parametrize("jump", [365, -365])
def test_a_clock_that_was_set_does_not_change_which_is_later(tmp_path, monkeypatch, jump):
    monkeypatch.setenv("ROPEWAY_REGISTRY", (tmp_path / "registry").as_uri())
    record = tmp_path / "runs" / "p" / "package" / "run.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"sources": NEW}))
    state = WatchState()
    state.handle(OLD)
    state.handled_at = (datetime.now(UTC) + timedelta(days=jump)).isoformat()
    state.package = identify_package(tmp_path, "p")
    assert find_baseline(tmp_path, "p", state) == OLD  # what the watch asked for, and no run has completed since
    assert not has_recorded_since(tmp_path, "p", state)
    record.unlink()
    record.write_text(json.dumps({"sources": {**NEW, "more": {}}}))
    assert find_baseline(tmp_path, "p", state) == {**NEW, "more": {}}
    assert has_recorded_since(tmp_path, "p", state)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"other": 1}',
        '{"handled": 3}',
        '{"handled": {"a": 1}, "handled_at": "2026-01-01"}',
        '{"handled": {}}',
    ],
)
def test_a_damaged_state_is_as_good_as_none(tmp_path, text):
    path = state_path(tmp_path, "p")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert WatchState.load(tmp_path, "p") == WatchState()


def test_what_the_active_run_froze_counts_only_while_it_holds_the_workspace(tmp_path):
    folder = tmp_path / ".identity"
    folder.mkdir()

    def freeze():
        (folder / "sources.json").write_text(json.dumps({"digest": "x", "of": NEW}))
        (folder / "manifest.json").write_text(json.dumps({"profile": "p"}))

    freeze()
    os.utime(folder / "manifest.json", (1, 1))
    assert used_by_active_run(tmp_path, "p") is None
    with workspace_lock(tmp_path, command="a test", profile="p"):
        assert used_by_active_run(tmp_path, "p") is None  # of the run before
        freeze()
        assert used_by_active_run(tmp_path, "p") == NEW
        assert used_by_active_run(tmp_path, "other") is None


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Return a workspace whose profile p reads a.jsonl, and whose last run read it as it is now."""
    monkeypatch.setenv("ROPEWAY_REGISTRY", (tmp_path / "registry").as_uri())
    monkeypatch.setattr(source_watcher, "_SETTLE_SECONDS", 1.0)
    text = read_shipped_params() + (
        "\np:\n  preset: laptop\n  datasets: [{docs: {max_val_set: 1}}]\n  sources:\n"
        "    docs: {kind: files, paths: [a.jsonl], rows: messages, columns: {}, expected_rows: null}\n"
    )
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    record = tmp_path / "runs" / "p" / "package" / "run.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"sources": look_at_sources(tmp_path, "p").identities}))
    return tmp_path


@contextmanager
def prefect(runs=(), *, parameters=("profile", "rehearse", "trigger"), events=()):
    """Serve the parts of Prefect's API that the watch uses; yield (url, what was asked for)."""
    made, runs, stored = [], list(runs), list(events)
    deployment = {
        "id": "d",
        "parameters": {"root": "/w"},
        "parameter_openapi_schema": {"properties": dict.fromkeys(parameters)},
    }

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path.endswith("/create_flow_run"):
                made.append(json.loads(body))
                found = {"id": f"run-{len(made)}"}
            elif self.path.endswith("/events"):
                stored.extend(json.loads(body))
                found = None
            else:
                found = {
                    "/api/events/filter": {"events": stored},
                    "/api/flow_runs/filter": runs,
                    "/api/deployments/name/retrain/retrain": deployment,
                }[self.path]
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
        yield f"http://127.0.0.1:{served.server_port}/api", made, runs, stored
        served.shutdown()


def append(workspace, text='{"messages": [1]}\n'):
    with (workspace / "a.jsonl").open("a") as file:
        file.write(text)


def test_a_burst_of_changes_asks_for_one_run_that_names_them_and_a_restart_asks_for_none(workspace, capsys):
    with prefect() as (url, made, _, _):
        watcher = SourceWatcher(workspace, url, ["p"], 600.0, rehearse=True)
        watcher.poll(1.0)
        assert made == []
        for now in (700.0, 701.0, 702.0):
            append(workspace)
            watcher.poll(now)
        assert made == []
        for now in (703.0, 704.0, 705.0, 1400.0):
            watcher.poll(now)
        (run,) = made
        assert run["tags"] == ["ropeway", "trigger:data", "changed:docs"]
        assert run["parameters"] | {"trigger": ""} == {"root": "/w", "profile": "p", "rehearse": True, "trigger": ""}
        assert run["parameters"]["trigger"] == run["state"]["message"]
        assert run["parameters"]["trigger"].startswith("source docs changed: a.jsonl ")
        again = SourceWatcher(workspace, url, ["p"], 600.0)
        for now in (1.0, 700.0):
            again.poll(now)
        assert len(made) == 1
        assert not (workspace / ".identity").exists()
        assert not (workspace / ".work" / "lock").exists()
    assert "changed: a.jsonl" in capsys.readouterr().out


def test_a_watch_killed_before_it_stored_its_state_asks_for_the_same_run(workspace):
    with prefect() as (url, made, _, _):
        watcher = SourceWatcher(workspace, url, ["p"], 600.0)
        append(workspace)
        watcher.look_once("p")
        stored = state_path(workspace, "p").read_bytes()
        watcher.look_once("p")
        state_path(workspace, "p").write_bytes(stored)
        SourceWatcher(workspace, url, ["p"], 600.0).look_once("p")
    assert len(made) == 2
    assert made[0]["idempotency_key"] == made[1]["idempotency_key"]


@pytest.mark.parametrize(
    ("profile", "state", "waits"),
    [
        ("p", "AwaitingConcurrencySlot", True),
        ("p", "Waiting", True),  # for a workspace that a terminal holds
        (None, "Late", True),  # of the profile that params.yaml names
        ("laptop", "AwaitingConcurrencySlot", False),
        ("p", "AwaitingRetry", False),  # it has begun, with what it froze then
        ("p", "Running", False),
    ],
)
def test_no_second_run_is_queued_for_a_profile(workspace, profile, state, waits):
    params = workspace / "params.yaml"
    params.write_text(params.read_text().replace("profile: laptop", "profile: p"))
    found = {"id": "1", "name": "first", "parameters": {"profile": profile}, "state": {"name": state}}
    with prefect([found]) as (url, made, runs, _):
        watcher = SourceWatcher(workspace, url, ["p"], 600.0)
        append(workspace)
        actions = [watcher.look_once("p").action for _ in range(3)]
        assert actions[:2] == ["settle", "wait" if waits else "run"]
        runs.clear()
        watcher.look_once("p")
        assert len(made) == 1


@pytest.mark.parametrize(
    ("kind", "message", "asked"),
    [
        ("CRASHED", "no heartbeat", 4),
        ("CANCELLED", "Runner is shutting down.", 4),  # prefect 3.9.1, when serve is stopped
        ("CANCELLED", "", 1),  # by a person
        ("FAILED", "", 1),
        ("COMPLETED", "", 1),
        ("RUNNING", "", 1),
    ],
)
def test_a_run_that_crashed_is_asked_for_again_three_times_and_one_that_failed_is_not(workspace, kind, message, asked):
    with prefect() as (url, made, runs, _):
        watcher = SourceWatcher(workspace, url, ["p"], 600.0)
        append(workspace)
        for _ in range(2):
            watcher.look_once("p")
        runs.append({"id": "run-1", "name": "x", "parameters": {}, "state": {"type": kind, "message": message}})
        record = workspace / "runs" / "p" / "package" / "run.json"
        record.write_text(json.dumps({"sources": look_at_sources(workspace, "p").identities}))
        os.utime(record, (2e9, 2e9))  # a person's run completed meanwhile
        assert watcher.look_once("p").action == "nothing"
        assert len(made) == 1
        state = WatchState.load(workspace, "p")
        state.package = identify_package(workspace, "p")  # as if that run had completed before the watch asked
        state.save(workspace, "p")
        for _ in range(6):
            SourceWatcher(workspace, url, ["p"], 600.0).look_once("p")
        assert len(made) == asked
        assert len({run["idempotency_key"] for run in made}) == asked
        assert {run["parameters"]["trigger"] for run in made} == {made[0]["parameters"]["trigger"]}
        runs.clear()
        append(workspace)  # a later change counts by itself
        for _ in range(2):
            watcher.look_once("p")
        assert len(made) == asked + 1


def test_an_older_flow_without_the_parameter_is_not_given_it(workspace):
    with prefect(parameters=("profile",)) as (url, made, _, _):
        watcher = SourceWatcher(workspace, url, ["p"], 600.0)
        append(workspace)
        for _ in range(2):
            watcher.look_once("p")
    assert "trigger" not in made[0]["parameters"]


def test_a_notification_is_looked_into_at_once_and_what_came_before_the_start_is_not_repeated(workspace):
    with prefect(events=[{"id": "old"}]) as (url, made, _, stored):
        watcher = SourceWatcher(workspace, url, ["p"], None)
        watcher.poll(1.0)
        append(workspace)
        for now in (1e4, 2e4):
            watcher.poll(now)
        assert made == []  # nobody said anything
        event = notify_data(url, "docs", "from a test")
        assert [(one["event"], one["payload"]) for one in stored[1:]] == [
            (EVENT, {"source": "docs", "note": "from a test"})
        ]
        assert stored[1]["id"] == event
        for now in (2e4 + 1, 2e4 + 3, 4e4):
            watcher.poll(now)
        assert len(made) == 1


def test_no_error_ends_the_watch_and_each_is_printed_once(workspace, capsys):
    watcher = SourceWatcher(workspace, "http://127.0.0.1:9/api", ["p"], 600.0)
    (workspace / "a.jsonl").unlink()
    (workspace / "params.yaml").rename(workspace / "away")
    for now in (1.0, 700.0):
        watcher.poll(now)
    (workspace / "away").rename(workspace / "params.yaml")
    for now in (1400.0, 2100.0):
        watcher.poll(now)
    said = capsys.readouterr().out
    assert said.count("could not look") == 1
    assert said.count("docs cannot be read now") == 1
    assert said.count("does not answer") == 1


def test_the_command_returns_once_the_event_is_stored_and_fails_without_a_server(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    with prefect() as (url, _, _, stored):
        monkeypatch.setenv("PREFECT_API_URL", url)
        done = CliRunner().invoke(app, ["notify-data", "--source", "docs", "--json"])
    assert json.loads(done.stdout) == {"event": EVENT, "id": stored[0]["id"]}
    monkeypatch.delenv("PREFECT_API_URL")
    assert isinstance(CliRunner().invoke(app, ["notify-data"]).exception, TemporaryError)
