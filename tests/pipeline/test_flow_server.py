"""`ropeway server`: the runs that were made without it are there, its pages ask the right port, later runs use it."""

import json
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from ropeway.orchestration.alert_sender import AlertSender
from ropeway.orchestration.alerts import AlertLimits, report_drift
from ropeway.orchestration.automations import ALERT, CRASHED, apply_automations, crashed_automation, find_automations
from ropeway.orchestration.prefect_server import await_server, find_server, prefect_settings, serve_ui
from ropeway.orchestration.sequence import run_retrain
from ropeway.runtime.errors import ConfigError, TemporaryError
from tests.support.flow_processes import SERVE, Api, free_port, wait_for

pytestmark = pytest.mark.filterwarnings(
    # dvc 3.67.1 (repo/trie.py, repo/graph.py) on pygtrie 2.6
    "ignore:_NoneStep.value will soon raise:DeprecationWarning"
)


def list_runs(url):
    with httpx.Client(trust_env=False) as client:
        return {run["id"] for run in client.post(f"{url}/flow_runs/filter", json={}).json()}


def run_and_find_its_page(workspace, capsys):
    """Return the run's id, and what the last line says of the way to its page."""
    run_retrain(workspace.root)
    said = re.sub(r"\n {8,}", " ", capsys.readouterr().out)  # a long line goes on, indented
    found = re.search(r"^  run page +(.+/runs/flow-run/([0-9a-f-]{36}))$", said, re.MULTILINE)
    return found[2], found[1]


def test_the_server_shows_earlier_runs_and_later_runs_use_it(own_prefect, capsys):
    before, way = run_and_find_its_page(own_prefect, capsys)
    assert way == f"make ui, then open http://127.0.0.1:4200/runs/flow-run/{before}"
    assert find_server(own_prefect.root) is None
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(own_prefect.root), str(port)], stdout=subprocess.DEVNULL
    )
    try:
        await_server(url, own_prefect.root)
        assert find_server(own_prefect.root) == url
        assert list_runs(url) == {before}
        with httpx.Client(trust_env=False, follow_redirects=True) as client:
            assert client.get(f"http://127.0.0.1:{port}/ui-settings").json()["api_url"] == url
            page = client.get(f"http://127.0.0.1:{port}/runs/flow-run/{before}", headers={"Accept": "text/html"})
            assert "<title>Prefect Server</title>" in page.text
        watching = wait_for(lambda: find_automations(url))
        assert [(each["name"], each["enabled"]) for each in watching] == [(CRASHED, True)]
        after, way = run_and_find_its_page(own_prefect, capsys)
        assert way == f"http://127.0.0.1:{port}/runs/flow-run/{after}"
        assert list_runs(url) == {before, after}
        with pytest.raises(
            ConfigError, match=rf"port {port} on .*this workspace's server uses it: http://127.0.0.1:{port}\."
        ):
            serve_ui(own_prefect.root, port=port)
    finally:
        server.terminate()
        assert server.wait(120) in (0, -signal.SIGTERM)
    assert find_server(own_prefect.root) is None


def test_web_pages_of_other_sites_cannot_use_a_server_without_a_password(prefect_api):
    page, deployments = prefect_api.url.removesuffix("/api"), f"{prefect_api.url}/deployments/filter"
    foreign, asked = {"Origin": "https://evil.example"}, {"Access-Control-Request-Method": "PATCH"}
    with httpx.Client(trust_env=False) as client:
        refused = client.options(deployments, headers=foreign | asked)
        assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (403, False)
        # A browser sends this one without asking; Prefect would read it as JSON.
        assert client.post(deployments, content=b"{}", headers=foreign).status_code == 403
        rebound = {"Host": "evil.example"}
        assert client.get(f"{page}/ui-settings", headers=rebound).status_code == 421
        assert client.post(deployments, json={}, headers=rebound).status_code == 421
        for name in ("127.0.0.1", "localhost"):  # its own page, which asks 127.0.0.1 under either name
            own = page.replace("127.0.0.1", name)
            allowed = client.options(deployments, headers={"Origin": own} | asked)
            assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, own)
            assert client.post(deployments, json={}, headers={"Origin": own}).status_code == 200
    with pytest.raises(InvalidStatus) as error:
        connect(prefect_api.url.replace("http", "ws") + "/events/out", origin="https://evil.example", proxy=None)
    assert error.value.response.status_code == 403
    assert stat.S_IMODE((prefect_api.migrated / "prefect.db").stat().st_mode) == 0o600


def test_a_port_in_use_is_refused_with_its_number(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"port {port} .*another program uses it.*`ropeway server --port {port + 1}`"
        ):
            serve_ui(tmp_path, port=port)


