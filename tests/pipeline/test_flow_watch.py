"""A watch of sources on the real Prefect server: what it asks for, and what the run's page shows of it."""

import json
import os
import threading
from uuid import UUID

import pytest

from ropeway.orchestration.source_watch import WatchState
from ropeway.orchestration.source_watcher import CHANGED, SourceWatcher, notify_data
from ropeway.runtime.lock import workspace_lock
from tests.support.flow_processes import Api, wait_for

pytestmark = pytest.mark.filterwarnings(
    # dvc 3.67.1 (repo/trie.py, repo/graph.py) on pygtrie 2.6
    "ignore:_NoneStep.value will soon raise:DeprecationWarning"
)


@pytest.fixture
def api(on_prefect):
    """Yield the server's API, with Prefect's own client set to it, whatever it was imported with."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    found = Api(on_prefect)
    with temporary_settings({PREFECT_API_URL: on_prefect}):
        yield found
    found.client.close()


def change_the_record(root, python):
    """Let the last run have read another Python's documentation."""
    state = WatchState()
    state.handle({"docstrings": {"kind": "python_docs", "part": "docstrings", "python": python}})
    state.save(root, "laptop")


def test_a_changed_source_starts_one_run_whose_page_names_it(made_workspace, api, monkeypatch):
    from prefect import tags

    from ropeway.orchestration.deployments import adopt_deployments, build_deployments
    from ropeway.orchestration.prefect_adapter import load_flow

    monkeypatch.setattr("ropeway.orchestration.source_watcher._SETTLE_SECONDS", 1.0)
    served = build_deployments(made_workspace.root)
    adopt_deployments(served)
    served[0].apply()
    change_the_record(made_workspace.root, "2.7.0")
    watcher = SourceWatcher(made_workspace.root, api.url, ["laptop"], None)
    assert [watcher.look_once("laptop").action for _ in range(3)] == ["settle", "run", "nothing"]
    change_the_record(made_workspace.root, "3.0.0")  # changed again before that run has started
    assert [watcher.look_once("laptop").action for _ in range(2)] == ["settle", "wait"]
    runs = api.ask("POST", "/flow_runs/filter", {"flow_runs": {"tags": {"all_": [f"{CHANGED}docstrings"]}}})
    (run,) = [one for one in runs if one["parameters"]["root"] == str(made_workspace.root)]
    assert "python 2.7.0 -> 3." in run["state"]["message"]
    assert run["parameters"]["trigger"] == run["state"]["message"]
    assert notify_data(api.url, "docstrings", "a test")

    with tags(*run["tags"]):  # as the runner starts it
        state = load_flow(made_workspace.root, "retrain")(**run["parameters"], return_state=True)
    began = api.ask("GET", f"/flow_runs/{UUID(str(state.state_details.flow_run_id))}")
    assert began["name"].endswith("(docstrings changed)")
    chosen = {"artifacts": {"flow_run_id": {"any_": [began["id"]]}, "key": {"any_": ["laptop-trigger"]}}}
    (page,) = api.ask("POST", "/artifacts/filter", chosen)
    assert "2.7.0" in json.dumps(page["data"])
    api.ask("DELETE", f"/flow_runs/{run['id']}")


def test_schedules_of_profiles_are_replaced_and_a_served_run_says_whom_it_waits_for(made_workspace, api, monkeypatch):
    from ropeway.orchestration import prefect_adapter
    from ropeway.orchestration.deployments import adopt_deployments, build_deployments

    root = made_workspace.root
    for schedules in ([("laptop", "0 3 * * *"), ("smollm2", "0 5 * * *")], [("smollm2", "0 6 * * *")]):
        served = build_deployments(root, schedules)
        adopt_deployments(served)
        served[0].apply()
        there = api.ask("GET", "/deployments/name/retrain/retrain")["schedules"]
        found = sorted((each["parameters"]["profile"], each["schedule"]["cron"]) for each in there if each["active"])
        assert found == schedules

    monkeypatch.setattr(prefect_adapter, "_FREE_SECONDS", 0.2)
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "served")
    before, taken, seen = (root / "params.yaml").read_bytes(), threading.Event(), []

    def hold():
        with workspace_lock(root, command="ropeway run", profile="smollm2"):
            taken.set()
            waiting = {"flow_runs": {"state": {"name": {"any_": ["Waiting"]}}}}
            seen.append(wait_for(lambda: api.ask("POST", "/flow_runs/filter", waiting), seconds=60))

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(60)
    flow = prefect_adapter.load_flow(root, "retrain")
    state = flow(str(root), "llama2_13b_orca_8k", return_state=True)
    holder.join()
    ((run,),) = seen
    assert run["id"] == str(state.state_details.flow_run_id)
    assert f"`ropeway run` of profile smollm2 (pid {os.getpid()})" in run["state"]["message"]
    assert api.ask("GET", f"/flow_runs/{run['id']}")["state"]["name"] == state.name
    assert (root / "params.yaml").read_bytes() == before
    assert (root / "runs" / "llama2_13b_orca_8k").is_dir()
