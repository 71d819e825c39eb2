"""Stage train: starts the ranks (`rank`), which train the base model on the data; writes the log and metrics."""

import csv
import io
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import TrainParams
from ropeway.data.accumulation import accumulation_steps
from ropeway.models.architectures import PACKED, check_proof
from ropeway.runtime.devices import count_ranks
from ropeway.runtime.environment import read_count
from ropeway.runtime.errors import DataError, RopewayError, TemporaryError
from ropeway.runtime.grace import StopFiles
from ropeway.runtime.launcher import build_launch_command, free_port, rank_environment
from ropeway.runtime.manifest import NAME, load_manifest, write_atomic, write_json
from ropeway.runtime.op_build import announce_build, clear_dead_locks, extensions_folder, unlink_buffers
from ropeway.runtime.slurm import job_name
from ropeway.runtime.slurm_job import settle_earlier_job
from ropeway.runtime.supervise import signal_of
from ropeway.runtime.workspace import Workspace
from ropeway.stages.train import checkpoint_store, checkpoints, continuing
from ropeway.stages.train.checkpoint_store import StoredRun, Uploader, remove_old_runs
from ropeway.stages.train.continuing import Fingerprint, compute_fingerprint
from ropeway.stages.train.deepspeed_config import parse_deepspeed_json
from ropeway.stages.train.stop import Line, attempted_steps

DEFAULT_KEEP_RUNS = 3
OUT_OF_MEMORY = " (usually the kernel's out-of-memory killer; check `dmesg`)"


def run(workspace: Workspace, profile: TrainParams) -> None:
    """Train to the last step, resuming from the newest valid checkpoint of the same run, and write the stage's files.

    Raises:
        ConfigError: Params, number of ranks, DeepSpeed JSON and machine do not match.
        DataError: A file of base or data changed after it was written.
        TemporaryError: A rank was terminated by a signal; the same command resumes.
        SystemExit: A rank failed with an error that it printed; its exit code is passed on.
    """
    keep = _read_keep_runs(os.environ)
    ranks = count_ranks()
    accumulation_steps(profile, ranks)
    frozen = FrozenInputs.load(workspace.root)
    parse_deepspeed_json(frozen.text("deepspeed", profile.deepspeed_config), profile.deepspeed_config)
    fingerprint = compute_fingerprint(workspace, profile, frozen)
    if profile.layout == "packed":  # of padded rows a rank decides, which knows the kernel
        base = load_manifest(workspace.base, remedy="Run `dvc repro base`", verify=False)
        check_proof(base["proofs"], PACKED, where=base["model"]["name"])
    print(f"training run {fingerprint.digest}", flush=True)
    folder = workspace.checkpoints / fingerprint.digest
    checkpoints.write_run_info(
        folder, {"profile": workspace.profile, "parts": fingerprint.parts, "params": fingerprint.params}
    )
    stored = _open_store(os.environ, workspace, fingerprint)
    arguments = [str(workspace.root), workspace.profile, fingerprint.digest]
    if not settle_earlier_job(workspace.root, job_name(workspace.profile, fingerprint.digest), ranks, os.environ):
        continuing.continue_run(workspace, profile, fingerprint)
        arguments.append(str(_prepare_checkpoint(folder, stored, ranks=ranks)))
        workspace.progress("train").unlink(missing_ok=True)
    workspace.work.mkdir(exist_ok=True)
    files = StopFiles(workspace.work, "train")
    files.remove()  # of an attempt that was killed
    port, environment = free_port(), rank_environment(os.environ, ranks=ranks)
    command = build_launch_command(environment, arguments, ranks=ranks, port=port)
    clear_dead_locks(extensions_folder(environment))
    if environment.get("DS_ACCELERATOR") == "cpu":
        announce_build(extensions_folder(environment))
    try:
        with Uploader(stored, folder).running() if stored else nullcontext():
            code = subprocess.run(command, env=environment, check=False).returncode
    finally:
        files.remove()
        unlink_buffers(port)  # those of ranks that ended without removing them
    code = code if code >= 0 else 128 - code
    if signal_name := signal_of(code):
        raise TemporaryError(
            f"a rank was terminated by {signal_name}{OUT_OF_MEMORY if signal_name == 'SIGKILL' else ''}; run the same "
            "command again, it resumes from the last checkpoint"
        )
    if code:
        raise SystemExit(code)
    if not (workspace.model / NAME).is_file():  # DeepSpeed's runner ends with 0 where its pdsh was killed (0.19.8)
        raise TemporaryError("the ranks ended without a model; run the same command again, it resumes")
    _write_files(workspace, profile, fingerprint)
    _prune(workspace, fingerprint, keep)
    if stored:
        _prune_store(stored, workspace, fingerprint, keep)