def test_a_network_address_needs_a_password(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING", raising=False)
    with pytest.raises(ConfigError, match="PREFECT_SERVER_API_AUTH_STRING=user:password"):
        serve_ui(tmp_path, host="0.0.0.0")  # noqa: S104 - refused


def test_a_slow_temporary_server_is_awaited_with_a_message_and_an_ended_one_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr("ropeway.orchestration.prefect_server._GIVEN_SECONDS", -1.0)
    answers = iter([False, False, True, False])
    monkeypatch.setattr("ropeway.orchestration.prefect_server.is_answering", lambda _url: next(answers))
    await_server("http://127.0.0.1:9/api", tmp_path)
    assert (
        f"is still starting; on a busy machine this takes minutes. Its log: {tmp_path}/server.log\n"
        in capsys.readouterr().out
    )
    (tmp_path / "server.exit.json").touch()
    with pytest.raises(TemporaryError, match=r"no Prefect server answers at .*server\.log"):
        await_server("http://127.0.0.1:9/api", tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("prefect_api")
def test_a_flow_names_a_server_that_does_not_answer(made_workspace, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    monkeypatch.setattr("ropeway.orchestration.prefect_server._GIVEN_SECONDS", 0.1)
    with pytest.raises(TemporaryError, match=r"no Prefect server answers at .*--no-prefect"):
        run_retrain(made_workspace.root)


def test_no_telemetry_is_sent_and_all_state_stays_in_the_workspace(tmp_path):
    settings = prefect_settings(tmp_path)
    assert settings["PREFECT_HOME"] == str(tmp_path / ".prefect")
    assert settings["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert settings["DO_NOT_TRACK"] == "1"


@pytest.fixture
def api(prefect_api):
    with_api = Api(prefect_api.url)
    yield with_api
    for each in find_automations(prefect_api.url):
        with_api.ask("DELETE", f"/automations/{each['id']}")
    with_api.client.close()


def begin_three(api):
    """Start three runs that send a heartbeat each; two of them then have another state than Running."""
    dead, published, waiting = runs = [api.start() for _ in range(3)]
    for run in runs:
        api.beat(run)
    api.set_state(published, "COMPLETED", "Published")
    api.set_state(waiting, "PAUSED", "Suspended")
    return dead, published, waiting


def test_flow_runs_of_a_silent_host_are_crashed_and_neither_ended_nor_waiting_ones(api):
    api.ask("POST", "/automations/", crashed_automation(silent_seconds=10))
    begun = []

    def count_crashed():  # the server's triggers learn of an automation some time after its API does
        begun.append(begin_three(api))
        time.sleep(1)
        return [api.state(dead) for dead, *_ in begun].count("Crashed")

    assert wait_for(lambda: count_crashed() >= 2)
    # What began with the first of the crashed was due before the second was.
    crashed = [one for one in begun if api.state(one[0]) == "Crashed"]
    for _, published, waiting in begun[: begun.index(crashed[0]) + 1]:
        assert [api.state(run) for run in (published, waiting)] == ["Published", "Suspended"]


def test_an_alert_is_posted_once_when_a_run_fails_and_an_older_servers_secret_is_removed(api, monkeypatch, tmp_path):
    heard = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    kind = api.ask("GET", "/block_types/slug/webhook")["id"]
    (schema, *_) = api.ask("POST", "/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind]}}})
    block = {"name": "ropeway-alert", "data": {"url": "http://secret"}, "block_type_id": kind}
    stored = api.ask("POST", "/block_documents/", {**block, "block_schema_id": schema["id"]})
    action = {"type": "call-webhook", "block_document_id": stored["id"], "payload": "{}"}
    api.ask("POST", "/automations/", {**crashed_automation(silent_seconds=10), "name": ALERT, "actions": [action]})
    for _ in range(2):  # a second start of the server changes nothing
        apply_automations(api.url)
        assert [each["name"] for each in find_automations(api.url)] == [CRASHED]
    chosen = {"block_documents": {"name": {"any_": ["ropeway-alert"]}}}
    assert api.ask("POST", "/block_documents/filter", chosen) == []

    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as hook:
        threading.Thread(target=hook.serve_forever, daemon=True).start()
        monkeypatch.setenv("PREFECT_HOME", str(tmp_path))

        def start():
            hook_url = f"http://127.0.0.1:{hook.server_port}/hook"
            return AlertSender(tmp_path, api.url, hook_url, AlertLimits(review_hours=24, late_minutes=30))

        start()  # what was before counts as known
        failed, late = api.start(), api.start()
        api.set_state(failed, "FAILED", "Failed")
        missed = {
            "type": "SCHEDULED",
            "name": "Late",
            "state_details": {"scheduled_time": datetime.now(UTC).isoformat()},
        }
        api.ask("POST", f"/flow_runs/{late}/set_state", {"state": missed, "force": True})
        report_drift(api.url, version="m@v1", digest="ab", words="PSI 0.3")

        def hear_all():  # the server stores events in batches
            sender = start()
            sender.find(datetime.now(UTC) + timedelta(hours=1))
            sender.deliver(0.0)
            return len(heard) > 2

        assert wait_for(hear_all)
        hear_all()
        hook.shutdown()
    ours = [body for body in heard if body["id"].split()[0] in (failed, late, "ropeway.version.ab")]
    assert sorted(body["reason"] for body in ours) == ["drift", "failed", "schedule_missed"]
    (body,) = [one for one in ours if one["reason"] == "failed"]
    assert re.fullmatch(r"automations [a-z-]+: Failed", body["text"])
    assert failed in body["page"]


@pytest.mark.usefixtures("prefect_api")
def test_a_server_that_fails_is_temporary_and_names_its_folder(made_workspace, monkeypatch):
    from ropeway.orchestration.prefect_adapter import run_flow

    monkeypatch.setenv("PREFECT_HOME", str(made_workspace.root / "home"))
    request = httpx.Request("POST", "http://127.0.0.1:9/api/flows/")

    def fail(*_, **__):
        raise httpx.HTTPStatusError("Server error '500'\nmore", request=request, response=httpx.Response(500))

    with pytest.raises(TemporaryError, match=r"500.*/home.*--no-prefect"):
        run_flow(fail, made_workspace.root, "laptop", "http://127.0.0.1:9/api", lambda *_: None)
