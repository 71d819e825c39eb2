"""Stage train: base and data in, a trained model and its log out. This module starts the ranks that `rank` is."""

import csv
import io
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import TrainParams
from ropeway.data.accumulation import accumulation_steps
from ropeway.runtime.devices import count_ranks
from ropeway.runtime.errors import ConfigError, DataError, TemporaryError
from ropeway.runtime.launcher import free_port, plan_command, plan_environment
from ropeway.runtime.manifest import load_manifest, write_atomic, write_json
from ropeway.runtime.op_build import announce_build, clear_dead_locks, extensions_folder, unlink_buffers
from ropeway.runtime.supervise import signal_of
from ropeway.runtime.workspace import Workspace
from ropeway.stages.train import checkpoints, continuing
from ropeway.stages.train.continuing import Fingerprint, take_fingerprint
from ropeway.stages.train.deepspeed_config import parse_deepspeed_json
from ropeway.stages.train.stop import Line, made

KEPT_RUNS = 3
OUT_OF_MEMORY = " (where nobody sent it, the machine ran out of memory: `dmesg` says so)"


def run(workspace: Workspace, profile: TrainParams) -> None:
    """Train to the end, resuming from the newest valid checkpoint of this very run, and write the stage's files.

    Raises:
        ConfigError: Params, ranks, DeepSpeed JSON or machine do not fit together.
        DataError: Base or data changed after they were written.
        TemporaryError: A rank was ended by a signal.
        SystemExit: A rank ended with an error of its own, already printed; the code is passed on.
    """
    keep = _kept_runs(os.environ)
    ranks = count_ranks()
    accumulation_steps(profile, ranks)
    frozen = FrozenInputs.load(workspace.root)
    parse_deepspeed_json(frozen.text("deepspeed", profile.deepspeed_config), profile.deepspeed_config)
    fingerprint = take_fingerprint(workspace, profile, frozen)
    print(f"training run {fingerprint.digest}", flush=True)
    folder = workspace.checkpoints / fingerprint.digest
    checkpoints.claim(folder, {"profile": workspace.profile, "parts": fingerprint.parts, "params": fingerprint.params})
    continuing.go_on(workspace, profile, fingerprint)
    checkpoints.make_loadable(folder, ranks=ranks)
    workspace.work.mkdir(exist_ok=True)
    workspace.progress("train").unlink(missing_ok=True)
    arguments = [str(workspace.root), workspace.profile, fingerprint.digest]
    port, environment = free_port(), plan_environment(os.environ, ranks=ranks)
    command = plan_command(os.environ, arguments, ranks=ranks, port=port)
    clear_dead_locks(extensions_folder(environment))
    if environment.get("DS_ACCELERATOR") == "cpu":
        announce_build(extensions_folder(environment))
    try:
        code = subprocess.run(command, env=environment, check=False).returncode
    finally:
        unlink_buffers(port)  # of ranks that ended before they did it themselves
    code = code if code >= 0 else 128 - code
    if died_of := signal_of(code):
        raise TemporaryError(
            f"a rank was ended by {died_of}{OUT_OF_MEMORY if died_of == 'SIGKILL' else ''}; the same command resumes "
            "from the last checkpoint"
        )
    if code:
        raise SystemExit(code)
    _write_files(workspace, profile, fingerprint)
    _prune(workspace, fingerprint, keep)


def _prune(workspace: Workspace, fingerprint: Fingerprint, keep: int) -> None:
    """Remove checkpoints of older runs; whatever goes wrong there does not lose the run that has just ended."""
    try:
        gone = checkpoints.prune_runs(
            workspace.checkpoints, profile=workspace.profile, current=fingerprint.digest, keep=keep
        )
    except OSError as error:
        print(f"checkpoints of older runs could not be removed: {error}", flush=True)
        return
    if gone:
        print(f"checkpoints of older runs removed (ROPEWAY_KEEP_RUNS): {', '.join(gone)}", flush=True)


def _kept_runs(environment: Mapping[str, str]) -> int:
    """Return of how many runs of a profile checkpoints stay.

    Raises:
        ConfigError: `ROPEWAY_KEEP_RUNS` is not a positive whole number.
    """
    stated = environment.get("ROPEWAY_KEEP_RUNS", str(KEPT_RUNS))
    if not stated.isdecimal() or int(stated) < 1:
        raise ConfigError(f"ROPEWAY_KEEP_RUNS: expected a positive whole number, found {stated!r}")
    return int(stated)


def _write_files(workspace: Workspace, profile: TrainParams, fingerprint: Fingerprint) -> None:
    """Write steps.csv, train.json and provenance.json from the last checkpoint's log."""
    folder = workspace.checkpoints / fingerprint.digest
    last = checkpoints.newest_valid(folder)
    model = load_manifest(workspace.model, remedy="Run the stage again; it exports without training")
    if last is None or last.step != model["steps"]:
        raise DataError(f"{folder}: the last checkpoint is not the exported step {model['steps']}; run the stage again")
    log, record = last.log(), continuing.read_record(folder)
    write_atomic(workspace.steps, _csv(log).encode())
    write_json(
        workspace.train_metrics,
        {**_metrics(log, last.facts["rewinds"], profile, fingerprint), "continued_from": record},
    )
    facts = {
        "fingerprint": fingerprint.digest,
        "parts": fingerprint.parts,
        "attempts": _read_attempts(folder / "attempts.jsonl"),
        "rewinds": last.facts["rewinds"],
        "continued_from": record,
    }
    write_json(workspace.timings, facts)


def _read_attempts(path: Path) -> list[object]:
    """Return the records of all starts of a run; a line that a full disk cut is left out, and said."""
    found = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        print(f"{path}: cannot be read ({error}); provenance.json has no attempts", flush=True)
        return []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError:
            print(f"{path}:{number}: not JSON; that start is not in provenance.json", flush=True)
    return found


def _metrics(
    log: Sequence[Line], rewinds: Sequence[Mapping[str, int]], profile: TrainParams, fingerprint: Fingerprint
) -> dict[str, object]:
    end, steps = log[-1], made(log)
    losses = {name: end.get(f"validation_{name}") for name, _ in profile.mixture}
    return {
        "fingerprint": fingerprint.digest,
        "steps": len(log),
        "applied_steps": sum(line["applied"] for line in log),
        "rewinds": len(rewinds),
        "rows_left_out": sum(rewind["rows"] for rewind in rewinds),
        "epochs": profile.num_train_epochs,
        "tokens": sum(line["tokens"] for line in log),
        "supervised_tokens": sum(line["supervised_tokens"] for line in log),
        "first_loss": round(steps[0]["loss"], 6),
        "final_loss": round(steps[-1]["loss"], 6),
        "validation": {name: loss if loss is None else round(loss, 6) for name, loss in losses.items()},
    }


def _csv(log: Sequence[Line]) -> str:
    """Return the log as CSV; a column that a line lacks (no validation at that step) stays empty."""
    columns = list(dict.fromkeys(key for line in log for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(log)
    return text.getvalue()
