"""Checks before step 1: packed sequences are isolated, the longest rows fit, a checkpoint can be saved and loaded."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ropeway.data.batches import Batch, Row, collate, slice_tokens
from ropeway.runtime.errors import ConfigError, TrainingError
from ropeway.stages.train import checkpoints
from ropeway.stages.train.loop import forward_backward, to_tensors
from ropeway.stages.train.training_run import Run

_APPLIED = 2
NOT_APPLIED = 12  # optimizer steps that the warm-up tries, when fp16 overflows
_MICRO_BATCHES = 2  # of a step: the second one has accumulated gradients beside its own; more need no more memory
_MOST_ROWS = 1000  # of which the one with the most tokens after its first sequence is taken
_MIN_PIECE = 16  # tokens; a shorter sequence says little
_CONTROLS = 4  # later sequences whose rounding is measured, from the shortest to the longest


@dataclass(frozen=True, slots=True)
class Isolation:
    """Differences of losses in nats, on the sequences after the first of a packed row.

    Attributes:
        packed: Packed against alone: 99th percentile.
        joined: The same row as one sequence against alone, which is what ignored boundaries would give: median.
        rounding: The first sequence of a row of the same sequences, which no border concerns, against alone: 99th
            percentile over the first one and some others that are moved there. Kernels round differently for other
            numbers of tokens, so no shorter row would show it.
    """

    packed: float
    joined: float
    rounding: float

    @property
    def allowed(self) -> float:
        """The limit of `packed`: a tenth of what ignored boundaries would give, or three times the rounding."""
        return max(self.joined / 10, 3 * self.rounding)


@torch.no_grad()
def check_isolation(run: Run) -> Isolation | None:
    """Compare the losses of a packed row with those of its sequences alone; None if not packed.

    Measured on the model and attention backend in use: a backend that ignores sequence borders gives no error. The
    limit comes from a control on the same model, so it holds in every dtype and depth.

    Raises:
        ConfigError: Sequences of a packed row attend to each other.
    """
    rows = [row for row in (run.plan(0).packed or ())[:_MOST_ROWS] if len(row) > 1]
    row = max(rows, key=_count_later_tokens, default=None)
    if row is None:
        return None
    run.engine.eval()
    found = measure_isolation(run, row)
    run.engine.train()
    if not found.packed <= found.allowed:
        raise ConfigError(
            f"layout: sequences of a packed row attend to each other: losses differ by {found.packed:.2g} nats from "
            f"those without packing, expected at most {found.allowed:.2g} (ignored boundaries: {found.joined:.2g}, "
            f"rounding: {found.rounding:.2g}); set layout: padded, or use another attention backend"
        )
    return found


def measure_isolation(run: Run, row: Row) -> Isolation:
    """Return the differences of a packed row of two or more sequences."""
    first, *later = row
    alone = [_next_token_losses(run, (piece,)) for piece in later]
    together, joined = (_next_token_losses(run, row, joined=joined) for joined in (False, True))
    skipped, expected = first.end - first.begin - 1, torch.cat(alone)
    rounding = [(together[:skipped] - _next_token_losses(run, (first,))).abs()]
    for at in _spread([len(losses) for losses in alone], _CONTROLS):
        moved = _next_token_losses(run, (later[at], first, *later[:at], *later[at + 1 :]))
        rounding.append((moved[: len(alone[at])] - alone[at]).abs())
    return Isolation(
        packed=_quantile((together[skipped:] - expected).abs(), 0.99),
        joined=_quantile((joined[skipped:] - expected).abs(), 0.5),
        rounding=_quantile(torch.cat(rounding), 0.99),
    )


def _next_token_losses(run: Run, row: Row, *, joined: bool = False) -> Tensor:
    """Return the losses of all next tokens within the pieces of a row, supervised or not; `joined`: as one sequence."""
    batch = collate([row], run.shards, run.profile, pad_to_multiple_of=run.pad_multiple)
    inside = np.zeros_like(batch.loss_mask)
    at = 0
    for piece in row:
        length = piece.end - piece.begin
        inside[0, at : at + length - 1] = True
        at += length
    positions = np.arange(batch.position_ids.size)[None] if joined else batch.position_ids
    whole = replace(batch, loss_mask=inside, position_ids=positions)
    mine = slice_tokens(whole, run.sequence.index, run.sequence.size) if run.sequence else whole
    losses: Tensor = run.engine.module(**to_tensors(mine, run.device)).float().cpu()
    return run.sequence.join(losses) if run.sequence else losses


def _count_later_tokens(row: Row) -> int:
    """Return the tokens of the sequences after the first that are long enough to say something."""
    lengths = [piece.end - piece.begin for piece in row[1:]]
    return sum(length for length in lengths if length >= _MIN_PIECE)


def _spread(sizes: Sequence[int], count: int) -> list[int]:
    """Return the indices of at most `count` sizes above 0, from the smallest to the largest in equal steps.

    >>> _spread([5, 0, 9, 1, 7, 3], 3)
    [3, 0, 2]
    """
    ordered = sorted((at for at, size in enumerate(sizes) if size), key=lambda at: sizes[at])
    steps = min(count, len(ordered))
    return [ordered[round(step * (len(ordered) - 1) / max(1, steps - 1))] for step in range(steps)]


def _quantile(values: Tensor, fraction: float) -> float:
    return float(torch.quantile(values, fraction)) if len(values) else 0.0


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
    """Save step 0, run optimizer steps of the longest rows and undo them; return a summary.

    Every micro-batch on every rank is the longest one, so a run that would go out of memory later does so now. Adam's
    moments are created by the first step that is applied, so the memory of a step is only complete in the second one:
    steps run until two are applied, at most `NOT_APPLIED` that fp16 overflow skips. Loading the checkpoint undoes them
    (weights, optimizer state, loss scale, schedule, counters), which also proves that checkpoints can be loaded.

    `save` saves a complete checkpoint of step 0 and returns its folder.

    Raises:
        ConfigError: The step does not fit into memory.
        TrainingError: Its loss is not finite, so the base model's weights are broken.
    """
    saved = save()
    worst = longest_rows(run, run.profile.per_device_train_batch_size)
    batches = list(run.batches(worst)) * min(run.accumulation_steps, _MICRO_BATCHES)
    width = batches[0].input_ids.shape[1] * run.sharing_ranks
    try:
        loss, applied, skipped = _run_steps(run, batches)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the longest rows do not fit: a micro-batch of {len(worst)} rows x {width:,} tokens needs more memory "
            f"than the GPU has ({error}). Lower per_device_train_batch_size or max_length, set gradient_checkpointing: "
            "true, or set a higher ZeRO stage in the DeepSpeed JSON"
        ) from None
    if not math.isfinite(loss):
        raise TrainingError(f"the loss of the longest rows is {loss} before step 1; check the base model's weights")
    run.engine.load_checkpoint(str(saved), tag=checkpoints.STATE)
    torch.distributed.barrier()
    if run.rank == 0:
        checkpoints.remove(saved)
    torch.distributed.barrier()
    size = f"{batches[0].input_ids.shape[0]} x {width:,} tokens/micro-batch, loss {loss:.4f}"
    overflowed = f", {skipped} steps skipped by fp16 overflow" if skipped else ""
    if applied < _APPLIED:
        return f"the longest rows fit without the optimizer's step, which fp16 overflow prevented: {size}{overflowed}"
    return f"the longest rows fit: {size}{overflowed}"


def _run_steps(run: Run, batches: Sequence[Batch]) -> tuple[float, int, int]:
    """Run optimizer steps of these micro-batches until two are applied; return (first loss, applied, skipped)."""
    losses: list[float] = []
    applied = skipped = 0
    shortened = len(batches) < run.accumulation_steps
    with torch.random.fork_rng():  # for LoRA dropout
        while applied < _APPLIED and skipped < NOT_APPLIED:
            total = 0.0
            if shortened:
                run.engine.set_gradient_accumulation_boundary(len(batches) == 1)
            for number, (_, loss, _) in enumerate(forward_backward(run, batches), start=1):
                run.engine.step()
                total += loss / len(batches)
                if shortened:  # before the next micro-batch, which DeepSpeed would else count as one of many
                    run.engine.set_gradient_accumulation_boundary(number + 1 == len(batches))
            losses.append(total)
            if not math.isfinite(total):
                break
            if run.engine.was_step_applied():
                applied += 1
            else:
                skipped += 1
    if shortened:
        run.engine.set_gradient_accumulation_boundary(None)
        run.engine.micro_steps = 0  # a checkpoint does not contain it; the next step begins with its first micro-batch
    return losses[0], applied, skipped
