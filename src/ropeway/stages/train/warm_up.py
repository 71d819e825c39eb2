"""What is tried before step 1: packed rows stay apart, the worst micro-batch fits, a checkpoint can be resumed from."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ropeway.data.batches import Row, collate
from ropeway.runtime.errors import ConfigError, TrainingError
from ropeway.stages.train import checkpoints
from ropeway.stages.train.loop import forward_backward, to_tensors
from ropeway.stages.train.running import Run

# fp32: tests/unit/data/test_packing.py compares packed rows within 1e-4. The 16-bit limits are rounding by estimate,
# not measured.
ISOLATION_TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}


@torch.no_grad()
def check_isolation(run: Run) -> float | None:
    """Return how far losses in a packed row are from those of its sequences alone; None where nothing is packed.

    Proven on the live model and backend, since a backend that ignores the borders trains without a word.

    Raises:
        ConfigError: Sequences of a row read each other.
    """
    plan = run.plan(0)
    row = next((row for row in plan.packed or () if len(row) > 1), None)
    if row is None:
        return None
    run.engine.eval()
    together, *alone = (
        run.engine.module(**to_tensors(collate([one], run.shards, run.profile), run.device))
        for one in (row, *((piece,) for piece in row))
    )
    run.engine.train()
    worst = float((together - torch.cat(alone)).abs().max()) if len(together) else 0.0
    allowed = ISOLATION_TOLERANCE[run.profile.dtype]
    if not worst <= allowed:
        raise ConfigError(
            f"layout: sequences of a packed row read each other here: a loss is {worst:.2g} nats from the one its "
            f"sequence has alone, at most {allowed:g} is rounding; set layout: padded, or another attention backend"
        )
    return worst


def longest_rows(run: Run, count: int) -> list[Row]:
    """Return the `count` rows of epoch 0 that hold the most tokens; the same on every rank."""
    plan = run.plan(0)
    if plan.packed is not None:
        lengths = np.asarray([sum(piece.end - piece.begin for piece in row) for row in plan.packed])
    else:
        whole = np.concatenate([source.lengths[source.train] for source in run.shards.sources])[plan.order]
        lengths = np.minimum(whole, run.profile.max_length)
    return [plan.row(int(index)) for index in np.argsort(-lengths, kind="stable")[:count]]


def try_worst_step(run: Run, save: Callable[[], Path]) -> str:
    """Save a checkpoint of step 0, make a step of the longest rows, and take it back; return what was found.

    The step is made at full size (every micro-batch of it the worst one, on every rank), so what does not fit fails
    now. Loading the checkpoint then undoes it: weights, moments, masters, loss scale, schedule and counters are as
    before, which also proves that what is saved here can be resumed from.

    `save` saves step 0 whole and returns its folder.

    Raises:
        ConfigError: The step does not fit into memory.
        TrainingError: Its loss is not finite: the weights are broken before training began.
    """
    saved = save()
    worst = longest_rows(run, run.profile.per_device_train_batch_size)
    batches = list(run.batches(worst)) * run.accumulation_steps
    width = batches[0].input_ids.shape[1]
    try:
        total = 0.0
        with torch.random.fork_rng():  # dropout of LoRA draws
            for _, loss, _ in forward_backward(run, batches):
                run.engine.step()
                total += loss / len(batches)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the longest rows do not fit: a micro-batch of {len(worst)} rows, {width:,} tokens wide, needs more "
            f"memory than the card has ({error}). Lower per_device_train_batch_size or max_length, set "
            "gradient_checkpointing, or a higher ZeRO stage in the DeepSpeed JSON"
        ) from None
    if not math.isfinite(total):
        raise TrainingError(f"the loss of the longest rows is {total} before step 1; look at the base model's weights")
    run.engine.load_checkpoint(str(saved), tag=checkpoints.STATE)
    torch.distributed.barrier()
    if run.rank == 0:
        checkpoints.remove(saved)
    torch.distributed.barrier()
    return f"the longest rows fit: {batches[0].input_ids.shape[0]} x {width:,} tokens a micro-batch, loss {total:.4f}"
