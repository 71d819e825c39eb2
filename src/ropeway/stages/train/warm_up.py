"""Checks before step 1: packed sequences are isolated, the longest rows fit, a checkpoint can be saved and loaded."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ropeway.data.batches import Row, collate
from ropeway.runtime.errors import ConfigError, TrainingError
from ropeway.stages.train import checkpoints
from ropeway.stages.train.loop import forward_backward, to_tensors
from ropeway.stages.train.training_run import Run

# Nats. fp32: tests/unit/data/test_packing.py compares packed rows within 1e-4. The 16-bit limits are estimated
# rounding, not measured.
ISOLATION_TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}


@torch.no_grad()
def check_isolation(run: Run) -> float | None:
    """Return the largest difference in nats between losses in a packed row and without packing; None if not packed.

    Measured on the model and attention backend in use: a backend that ignores sequence borders gives no error.

    Raises:
        ConfigError: Sequences of a packed row attend to each other.
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
            f"layout: sequences of a packed row attend to each other: a loss differs by {worst:.2g} nats from the loss "
            f"without packing, expected at most {allowed:g}; set layout: padded, or use another attention backend"
        )
    return worst


def longest_rows(run: Run, count: int) -> list[Row]:
    """Return the `count` rows of epoch 0 with the most tokens; the same on every rank."""
    plan = run.plan(0)
    if plan.packed is not None:
        lengths = np.asarray([sum(piece.end - piece.begin for piece in row) for row in plan.packed])
    else:
        whole = np.concatenate([source.lengths[source.train] for source in run.shards.sources])[plan.order]
        lengths = np.minimum(whole, run.profile.max_length)
    return [plan.row(int(index)) for index in np.argsort(-lengths, kind="stable")[:count]]


def run_worst_step(run: Run, save: Callable[[], Path]) -> str:
    """Save step 0, run one optimizer step of the longest rows and undo it; return a summary.

    Every micro-batch on every rank is the longest one, so a run that would go out of memory later does so now. Loading
    the checkpoint undoes the step (weights, optimizer state, loss scale, schedule, counters), which also proves that
    checkpoints can be loaded.

    `save` saves a complete checkpoint of step 0 and returns its folder.

    Raises:
        ConfigError: The step does not fit into memory.
        TrainingError: Its loss is not finite, so the base model's weights are broken.
    """
    saved = save()
    worst = longest_rows(run, run.profile.per_device_train_batch_size)
    batches = list(run.batches(worst)) * run.accumulation_steps
    width = batches[0].input_ids.shape[1]
    try:
        total = 0.0
        with torch.random.fork_rng():  # for LoRA dropout
            for _, loss, _ in forward_backward(run, batches):
                run.engine.step()
                total += loss / len(batches)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the longest rows do not fit: a micro-batch of {len(worst)} rows x {width:,} tokens needs more memory "
            f"than the GPU has ({error}). Lower per_device_train_batch_size or max_length, set gradient_checkpointing: "
            "true, or set a higher ZeRO stage in the DeepSpeed JSON"
        ) from None
    if not math.isfinite(total):
        raise TrainingError(f"the loss of the longest rows is {total} before step 1; check the base model's weights")
    run.engine.load_checkpoint(str(saved), tag=checkpoints.STATE)
    torch.distributed.barrier()
    if run.rank == 0:
        checkpoints.remove(saved)
    torch.distributed.barrier()
    return f"the longest rows fit: {batches[0].input_ids.shape[0]} x {width:,} tokens/micro-batch, loss {total:.4f}"
