"""The training loop: per optimizer step read micro-batches, accumulate gradients, step, log; validate and save."""

import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ropeway.data.batches import Batch, collate, validation_rows
from ropeway.data.mixture import rank_order
from ropeway.runtime.errors import TrainingError
from ropeway.stages.train.loss import micro_batch_loss, token_loss
from ropeway.stages.train.model import step_flops
from ropeway.stages.train.stop import Fault, Line, attempted_steps, count_spikes, find_fault
from ropeway.stages.train.training_run import Run, learning_rate


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """Result of one optimizer step.

    Attributes:
        usage: `model_flops`, FLOPs of forward and backward over all ranks; `peak_memory_bytes`, the highest peak of
            any rank so far.
    """

    line: Line  # its line of the log; independent of clock and machine
    stopping: bool  # a rank has received a signal to stop
    usage: Line


class FaultError(TrainingError):
    """A rule of `stop` was violated; every rank raises the same error at the same step."""

    def __init__(self, fault: Fault) -> None:
        """Keep the fault, which decides whether the run rewinds."""
        super().__init__(fault.reason)
        self.fault = fault


def train(
    run: Run,
    log: list[Line],
    *,
    save: Callable[[list[Line]], None],
    poll_save: Callable[[], None] = lambda: None,
    stop: Callable[[], bool],
    show: Callable[[Line], None],
) -> bool:
    """Train from the step after the last line of `log` to the last step; return False when stopped by a signal.

    A save that is due during a loss spike waits until the spike is over, so no checkpoint but the last holds one.
    `poll_save` is called after each step and completes a save in the background.

    Raises:
        FaultError: A stop rule found a fault (`ropeway.stages.train.stop`); `log` ends with the step that has it.
        TrainingError: No step was applied.
    """
    due = False
    for step in range(len(log) + 1, run.total_steps + 1):
        began = time.perf_counter()
        result = (
            leave_out_step(run, step, log, stop=stop)
            if run.is_left_out(step)
            else train_step(run, step, log, stop=stop)
        )
        line, stopping, last = result.line, result.stopping, step == run.total_steps
        log.append(line)
        fp16 = run.profile.dtype == "fp16"
        if attempted_steps(log[-1:]) and (
            fault := find_fault(log, run.profile.stop, fp16=fp16, min_loss_scale=_min_loss_scale(run))
        ):
            raise FaultError(fault)
        poll_save()
        seconds = time.perf_counter() - began
        if last or step % run.profile.eval_steps == 0:
            line |= {f"validation_{name}": loss for name, loss in validate(run).items()}
            stopping |= _is_stop_requested(run, stop)  # validation may have taken minutes
        show({**line, "total_steps": run.total_steps, "seconds": seconds, **result.usage})
        due |= step % run.profile.save_steps == 0
        if last or ((due or stopping) and not count_spikes(log, run.profile.stop)):
            save(log)
            due = False
            stopping |= _is_stop_requested(run, stop)
        if stopping and not last:
            return False
    if not any(line["applied"] for line in log):
        raise TrainingError(
            f"0 of {run.total_steps} steps were applied: all were skipped for gradient overflow, and the weights are "
            "the base model's. Set dtype: bf16, or lower initial_scale_power in the DeepSpeed JSON or learning_rate"
        )
    return True


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return a 64-bit seed for this step and rank, independent of earlier random draws."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def train_step(run: Run, step: int, log: Sequence[Line], *, stop: Callable[[], bool]) -> OptimizerStep:
    """Run one optimizer step over all ranks."""
    # Only LoRA dropout draws random numbers here; seeded by (seed, step, rank), a resumed run draws the same ones.
    torch.manual_seed(step_seed(run.profile.rng_seed, step, run.rank))
    applied = log[-1]["applied_steps"] if log else 0
    expected = learning_rate(run.profile, applied, total_steps=run.total_steps)
    rate = float(run.engine.optimizer.param_groups[0]["lr"])
    if not math.isclose(rate, expected, rel_tol=1e-6, abs_tol=1e-15):
        raise TrainingError(
            f"step {step}: the engine's learning rate is {rate:.6e}, the schedule expects {expected:.6e}"
        )
    rows = run.rank_rows(step)
    batches = list(run.batches(rows))
    count = len(run.source_names)
    # loss, tokens, stop requests, FLOPs; then losses and supervised tokens per source; then each rank's peak memory
    sums = torch.zeros(4 + 2 * count + run.world_size, dtype=torch.float64)
    for batch, loss, losses in forward_backward(run, batches):
        run.engine.step()
        sums[0] += loss / (run.accumulation_steps * run.world_size)
        sums[1] += float((batch.sources >= 0).sum())
        sums[4 : 4 + 2 * count] += _per_source(losses, batch, count)
    sums[2] = float(stop())
    sums[3] = step_flops(run.token_flops, run.engine.module.model.config, rows)
    sums[4 + 2 * count + run.rank] = _peak_memory(run.device)
    sums = _sum_over_ranks(run, sums)
    line = _trained_line(run, _untrained_line(run, step, log), sums, rate)
    usage = {"model_flops": float(sums[3]), "peak_memory_bytes": int(sums[4 + 2 * count :].max())}
    return OptimizerStep(line, bool(sums[2]), usage)


def leave_out_step(run: Run, step: int, log: Sequence[Line], *, stop: Callable[[], bool]) -> OptimizerStep:
    """Return the result of a step left out after a rewind: nothing is trained, the learning rate does not advance."""
    line = _untrained_line(run, step, log) | {"left_out": run.profile.global_batch_size}
    return OptimizerStep(
        line, _is_stop_requested(run, stop), {"model_flops": 0.0, "peak_memory_bytes": _peak_memory(run.device)}
    )


