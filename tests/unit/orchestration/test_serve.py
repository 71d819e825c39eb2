"""`ropeway serve`: what it sets before it imports Prefect."""

import os

import pytest

from ropeway.orchestration import deployments
from ropeway.runtime.errors import ConfigError


def test_the_server_is_set_before_a_schedule_imports_prefect(tmp_path, monkeypatch):
    url, seen = "http://127.0.0.1:9/api", []
    monkeypatch.setenv("PREFECT_API_URL", "")
    monkeypatch.setattr(deployments, "apply_settings", lambda _root: None)
    monkeypatch.setattr(deployments, "persistent_server_url", lambda _root: url)

    def refuse(_cron):
        seen.append(os.environ["PREFECT_API_URL"])
        raise ConfigError("not a cron expression")

    monkeypatch.setattr(deployments, "next_start", refuse)
    with pytest.raises(ConfigError):
        deployments.serve_flows(tmp_path, crons=["x"])
    assert seen == [url]
