"""The review on a real Prefect server: a flow run that suspends, is resumed through the API, and runs again."""

import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ropeway.orchestration.sequence import run_retrain
from ropeway.registry import Registry
from ropeway.runtime.errors import RegistryError
from ropeway.runtime.workspace import Workspace
from tests.support.review_world import make_version

FLOWS = Path(__file__).parents[2] / "flows"
YES = {"decision": "approve", "reviewer": "anna", "comment": "reads well"}
pytestmark = pytest.mark.filterwarnings(
    # dvc 3.67.1 (repo/trie.py, repo/graph.py) on pygtrie 2.6
    "ignore:_NoneStep.value will soon raise:DeprecationWarning"
)


class Reviews:
    """One model with a version in production and one to review, and the deployments on the server."""

    def __init__(self, root, client):
        from ropeway.orchestration.deployments import build_deployments

        self.client = client
        shutil.copytree(FLOWS, root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
        self.workspace = Workspace(root, "laptop")
        self.registry = Registry.open(self.workspace.registry_url)
        self.deployments = {each.name: each.apply() for each in build_deployments(root)}
        self.first = make_version(self.workspace, 5.0)
        self.registry.artifact("laptop").version(self.first).promote(
            "production", expect=None, by="ben", reason="the first of its name"
        )
        self.second = make_version(self.workspace, 4.5)

    def start(self, **parameters):
        given = {"digest": self.second, "root": str(self.workspace.root), **parameters}
        run = self.client.create_flow_run_from_deployment(self.deployments["review"], parameters=given)
        self.execute(run.id)
        return run.id

    def execute(self, run_id):
        """Run a flow run as a runner's child does."""
        from prefect.exceptions import Pause
        from prefect.flow_engine import run_flow

        from flows.review import review

        run = self.client.read_flow_run(run_id)
        with suppress(Pause):
            run_flow(review, flow_run=run, parameters=run.parameters, return_type="state")

    def resume(self, run_id, answer):
        return self.client.resume_flow_run(run_id, run_input=answer).status.value

    def state(self, run_id):
        return self.client.read_flow_run(run_id).state

    def production(self):
        return self.registry.artifact("laptop").alias("production").digest


@pytest.fixture
def reviews(tmp_path, on_prefect, monkeypatch):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.delenv("ROPEWAY_REGISTRY", raising=False)
    with temporary_settings({PREFECT_API_URL: on_prefect}), get_client(sync_client=True) as client:
        yield Reviews(tmp_path, client)


def find_artifacts(reviews, run_id):
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
    return reviews.client.read_artifacts(artifact_filter=chosen)


def test_review_waits_refuses_an_empty_or_wrong_answer_and_promotes_on_approval(reviews):
    run = reviews.start()
    assert reviews.state(run).name == "Suspended"
    for wrong in (
        {},
        None,
        {**YES, "decision": "perhaps"},
        {**YES, "reviewer": ""},
        {**YES, "comment": "   "},
        {**YES, "extra": 1},
    ):
        assert reviews.resume(run, wrong) == "REJECT", wrong
    assert reviews.state(run).name == "Suspended"
    assert reviews.production() == reviews.first

    assert reviews.resume(run, YES) == "ACCEPT"
    reviews.execute(run)
    assert (reviews.state(run).name, reviews.production()) == ("Promoted", reviews.second)
    event = reviews.registry.artifact("laptop").alias("production").events[-1]
    assert (event["by"], event["reason"], event["prev"]) == ("anna", "reads well", reviews.first)
    assert event["review"]["via"] == f"flow run {run}"
    (report,) = find_artifacts(reviews, run)  # made once, though the flow ran twice
    assert report.key == "laptop-review"
    assert "# Promote laptop@v2 to production?" in report.data
    assert "data:image/svg+xml;base64," in report.data


def test_review_that_is_rejected_moves_nothing(reviews):
    run = reviews.start()
    assert reviews.resume(run, {**YES, "decision": "reject"}) == "ACCEPT"
    reviews.execute(run)
    assert (reviews.state(run).name, reviews.production()) == ("Rejected", reviews.first)
    (kept,) = reviews.registry.artifact("laptop").version(reviews.second).reviews
    assert (kept["decision"], kept["by"]) == ("reject", "anna")


def test_review_does_not_promote_when_production_moved_after_its_report(reviews):
    run = reviews.start()
    third = make_version(reviews.workspace, 4.0)
    reviews.registry.artifact("laptop").version(third).promote(
        "production", expect=reviews.first, by="ben", reason="faster"
    )
    reviews.resume(run, YES)
    reviews.execute(run)
    state = reviews.state(run)
    assert state.name == "Failed"
    assert "laptop@v2 was approved by anna but is NOT production" in state.message
    assert third in state.message
    assert reviews.production() == third


def test_an_unanswered_review_expires_and_cannot_be_answered(reviews):
    run = reviews.start(expires_hours=1 / 3600)
    deadline = time.monotonic() + 300
    while reviews.state(run).name == "Suspended" and time.monotonic() < deadline:
        time.sleep(0.2)  # the server looks every 5 s
    assert reviews.state(run).type.value == "FAILED"
    assert reviews.resume(run, YES) == "ABORT"
    assert reviews.production() == reviews.first


def test_a_review_resumed_without_input_through_the_api_decides_nothing(reviews):
    from prefect.states import Completed, Scheduled

    run = reviews.start()
    reviews.client.set_flow_run_state(run, Scheduled(), force=True)
    reviews.execute(run)
    state = reviews.state(run)
    assert state.name == "Failed"
    assert "resumed without an answer; nothing was decided" in state.message
    other = reviews.start()
    reviews.client.set_flow_run_state(other, Completed(name="Promoted"), force=True)
    assert reviews.production() == reviews.first
    assert reviews.registry.artifact("laptop").version(reviews.second).reviews == []


def test_promote_and_rollback_flows_check_the_expected_alias(reviews):
    from flows.promote import promote, rollback

    root = str(reviews.workspace.root)
    common = {"by": "anna", "reason": "tried it", "root": root, "return_state": True}
    late = promote(reviews.second, expect="none", **common)
    assert "it was not moved" in late.message
    assert promote(reviews.second, expect="v1", **common).name == "Promoted"
    assert reviews.production() == reviews.second
    assert isinstance(rollback("laptop", expect="v1", **common).result(raise_on_failure=False), RegistryError)
    assert rollback("laptop", expect="v2", **common).name == "Promoted"
    assert reviews.production() == reviews.first


def test_a_run_starts_a_served_review_or_prints_the_review_command(made_workspace, reviews, monkeypatch, capsys):
    made_workspace.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 3e-3")
    with monkeypatch.context() as patch:
        patch.setattr("ropeway.orchestration.prefect_adapter.persistent_server_url", lambda _root: None)
        first = run_retrain(made_workspace.root)
    digest = first.publication.digest
    assert first.review is None
    assert f"next             ropeway review {digest[:12]}\n" in capsys.readouterr().out

    made_workspace.edit("params.yaml", "learning_rate: 3e-3", "learning_rate: 1e-3")
    monkeypatch.setattr("ropeway.orchestration.prefect_adapter.is_served", lambda _deployment: True)
    second = run_retrain(made_workspace.root)
    asked = reviews.client.read_flow_run(second.review.rpartition("/")[2])
    assert asked.parameters["digest"] == second.publication.digest
    assert asked.deployment_id == reviews.deployments["review"]