def forward_backward(run: Run, batches: Sequence[Batch]) -> Iterator[tuple[Batch, float, Tensor]]:
    """Yield (batch, loss, `(N,)` losses) of each micro-batch after its backward pass; the caller steps the engine."""
    total = int(_sum_over_ranks(run, torch.tensor([float(sum(batch.loss_mask.sum() for batch in batches))]))[0])
    for batch in batches:
        run.heartbeat()
        losses = run.engine(**to_tensors(batch, run.device))
        loss = micro_batch_loss(losses)
        if run.profile.loss_normalisation == "token":
            loss = token_loss(losses, total=total, micro_batches=run.accumulation_steps * run.world_size)
        run.engine.backward(loss)
        yield batch, float(loss.detach()), losses.detach()


def _untrained_line(run: Run, step: int, log: Sequence[Line]) -> Line:
    """Return the log line of a step that is not trained."""
    epoch, positions = run.rows(step)
    return {
        "step": step,
        "epoch": epoch,
        "loss": None,
        "learning_rate": float(run.engine.optimizer.param_groups[0]["lr"]),
        "grad_norm": None,
        "loss_scale": _loss_scale(run),
        "applied": 0,
        "applied_steps": log[-1]["applied_steps"] if log else 0,
        "skipped_steps": log[-1]["skipped_steps"] if log else 0,
        "tokens": 0,
        "supervised_tokens": 0,
        "rows": run.plan(epoch).span(positions[0], positions[-1] + 1),
        **{f"loss_{name}": None for name in run.source_names},
    }


def _trained_line(run: Run, line: Line, sums: Tensor, rate: float) -> Line:
    """Return the log line with losses, gradient norm and token counts filled in."""
    count = len(run.source_names)
    losses, supervised = sums[4 : 4 + count].tolist(), sums[4 + count : 4 + 2 * count].tolist()
    applied = int(run.engine.was_step_applied())
    norm = (
        run.engine.get_global_grad_norm() if applied else None
    )  # after a skipped step the engine returns an older norm
    by_source = zip(run.source_names, losses, supervised, strict=True)
    return line | {
        "loss": float(sums[0]),
        "learning_rate": rate,
        "grad_norm": None if norm is None else float(norm),
        "applied": applied,
        "applied_steps": line["applied_steps"] + applied,
        "skipped_steps": line["skipped_steps"] + 1 - applied,
        "tokens": int(sums[1]),
        "supervised_tokens": int(sum(supervised)),
        **{f"loss_{name}": total / tokens if tokens else None for name, total, tokens in by_source},
    }


def _loss_scale(run: Run) -> float:
    return float(run.engine.optimizer.loss_scale) if run.profile.dtype == "fp16" else 1.0


def _min_loss_scale(run: Run) -> float | None:
    """Return the lowest loss scale that DeepSpeed may set; None where loss scaling is not dynamic."""
    floor = getattr(getattr(run.engine.optimizer, "loss_scaler", None), "min_scale", None)
    return float(floor) if floor is not None and run.profile.dtype == "fp16" else None


def _is_stop_requested(run: Run, stop: Callable[[], bool]) -> bool:
    """Return whether any rank has received a signal to stop; a collective, so every rank must call it."""
    return bool(_sum_over_ranks(run, torch.tensor([float(stop())]))[0])


def _peak_memory(device: torch.device) -> int:
    """Return the peak memory of this rank in bytes: of its GPU, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB: getrusage(2)


@torch.no_grad()
def validate(run: Run) -> dict[str, float | None]:
    """Return each source's mean validation loss per token; uses no random numbers, so training is not affected.

    Every rank runs the same number of forward passes; a rank without rows left repeats a row that is not counted.
    """
    size = run.profile.per_device_eval_batch_size
    sums = torch.zeros(2 * len(run.source_names), dtype=torch.float64)
    run.engine.eval()
    for _, rows in validation_rows(run.shards, run.profile):
        for begin in range(0, len(rows), size * run.world_size):
            together = rows[begin : begin + size * run.world_size]
            mine = rank_order(together, rank=run.rank, world_size=run.world_size)
            batch = collate(mine or rows[:1], run.shards, run.profile)
            run.heartbeat()
            losses = run.engine.module(**to_tensors(batch, run.device))
            if mine:
                sums += _per_source(losses, batch, len(run.source_names))
    run.engine.train()
    sums = _sum_over_ranks(run, sums)
    count = len(run.source_names)
    return {
        name: float(sums[number] / sums[count + number]) if sums[count + number] else None
        for number, name in enumerate(run.source_names)
    }


def _per_source(losses: Tensor, batch: Batch, count: int) -> Tensor:
    """Return `(2 * count,)`: the sum of losses per source, then the supervised positions per source."""
    of = torch.from_numpy(batch.sources[batch.loss_mask]).long()
    sums = torch.zeros(2 * count, dtype=torch.float64)
    sums[:count].index_add_(0, of, losses.double().cpu())
    sums[count:] += torch.bincount(of, minlength=count).double()
    return sums


def to_tensors(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return the inputs of `SupervisedLoss` on the device of the weights."""
    parts = ("input_ids", "position_ids", "targets", "loss_mask")
    return {part: torch.from_numpy(getattr(batch, part)).to(device) for part in parts}


def _sum_over_ranks(run: Run, values: Tensor) -> Tensor:
    """Return the sum over ranks."""
    if run.world_size == 1:
        return values
    here = values.to(run.device)
    torch.distributed.all_reduce(here)
    return here.cpu()
