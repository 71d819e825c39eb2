"""Going back: the steps whose numbers went wrong are passed over, and the run goes on from its last good checkpoint.

.checkpoints/<fingerprint>/rewinds.json            what is left out, written before the run goes back
.checkpoints/<fingerprint>/step-000200/manifest.json   the same, as far as this step knew

Which steps are passed over depends on the rule and the numbers alone, not on where the run goes back to: the steps
before them are made again, with the same bytes. Why so: docs/decisions/0007.
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
from ropeway.stages.train.running import Rewind, Run
from ropeway.stages.train.stop import Fault, Line

RECORD = "rewinds.json"
_NAMED_SEQUENCES = 8  # on the console; the record names all


class RestartError(TemporaryError):
    """A run goes back only in a new start; every rank raises it."""


def recall(run: Run, folder: Path, checkpoint: checkpoints.Checkpoint | None) -> None:
    """Let a run that is started know what it left out before; every rank gets what rank 0 finds.

    Raises:
        ConfigError: More was left out than params allow now.
        DataError: The record cannot be read.
    """
    found = [_read(folder, checkpoint) if run.rank == 0 else None]
    torch.distributed.broadcast_object_list(found)
    run.rewinds = tuple(found[0] or ())
    check_allowed(run.rewinds, allowed=run.profile.stop.rewinds, folder=folder)


def _read(folder: Path, checkpoint: checkpoints.Checkpoint | None) -> list[Rewind]:
    """Return the longer of two lists of which one begins the other: the folder's, and the checkpoint's."""
    saved = [Rewind(**one) for one in checkpoint.facts["rewinds"]] if checkpoint else []
    path = folder / RECORD
    try:
        noted = [Rewind(**one) for one in json.loads(path.read_bytes())["rewinds"]]
    except FileNotFoundError:
        return saved
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}), so which rows this run leaves out is not known. Remove {folder} to "
            "train from the beginning"
        ) from None
    return max(saved, noted, key=len)


def check_allowed(rewinds: Sequence[Rewind], *, allowed: int, folder: Path) -> None:
    """Raise ConfigError where a run went back more often than `stop.rewinds` allows."""
    if len(rewinds) > allowed:
        raise ConfigError(
            f"this run went back {len(rewinds)} times and left rows out ({folder / RECORD}); stop.rewinds allows "
            f"{allowed}. Set it to {len(rewinds)} at least to go on, or remove {folder} to train from the beginning"
        )


def can_rewind(fault: Fault, rewinds: Sequence[Rewind], *, allowed: int, saved_step: int | None) -> bool:
    """Return whether rows may be left out for a fault: they are suspected, and there is a place to go back to."""
    return len(fault.steps) > 0 and len(rewinds) < allowed and saved_step is not None and saved_step < fault.steps[0]


def count_used(fault: Fault, rewinds: Sequence[Rewind], *, allowed: int) -> str:
    """Return a line for who reads that the run ended: how often it went back, and what once more would do."""
    if not fault.steps:
        return ""
    return (
        f"It went back {len(rewinds)} times, stop.rewinds allows {allowed}; one more would leave out the rows of steps "
        f"{fault.steps[0]} to {fault.steps[-1]}.\n"
    )


def go_back(run: Run, folder: Path, fault: Fault) -> list[Line] | None:
    """Load the last good checkpoint and return its log; None where the run may not go back.

    What is left out is on the disk before anything else happens, so a kill at any moment changes nothing.

    Raises:
        RestartError: This start came from other ranks' checkpoint, which only a new start can load; it goes back.
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
        reason=fault.why,
        checkpoint_step=checkpoint.step,
        rows=len(fault.steps) * run.profile.global_batch_size,
        sequences=_by_source([pair for step in fault.steps for pair in run.sequences(step)]),
    )
    run.rewinds = (*run.rewinds, rewind)
    if run.rank == 0:
        write_json(folder / RECORD, {"rewinds": [asdict(one) for one in run.rewinds]})
        print(f"{fault.why}.\nrewind {len(run.rewinds)} of {allowed}: {describe(rewind)}", flush=True)
    torch.distributed.barrier()
    if run.engine.load_universal_checkpoint():
        raise RestartError(f"{folder / RECORD} says what is left out; the same command goes back and goes on")
    return saving.resume(run, checkpoint)


def _by_source(sequences: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
    """Return the numbers by source, sorted.

    >>> _by_source([("b", 7), ("a", 2), ("b", 3), ("b", 7)])
    {'a': [2], 'b': [3, 7]}
    """
    return {
        name: [number for _, number in pairs] for name, pairs in groupby(sorted(set(sequences)), lambda pair: pair[0])
    }


def describe(rewind: Rewind) -> str:
    """Return in one sentence where a run goes back to and what it leaves out."""
    names = [f"{name} {number}" for name, numbers in rewind.sequences.items() for number in numbers]
    more = f" and {len(names) - _NAMED_SEQUENCES} more" if len(names) > _NAMED_SEQUENCES else ""
    return (
        f"back to step {rewind.checkpoint_step}; the {rewind.rows} rows of steps {rewind.first_step} to "
        f"{rewind.last_step} are left out ({', '.join(names[:_NAMED_SEQUENCES])}{more})"
    )
