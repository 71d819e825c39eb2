"""`ropeway server`: the runs that were made without it are there, its pages ask the right port, later runs use it."""

import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from flows.retrain import run_retrain
from flows.server import await_server, find_server, serve_ui
from flows.settings import plan_settings
from ropeway.errors import ConfigError, TemporaryError

pytestmark = pytest.mark.filterwarnings(
    # dvc 3.67.1 (repo/trie.py, repo/graph.py) on pygtrie 2.6
    "ignore:_NoneStep.value will soon raise:DeprecationWarning"
)
SERVE = """
import sys
from pathlib import Path
from flows.server import serve_ui
serve_ui(Path(sys.argv[1]), port=int(sys.argv[2]))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def list_runs(url):
    with httpx.Client(trust_env=False) as client:
        return {run["id"] for run in client.post(f"{url}/flow_runs/filter", json={}).json()}


def run_and_find_its_page(workspace, capsys):
    run_retrain(workspace.root)
    return re.search(r"/runs/flow-run/([0-9a-f-]{36})\n", capsys.readouterr().out)[1]


def test_flow_runs_made_before_the_server_started_are_there_and_later_ones_use_it(own_prefect, capsys):
    before = run_and_find_its_page(own_prefect, capsys)
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
        after = run_and_find_its_page(own_prefect, capsys)
        assert list_runs(url) == {before, after}
        with pytest.raises(
            ConfigError, match=rf"port {port} on .*this workspace's server is there: http://127.0.0.1:{port}\."
        ):
            serve_ui(own_prefect.root, port=port)
    finally:
        server.terminate()
        assert server.wait(30) in (0, -signal.SIGTERM)
    assert find_server(own_prefect.root) is None


def test_a_port_that_another_program_has_is_refused_by_its_number(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"port {port} .*another program has it.*`ropeway server --port {port + 1}`"
        ):
            serve_ui(tmp_path, port=port)


def test_the_network_is_let_in_only_with_a_password(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING", raising=False)
    with pytest.raises(ConfigError, match="PREFECT_SERVER_API_AUTH_STRING=user:password"):
        serve_ui(tmp_path, host="0.0.0.0")  # noqa: S104 - refused


@pytest.mark.usefixtures("prefect_api")
def test_a_flow_that_is_told_of_a_server_which_does_not_answer_says_so(made_workspace, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    monkeypatch.setattr("flows.server._GIVEN_SECONDS", 0.1)
    with pytest.raises(TemporaryError, match=r"no Prefect server answers at .*--no-prefect"):
        run_retrain(made_workspace.root)


def test_nothing_is_sent_out_and_all_state_stays_in_the_workspace(tmp_path):
    settings = plan_settings(tmp_path)
    assert settings["PREFECT_HOME"] == str(tmp_path / ".prefect")
    assert settings["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert settings["DO_NOT_TRACK"] == "1"
