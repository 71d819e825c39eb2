"""The flow `review`: publishes a report on one version, waits for a person's answer, and acts on it.

A suspended run ends its process and starts again from its first line when resumed (Prefect 3.9.1). The versions that
its report compares are therefore stored as labels of the run, and before the answer the flow only reads.
"""

from typing import Annotated, Literal
from uuid import UUID

from prefect import flow, get_run_logger, runtime, suspend_flow_run
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.input import RunInput
from prefect.states import Completed
from pydantic import Field, ValidationError

from ropeway.orchestration.decision import ReviewAnswer, decide, open_review
from ropeway.orchestration.flow_parameters import read_hours, read_root, read_text
from ropeway.orchestration.prefect_adapter import artifact_prefix
from ropeway.registry import PRODUCTION, Registry
from ropeway.reporting.evidence import ReviewCase
from ropeway.reporting.markdown import code
from ropeway.reporting.review_report import render_review, render_summary
from ropeway.runtime.errors import RegistryError
from ropeway.runtime.workspace import Workspace

EXPIRES_HOURS = 168.0
_DIGEST, _PRODUCTION = "ropeway.digest", "ropeway.production"
_NONE = "none"
_RequiredText = Annotated[str, Field(min_length=1, max_length=2000, pattern=r"\S")]


class Form(RunInput):
    """Promote this version to production?"""

    # Every field is required: if all had defaults, Prefect (3.9.1) would accept `{}` as an answer.

    decision: Literal["approve", "reject"] = Field(description="Approve makes this version production.")
    reviewer: _RequiredText = Field(description="Your name; recorded permanently.")
    comment: _RequiredText = Field(description="Why; recorded permanently.")


def _name_run() -> str:
    return f"review-{read_text('digest', runtime.flow_run.parameters['digest'])[:20]}"


@flow(name="review", flow_run_name=_name_run, validate_parameters=False)
def review(digest: str, root: str = ".", expires_hours: float = EXPIRES_HOURS) -> State[object]:
    """Ask a person whether a version may become production, and act on the answer.

    Args:
        digest: The version: its digest (8 digits or more) or NAME@v3.
        root: The workspace whose registry holds the version.
        expires_hours: Hours after which the review expires and no alias moves.
    """
    hours, wanted = read_hours("expires_hours", expires_hours), read_text("digest", digest)
    registry = Registry.open(Workspace(read_root(root), "").registry_url)
    case = _pin(registry, wanted)
    form = Form.with_initial_data(description=render_summary(case, heading="###"))
    try:
        said = suspend_flow_run(wait_for_input=form, timeout=max(1, int(hours * 3600)), key="answer")
    except ValidationError:
        raise RegistryError(
            f"{case.new.label}: this review was resumed without an answer; nothing was decided and no alias moved. "
            "Start another review and fill in its form"
        ) from None
    answer = ReviewAnswer(said.decision, said.reviewer.strip(), said.comment.strip(), f"flow run {runtime.flow_run.id}")
    outcome = decide(registry, case, answer)
    get_run_logger().info(outcome.words)
    return Completed(name=outcome.state, message=outcome.words)


def _pin(registry: Registry, wanted: str) -> ReviewCase:
    """Return the case; at the first start also publish its report and label the run with the versions it compares."""
    run = UUID(str(runtime.flow_run.id))
    with get_client(sync_client=True) as client:
        labels = client.read_flow_run(run).labels
        if _PRODUCTION in labels:
            return open_review(
                registry, str(labels[_DIGEST]), expect=None if (was := str(labels[_PRODUCTION])) == _NONE else was
            )
        case = open_review(registry, wanted)
        create_markdown_artifact(
            key=f"{artifact_prefix(case.name)}-review",
            markdown=render_review(case),
            description=f"Promote {case.new.label} to {PRODUCTION}? {code(case.digest)}",
        )
        pinned: dict[str, bool | int | float | str] = {
            _DIGEST: f"{case.name}@{case.digest}",
            _PRODUCTION: case.expect or _NONE,
        }
        client.update_flow_run_labels(run, pinned)
    return case
