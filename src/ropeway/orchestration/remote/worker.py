"""Executes a request in a worker's clone, in a process of its own that runs the clone's code.

    python -m ropeway.orchestration.remote.worker REQUEST RESULT      in the workspace

Inputs come from the DVC remote; outputs, run-cache and the stage's entry of dvc.lock go back. RESULT says how it ended.
"""

import os
import signal
import socket
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from ropeway.config.addresses import without_signatures
from ropeway.config.edit import choose_profile
from ropeway.config.frozen import FrozenInputs
from ropeway.config.load_params import load_profile
from ropeway.orchestration import dvc_exchange as exchange
from ropeway.orchestration.dvc_recovery import repair, sync_results
from ropeway.orchestration.dvc_stage import Site, quote_lines, retry_while_busy, run_command, update_stage
from ropeway.orchestration.guarded_dvc import COMMAND as DVC
from ropeway.orchestration.publish import Publication, measure_champion, publish_package
from ropeway.orchestration.remote.handover import Handover, inputs_of
from ropeway.orchestration.remote.request import PREFIX, PUBLISH, StageRequest
from ropeway.orchestration.revision import read_revision
from ropeway.registry import Version
from ropeway.runtime.errors import DataError, RopewayError, TemporaryError
from ropeway.runtime.lock import workspace_lock
from ropeway.runtime.manifest import Json, write_json
from ropeway.runtime.workspace import Workspace

CHECKPOINT_STORE = "ROPEWAY_CHECKPOINT_STORE"  # read by stage train; importing that would load torch
_WITH_CHECKPOINTS = "train"


def execute(root: Path, request: StageRequest) -> Json:
    """Execute a request; return its result: `outcome` and `lock` of a stage, `publication` of publishing.

    Raises:
        RopewayError: As a run on one machine; and TemporaryError if the DVC remote does not answer.
    """
    with workspace_lock(root, command=f"a worker's {request.step}", profile=request.profile) as held:
        choose_profile(root, request.profile)
        for line in retry_while_busy(partial(repair, root), _say):
            _say(line)
        given = Handover.receive(root, request.handover)
        given.write(root)
        for sentence in given.other_versions():
            _say(f"the result can differ in its last digits from one made at the calling run: {sentence}")
        site = Site(root, held, pulls=True)
        workspace = Workspace(root, request.profile)
        if request.step == PUBLISH:
            return {"publication": _publish(site, workspace, request.run_seconds).to_json()}
        _pull(site, inputs_of(root, request.step))
        if request.step == _WITH_CHECKPOINTS:
            _say(describe_store(os.environ))
        outcome = update_stage(site, request.step, _say)
        sync_results(root, request.step, outcome)
        _push(site, request.step)
        return {"outcome": outcome, "lock": exchange.read_lock_entry(root, request.step)}


def describe_store(environment: Mapping[str, str]) -> str:
    """Return where a stage's checkpoints are once this worker is lost, and what to do if they are lost with it."""
    if url := environment.get(CHECKPOINT_STORE):
        return f"checkpoints are uploaded to {without_signatures(url)}; after a loss of this worker another one resumes"
    return (
        f"checkpoints stay on this worker, since its {CHECKPOINT_STORE} is not set: if its machine is lost, another "
        "worker trains from the first step. To keep them, set it for every worker of the pool, e.g. s3://bucket/prefix"
    )


def _publish(site: Site, workspace: Workspace, run_seconds: float | None) -> Publication:
    params = load_profile(FrozenInputs.load(site.root).params_file, workspace.profile)[1]
    wanted = (workspace.package, workspace.pages, workspace.evaluation, workspace.timings, workspace.record_index)
    made = {path for paths in exchange.outputs(site.root).values() for path in paths}
    _pull(site, [path for path in (each.relative_to(site.root).as_posix() for each in wanted) if path in made])

    def measure(champion: Version, sections: Mapping[str, str]) -> Mapping[str, object] | None:
        _pull(site, exchange.inputs(site.root, "evaluate"))
        return measure_champion(site, workspace, champion, sections, _say)

    done = publish_package(
        workspace, params, read_revision(site.root, workspace.profile), measure, run_seconds=run_seconds
    )
    for line in str(done.verdict).splitlines() if done.verdict else ():
        _say(line)
    return done


def _pull(site: Site, paths: "tuple[str, ...] | list[str]") -> None:
    """Pull outputs of other stages. `--force`: what lies there in a worker's clone is of an earlier request."""
    if not paths:
        return
    code, lines = run_command(site, "pull", [*DVC, "pull", "--force", "--run-cache", "--", *paths], _say)
    if code:
        quote = quote_lines(lines)
        raise DataError(
            f"the DVC remote does not return the inputs {', '.join(paths)}. Run `dvc push` on the machine that made "
            f"them, or unset {PREFIX}* of the stages that make them; last lines:\n{quote}"
        )


def _push(site: Site, stage: str) -> None:
    code, lines = run_command(site, "push", [*DVC, "push", "--run-cache", stage], _say)
    if code:
        quote = quote_lines(lines)
        raise TemporaryError(
            f"stage {stage} ended here, but its outputs did not reach the DVC remote; a retry pushes them again "
            f"without running it:\n{quote}"
        )


def _say(line: str) -> None:
    print(line, flush=True)


def main(arguments: list[str]) -> int:
    """Execute a request file, write the result file and return the exit code."""
    source, target = (Path(each) for each in arguments)
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]  # a worker runs its stage here
    result: dict[str, object] = {"host": socket.gethostname()}
    code = 0
    try:
        result |= execute(Path.cwd(), StageRequest.from_json(source.read_text(encoding="utf-8")))
    except RopewayError as error:
        code = error.exit_code
        result["error"] = {"exit_code": code, "message": str(error)}
        _say(str(error))
    write_json(target, result)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
