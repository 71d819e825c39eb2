"""The flow `retrain`: what a run does, from top to bottom.

`ropeway run` and the deployments of `ropeway serve` load this file as Prefect does. A task of your own goes between
these lines, before `run.publish()`: once the last of them has a result, the process ends within a bounded time.
"""

from prefect import flow
from prefect.client.schemas.objects import State

from ropeway.orchestration.prefect_adapter import end_state, name_run, open_run


@flow(name="retrain", flow_run_name=name_run, validate_parameters=False)
def retrain(root: str = ".", profile: str | None = None) -> State[object]:
    """Train the model that params.yaml describes, if anything it depends on changed, and register it.

    Args:
        root: The workspace.
        profile: Which of its runs; default: the one that params.yaml names.
    """
    with open_run(root, profile) as run:
        run.pull()
        run.freeze_inputs()
        run.make_plan()
        run.run_stages()
        run.publish()
        run.push()
        run.ask_review()
    return end_state(run.result)