def _open_store(environment: Mapping[str, str], workspace: Workspace, fingerprint: Fingerprint) -> StoredRun | None:
    """Return where this run's checkpoints are stored besides this machine; None if nowhere."""
    url = environment.get(checkpoint_store.VARIABLE)
    return StoredRun.open(url, workspace.profile, fingerprint.digest) if url else None


def _prepare_checkpoint(folder: Path, stored: StoredRun | None, *, ranks: int) -> int:
    """Return the step of the checkpoint to resume from, verified and for this number of ranks; 0 if there is none.

    Before the ranks start: the others would wait for the one that hashes, 4 minutes for the published run.
    """
    checkpoints.clear_unfinished(folder)
    checkpoint = checkpoints.newest_valid(folder)
    if stored and (step := stored.download_newest(folder, above=checkpoint.step if checkpoint else 0)):
        print(f"checkpoint of step {step} was fetched from {stored.store.url}", flush=True)
        checkpoint = checkpoints.newest_valid(folder)
    checkpoints.convert_for_ranks(checkpoint, ranks=ranks)
    return checkpoint.step if checkpoint else 0


def _prune_store(stored: StoredRun, workspace: Workspace, fingerprint: Fingerprint, keep: int) -> None:
    """Remove older runs from the store; a failure is printed."""
    try:
        removed = remove_old_runs(stored.store, workspace.profile, current=fingerprint.digest, keep=keep)
    except RopewayError as error:
        print(f"older runs could not be removed from {stored.store.url}: {error}", flush=True)
        return
    if removed:
        print(f"removed from {stored.store.url}: runs {', '.join(removed)} (ROPEWAY_KEEP_RUNS)", flush=True)


def _prune(workspace: Workspace, fingerprint: Fingerprint, keep: int) -> None:
    """Remove checkpoints of older runs; a failure is printed and does not fail the run that has just finished."""
    try:
        removed = checkpoints.prune_runs(
            workspace.checkpoints, profile=workspace.profile, current=fingerprint.digest, keep=keep
        )
    except OSError as error:
        print(f"checkpoints of older runs could not be removed: {error}", flush=True)
        return
    if removed:
        print(f"checkpoints of older runs removed (ROPEWAY_KEEP_RUNS): {', '.join(removed)}", flush=True)


def _read_keep_runs(environment: Mapping[str, str]) -> int:
    """Return for how many runs per profile checkpoints are kept.

    Raises:
        ConfigError: `ROPEWAY_KEEP_RUNS` is not a positive whole number.
    """
    return read_count(environment, "ROPEWAY_KEEP_RUNS") or DEFAULT_KEEP_RUNS


def _write_files(workspace: Workspace, profile: TrainParams, fingerprint: Fingerprint) -> None:
    """Write steps.csv, train.json and provenance.json from the last checkpoint's log."""
    folder = workspace.checkpoints / fingerprint.digest
    last = checkpoints.newest_valid(folder)
    model = load_manifest(workspace.model, remedy="Run the stage again; it exports from the last checkpoint")
    if last is None or last.step != model["steps"]:
        raise DataError(
            f"{folder}: the exported model is of step {model['steps']}, but the last valid checkpoint is "
            f"{'missing' if last is None else f'of step {last.step}'}; run the stage again"
        )
    log, record = last.log(), continuing.read_continued_from(folder)
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
    """Return one record per start of a run; a line that is not JSON (cut by a full disk) is skipped with a warning."""
    records = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        print(f"{path}: cannot be read ({error}); provenance.json lists no attempts", flush=True)
        return []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            print(f"{path}:{number}: not JSON; provenance.json does not list this attempt", flush=True)
    return records


def _metrics(
    log: Sequence[Line], rewinds: Sequence[Mapping[str, int]], profile: TrainParams, fingerprint: Fingerprint
) -> dict[str, object]:
    end, steps = log[-1], attempted_steps(log)
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
    """Return the log as CSV; a column that a step does not have (validation) is empty."""
    columns = list(dict.fromkeys(key for line in log for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(log)
    return text.getvalue()
