"""The flow `retrain`: the steps of a run, from top to bottom.

`ropeway run` and the deployments of `ropeway serve` load this file as Prefect does. Add your own tasks between these
lines, before `run.publish()`: once the last step has a result, the process exits within 15 seconds.
"""

from prefect import flow
from prefect.client.schemas.objects import State

from ropeway.orchestration.flow_parameters import read_switch
from ropeway.orchestration.prefect_adapter import end_state, name_run, open_run


@flow(name="retrain", flow_run_name=name_run, validate_parameters=False)
def retrain(
    root: str = ".",
    profile: str | None = None,
    rehearse: bool = False,  # noqa: FBT001, FBT002
    trigger: str = "",  # noqa: ARG001 - `open_run` shows it
) -> State[object]:
    """Train and register the model that params.yaml describes, if anything it depends on changed.

    Args:
        root: The workspace.
        profile: The profile of params.yaml; default: the one that its line `profile:` names.
        rehearse: Run the pipeline on a few records first; if that fails, no stage starts.
        trigger: Why this run was started, e.g. which source changed; shown in its log and on its page.
    """
    with open_run(root, profile) as run:
        run.pull()
        run.freeze_inputs()
        run.make_plan()
        if read_switch("rehearse", rehearse):
            run.rehearse()
        run.run_stages()
        run.publish()
        run.push()
        run.ask_review()
    return end_state(run.result)
