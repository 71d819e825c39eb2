"""A watch of sources on the real Prefect server: what it asks for, and what the run's page shows of it."""

import json
from uuid import UUID

import pytest

from ropeway.orchestration.source_watch import WatchState
from ropeway.orchestration.source_watcher import CHANGED, SourceWatcher, notify_data
from tests.support.flow_processes import Api

pytestmark = pytest.mark.filterwarnings(
    # dvc 3.67.1 (repo/trie.py, repo/graph.py) on pygtrie 2.6
    "ignore:_NoneStep.value will soon raise:DeprecationWarning"
)


def change_the_record(root, python):
    """Let the last run have read another Python's documentation."""
    state = WatchState()
    state.handle({"docstrings": {"kind": "python_docs", "part": "docstrings", "python": python}})
    state.save(root, "laptop")


def test_a_changed_source_starts_one_run_whose_page_names_it(made_workspace, on_prefect, monkeypatch):
    from prefect import tags

    from ropeway.orchestration.deployments import adopt_deployments, build_deployments
    from ropeway.orchestration.prefect_adapter import load_flow

    monkeypatch.setattr("ropeway.orchestration.source_watcher._SETTLE_SECONDS", 1.0)
    served = build_deployments(made_workspace.root)
    adopt_deployments(served)
    served[0].apply()
    change_the_record(made_workspace.root, "2.7.0")
    watcher = SourceWatcher(made_workspace.root, on_prefect, ["laptop"], None)
    assert [watcher.look_once("laptop").action for _ in range(3)] == ["settle", "run", "nothing"]
    change_the_record(made_workspace.root, "3.0.0")  # changed again before that run has started
    assert [watcher.look_once("laptop").action for _ in range(2)] == ["settle", "wait"]
    api = Api(on_prefect)
    runs = api.ask("POST", "/flow_runs/filter", {"flow_runs": {"tags": {"all_": [f"{CHANGED}docstrings"]}}})
    (run,) = [one for one in runs if one["parameters"]["root"] == str(made_workspace.root)]
    assert "python 2.7.0 -> 3." in run["state"]["message"]
    assert run["parameters"]["trigger"] == run["state"]["message"]
    assert notify_data(on_prefect, "docstrings", "a test")

    with tags(*run["tags"]):  # as the runner starts it
        state = load_flow(made_workspace.root, "retrain")(**run["parameters"], return_state=True)
    began = api.ask("GET", f"/flow_runs/{UUID(str(state.state_details.flow_run_id))}")
    assert began["name"].endswith("(docstrings changed)")
    chosen = {"artifacts": {"flow_run_id": {"any_": [began["id"]]}, "key": {"any_": ["laptop-trigger"]}}}
    (page,) = api.ask("POST", "/artifacts/filter", chosen)
    assert "2.7.0" in json.dumps(page["data"])
    api.ask("DELETE", f"/flow_runs/{run['id']}")
    api.client.close()
