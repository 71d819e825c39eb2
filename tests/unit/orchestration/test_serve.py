"""`ropeway serve`: what it sets before it imports Prefect."""

import os

import pytest

from ropeway.orchestration import deployments, prefect_server
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.manifest import write_json


def test_the_server_is_set_before_a_schedule_imports_prefect(tmp_path, monkeypatch):
    url, seen = "http://127.0.0.1:9/api", []
    monkeypatch.setenv("PREFECT_API_URL", "")
    monkeypatch.setattr(deployments, "apply_settings", lambda _root: None)
    monkeypatch.setattr(deployments, "await_own_server", lambda _root: url)

    def refuse(_cron):
        seen.append(os.environ["PREFECT_API_URL"])
        raise ConfigError("not a cron expression")

    monkeypatch.setattr(deployments, "next_start", refuse)
    with pytest.raises(ConfigError):
        deployments.serve_flows(tmp_path, crons=["x"])
    assert seen == [url]


@pytest.fixture
def note(tmp_path, monkeypatch):
    """A note of a `ropeway server` whose process lives, and its URL."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    url = "http://127.0.0.1:9/api"
    write_json(tmp_path / "ropeway-server.json", {"url": url, "pid": os.getpid()})
    return url


def test_a_server_that_is_starting_is_waited_for(tmp_path, monkeypatch, note, capsys):
    answers = iter([False, False, True])
    monkeypatch.setattr(prefect_server, "is_answering", lambda _url: next(answers))
    monkeypatch.setattr(prefect_server.time, "sleep", lambda _seconds: None)
    assert prefect_server.await_own_server(tmp_path) == note
    assert capsys.readouterr().out.count("http://127.0.0.1:9 ") == 1


@pytest.mark.usefixtures("note")
def test_a_server_that_ends_while_it_starts_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(prefect_server, "is_answering", lambda _url: False)
    monkeypatch.setattr(
        prefect_server.time, "sleep", lambda _seconds: (tmp_path / "ropeway-server.json").unlink(missing_ok=True)
    )
    assert prefect_server.await_own_server(tmp_path) is None
