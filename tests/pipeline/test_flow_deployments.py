"""prefect.yaml through Prefect's own `deploy`, on the real server, and `ropeway serve`'s deployments beside it."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ropeway.orchestration.deployments import adopt_deployments, build_deployments, next_start
from ropeway.runtime.errors import ConfigError

ROOT = Path(__file__).parents[2]
FLOWS = ["promote", "rollback", "retrain", "review"]


def prefect(root, api, *arguments):
    environment = {**os.environ, "PREFECT_API_URL": api, "PWD": str(root), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def deployed(tmp_path, on_prefect):
    """Deploy prefect.yaml as it is shipped."""
    shutil.copy(ROOT / "prefect.yaml", tmp_path)
    shutil.copytree(ROOT / "flows", tmp_path / "flows")
    prefect(tmp_path, on_prefect, "work-pool", "create", "ropeway", "--type", "process", "--overwrite")
    prefect(tmp_path, on_prefect, "deploy", "--all")
    return tmp_path


def test_flow_deployments_of_prefect_yaml_and_of_serve_agree_and_the_schedule_is_off(deployed, on_prefect):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    def facts(name):
        found = client.read_deployment_by_name(f"{name}/{name}")
        strategy = found.concurrency_options and found.concurrency_options.collision_strategy.value
        limit = found.global_concurrency_limit
        return {
            "parameters": found.parameters,
            "schedules": [(each.schedule.cron, each.schedule.timezone, each.active) for each in found.schedules],
            "concurrency": (limit and limit.limit, strategy),
            "tags": found.tags,
        }, found

    with temporary_settings({PREFECT_API_URL: on_prefect}), get_client(sync_client=True) as client:
        pooled = {name: facts(name) for name in FLOWS}
        assert pooled["retrain"][0] == {
            "parameters": {"root": str(deployed), "rehearse": False},
            "schedules": [("0 3 * * *", "UTC", False)],
            "concurrency": (1, "ENQUEUE"),
            "tags": ["ropeway"],
        }
        for _, found in pooled.values():
            assert found.work_pool_name == "ropeway"
            assert found.pull_steps == [
                {"prefect.deployments.steps.set_working_directory": {"directory": str(deployed)}}
            ]
            assert found.job_variables["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
        served = build_deployments(deployed)
        adopt_deployments(served)
        for each in served:
            each.apply()
        for name in FLOWS:  # else a run of it would look for its code in a folder called None
            found = facts(name)[1]
            assert (found.path, found.pull_steps) == (".", None)
        assert {name: facts(name)[0] for name in FLOWS} == {name: pooled[name][0] for name in FLOWS}


def test_serve_enables_the_schedule_only_with_cron():
    schedules = [build_deployments(ROOT, found)[0].schedules[0] for found in ([], [("", "0 5 * * 1")])]
    assert [(each.schedule.cron, each.active) for each in schedules] == [("0 3 * * *", False), ("0 5 * * 1", True)]


def test_served_runs_rehearse_first_if_asked():
    asked = [build_deployments(ROOT, rehearse=rehearse)[0].parameters["rehearse"] for rehearse in (False, True)]
    assert asked == [False, True]


def test_the_next_start_is_printed_in_utc_and_local_time_and_a_bad_cron_is_refused(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d 03:00 UTC, \d{4}-\d\d-\d\d 08:30 IST here", next_start("0 3 * * *"))
    finally:
        monkeypatch.undo()
        time.tzset()
    for wrong in ("nightly", "61 * * * *", "", "0 0 30 2 *"):
        with pytest.raises(ConfigError, match="--cron"):
            next_start(wrong)
