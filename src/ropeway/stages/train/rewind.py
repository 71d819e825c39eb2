"""Rewind after a fault: resume from the last good checkpoint and leave out the rows of the faulty steps.

.checkpoints/<fingerprint>/rewinds.json                which steps are left out, written before the rewind
.checkpoints/<fingerprint>/step-000200/manifest.json   the same list, as of this step

Which steps are left out depends only on the stop rule and the log, not on the checkpoint: the steps between the
checkpoint and the fault are run again with the same result. Reasons: docs/decisions/0007-rewind.md.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import torch

from ropeway.runtime.errors import ConfigError, DataError, TemporaryError
from ropeway.runtime.manifest import write_json
from ropeway.stages.train import checkpoints, saving
from ropeway.stages.train.stop import Fault, Line
from ropeway.stages.train.training_run import Rewind, Run

RECORD = "rewinds.json"
_NAMED_SEQUENCES = 8  # printed; rewinds.json has all


class RestartError(TemporaryError):
    """The rewind needs a restart of the stage; every rank raises it."""


def load_rewinds(run: Run, folder: Path, checkpoint: checkpoints.Checkpoint | None) -> None:
    """Set `run.rewinds` to the rewinds of earlier attempts, read by rank 0 and broadcast.

    Raises:
        ConfigError: There were more rewinds than params allow now.
        DataError: rewinds.json cannot be read.
    """
    found = [_read_record(folder, checkpoint) if run.rank == 0 else None]
    torch.distributed.broadcast_object_list(found)
    run.rewinds = tuple(found[0] or ())
    check_allowed(run.rewinds, allowed=run.profile.stop.rewinds, folder=folder)


def _read_record(folder: Path, checkpoint: checkpoints.Checkpoint | None) -> list[Rewind]:
    """Return the rewinds of rewinds.json or of the checkpoint, whichever list is longer; they share a prefix."""
    saved = [Rewind(**one) for one in checkpoint.facts["rewinds"]] if checkpoint else []
    path = folder / RECORD
    try:
        recorded = [Rewind(**one) for one in json.loads(path.read_bytes())["rewinds"]]
    except FileNotFoundError:
        return saved
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}), so the rows that this run leaves out are not known. Remove {folder} to "
            "train from the beginning"
        ) from None
    return max(saved, recorded, key=len)


def check_allowed(rewinds: Sequence[Rewind], *, allowed: int, folder: Path) -> None:
    """Raise ConfigError where a run has more rewinds than `stop.rewinds` allows."""
    if len(rewinds) > allowed:
        raise ConfigError(
            f"{folder / RECORD}: this run has {len(rewinds)} rewinds, stop.rewinds allows {allowed}. Set stop.rewinds "
            f"to {len(rewinds)} or more to continue, or remove {folder} to train from the beginning"
        )


def can_rewind(fault: Fault, rewinds: Sequence[Rewind], *, allowed: int, saved_step: int | None) -> bool:
    """Return whether the run may rewind: rows may be the cause, a rewind is left, a checkpoint is older."""
    return len(fault.steps) > 0 and len(rewinds) < allowed and saved_step is not None and saved_step < fault.steps[0]


def describe_rewinds_left(fault: Fault, rewinds: Sequence[Rewind], *, allowed: int) -> str:
    """Return a line for the error that ends a run: rewinds used and allowed, and what another one would leave out."""
    if not fault.steps:
        return ""
    return (
        f"Rewinds used: {len(rewinds)}, allowed by stop.rewinds: {allowed}; one more would leave out the rows of steps "
        f"{fault.steps[0]} to {fault.steps[-1]}.\n"
    )


def rewind_run(run: Run, folder: Path, fault: Fault) -> list[Line] | None:
    """Load the last good checkpoint and return its log; None where the run may not rewind.

    The left-out steps are on disk before the checkpoint is loaded, so a kill at any moment does not change the result.

    Raises:
        RestartError: This start loaded a converted (universal) checkpoint; only a restart can load another one.
    """
    found = [checkpoints.newest_valid(folder) if run.rank == 0 else None]
    torch.distributed.broadcast_object_list(found)
    checkpoint, allowed = found[0], run.profile.stop.rewinds
    saved_step = checkpoint.step if checkpoint else None
    if checkpoint is None or not can_rewind(fault, run.rewinds, allowed=allowed, saved_step=saved_step):
        return None
    rewind = Rewind(
        first_step=fault.steps[0],
        last_step=fault.steps[-1],
        reason=fault.reason,
        checkpoint_step=checkpoint.step,
        rows=len(fault.steps) * run.profile.global_batch_size,
        sequences=_by_source([pair for step in fault.steps for pair in run.sequences(step)]),
    )
    run.rewinds = (*run.rewinds, rewind)
    if run.rank == 0:
        write_json(folder / RECORD, {"rewinds": [asdict(one) for one in run.rewinds]})
        print(f"{fault.reason}.\nrewind {len(run.rewinds)} of {allowed}: {describe(rewind)}", flush=True)
    torch.distributed.barrier()
    if run.engine.load_universal_checkpoint():
        raise RestartError(f"{folder / RECORD}: rewind recorded; run the same command again, it rewinds and continues")
    return saving.resume(run, checkpoint)


def _by_source(sequences: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
    """Return the sequence numbers by source, sorted.

    >>> _by_source([("b", 7), ("a", 2), ("b", 3), ("b", 7)])
    {'a': [2], 'b': [3, 7]}
    """
    return {
        name: [number for _, number in pairs] for name, pairs in groupby(sorted(set(sequences)), lambda pair: pair[0])
    }


def describe(rewind: Rewind) -> str:
    """Return a sentence with the step to resume from and the rows that are left out."""
    names = [f"{name} {number}" for name, numbers in rewind.sequences.items() for number in numbers]
    more = f" and {len(names) - _NAMED_SEQUENCES} more" if len(names) > _NAMED_SEQUENCES else ""
    return (
        f"resuming after step {rewind.checkpoint_step}; the {rewind.rows} rows of steps {rewind.first_step} to "
        f"{rewind.last_step} are left out ({', '.join(names[:_NAMED_SEQUENCES])}{more})"
    )
