"""The training loop over the DeepSpeed engine: plan, micro-batches, backward, step, log, maybe evaluate, maybe save."""

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
from ropeway.stages.train.running import Run, learning_rate
from ropeway.stages.train.stop import Fault, Line, count_spikes, find_fault, made


@dataclass(frozen=True, slots=True)
class Taken:
    """One optimizer step that was attempted.

    Attributes:
        machine: `model_flops`, what the model needed for it, forward and backward, over all ranks;
            `peak_memory_bytes`, the most that a rank has held so far.
    """

    line: Line  # its line of the log; nothing in it depends on the clock or the machine
    stopping: bool  # a rank was asked to stop
    machine: Line


class FaultError(TrainingError):
    """A rule of `stop` was broken; every rank raises the same at the same step."""

    def __init__(self, fault: Fault) -> None:
        """Keep the fault for who may go back."""
        super().__init__(fault.why)
        self.fault = fault


def train(
    run: Run,
    log: list[Line],
    *,
    save: Callable[[list[Line]], None],
    stop: Callable[[], bool],
    show: Callable[[Line], None],
) -> bool:
    """Train from the step after the last line of `log` to the end; return False when stopped before it.

    A save that falls due among spikes waits for a calm step, so every checkpoint but the last is a good one.

    Raises:
        FaultError: The numbers went wrong (`ropeway.stages.train.stop`); `log` ends with the step that showed it.
        TrainingError: No step was applied.
    """
    due = False
    for step in range(len(log) + 1, run.total_steps + 1):
        began = time.perf_counter()
        taken = pass_over(run, step, log, stop=stop) if run.is_left_out(step) else take_step(run, step, log, stop=stop)
        line, stopping, last = taken.line, taken.stopping, step == run.total_steps
        log.append(line)
        fp16 = run.profile.dtype == "fp16"
        if made(log[-1:]) and (fault := find_fault(log, run.profile.stop, fp16=fp16, floor=_scale_floor(run))):
            raise FaultError(fault)
        seconds = time.perf_counter() - began
        if last or step % run.profile.eval_steps == 0:
            line |= {f"validation_{name}": loss for name, loss in validate(run).items()}
            stopping |= _is_asked(run, stop)  # it may have taken minutes
        show({**line, "total_steps": run.total_steps, "seconds": seconds, **taken.machine})
        due |= step % run.profile.save_steps == 0
        if last or ((due or stopping) and not count_spikes(log, run.profile.stop)):
            save(log)
            due = False
            stopping |= _is_asked(run, stop)
        if stopping and not last:
            return False
    if not any(line["applied"] for line in log):
        raise TrainingError(f"none of {run.total_steps} steps was applied (all overflowed); the weights are the base's")
    return True


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return 64 bits that differ between steps and ranks, whatever was drawn before."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def take_step(run: Run, step: int, log: Sequence[Line], *, stop: Callable[[], bool]) -> Taken:
    """Make one optimizer step over all ranks."""
    # Dropout of LoRA is all that draws here: from (seed, step, rank), so that a resumed run draws the same.
    torch.manual_seed(step_seed(run.profile.rng_seed, step, run.rank))
    applied = log[-1]["applied_steps"] if log else 0
    expected = learning_rate(run.profile, applied, total_steps=run.total_steps)
    rate = float(run.engine.optimizer.param_groups[0]["lr"])
    if not math.isclose(rate, expected, rel_tol=1e-6, abs_tol=1e-15):
        raise TrainingError(f"step {step}: the engine's learning rate is {rate:.6e}, the schedule says {expected:.6e}")
    rows = run.dealt(step)
    batches = list(run.batches(rows))
    count = len(run.names)
    # loss, tokens, wish to stop, FLOPs; then losses and supervised tokens per source; then each rank's peak memory
    sums = torch.zeros(4 + 2 * count + run.world_size, dtype=torch.float64)
    for batch, loss, losses in forward_backward(run, batches):
        run.engine.step()
        sums[0] += loss / (run.accumulation_steps * run.world_size)
        sums[1] += float((batch.sources >= 0).sum())
        sums[4 : 4 + 2 * count] += _per_source(losses, batch, count)
    sums[2] = float(stop())
    sums[3] = step_flops(run.token_flops, run.engine.module.model.config, rows)
    sums[4 + 2 * count + run.rank] = _peak_memory(run.device)
    sums = _sum(run, sums)
    line = _learned(run, _line(run, step, log), sums, rate)
    machine = {"model_flops": float(sums[3]), "peak_memory_bytes": int(sums[4 + 2 * count :].max())}
    return Taken(line, bool(sums[2]), machine)


def pass_over(run: Run, step: int, log: Sequence[Line], *, stop: Callable[[], bool]) -> Taken:
    """Leave out the rows of a step: nothing is read or learned, and the schedule, which counts applied steps, waits."""
    line = _line(run, step, log) | {"left_out": run.profile.global_batch_size}
    return Taken(line, _is_asked(run, stop), {"model_flops": 0.0, "peak_memory_bytes": _peak_memory(run.device)})


def forward_backward(run: Run, batches: Sequence[Batch]) -> Iterator[tuple[Batch, float, Tensor]]:
    """Yield (batch, loss, `(N,)` losses) of each micro-batch after its backward; the caller steps the engine."""
    total = int(_sum(run, torch.tensor([float(sum(batch.loss_mask.sum() for batch in batches))]))[0])
    for batch in batches:
        run.beat()
        losses = run.engine(**to_tensors(batch, run.device))
        loss = micro_batch_loss(losses)
        if run.profile.loss_normalisation == "token":
            loss = token_loss(losses, total=total, micro_batches=run.accumulation_steps * run.world_size)
        run.engine.backward(loss)
        yield batch, float(loss.detach()), losses.detach()


def _line(run: Run, step: int, log: Sequence[Line]) -> Line:
    """Return the line of a step that nothing is learned from."""
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
        **{f"loss_{name}": None for name in run.names},
    }


def _learned(run: Run, line: Line, sums: Tensor, rate: float) -> Line:
    """Return the line with what was learned at this rate."""
    count = len(run.names)
    losses, supervised = sums[4 : 4 + count].tolist(), sums[4 + count : 4 + 2 * count].tolist()
    applied = int(run.engine.was_step_applied())
    norm = run.engine.get_global_grad_norm() if applied else None  # after a skip it still is the norm of an older step
    by_source = zip(run.names, losses, supervised, strict=True)
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


def _scale_floor(run: Run) -> float | None:
    """Return the lowest loss scale DeepSpeed may go to; None where the scale is not dynamic."""
    floor = getattr(getattr(run.engine.optimizer, "loss_scaler", None), "min_scale", None)
    return float(floor) if floor is not None and run.profile.dtype == "fp16" else None


def _is_asked(run: Run, stop: Callable[[], bool]) -> bool:
    """Return whether any rank was asked to stop; every rank must call it."""
    return bool(_sum(run, torch.tensor([float(stop())]))[0])


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes this rank has held: of its card, else of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB: getrusage(2)


@torch.no_grad()
def validate(run: Run) -> dict[str, float | None]:
    """Return the token-weighted loss of every source's validation rows; draws nothing, so training is not touched.

    Every rank makes the same number of forward passes; one that has no rows left repeats a row and counts nothing.
    """
    size = run.profile.per_device_eval_batch_size
    sums = torch.zeros(2 * len(run.names), dtype=torch.float64)
    run.engine.eval()
    for _, rows in validation_rows(run.shards, run.profile):
        for begin in range(0, len(rows), size * run.world_size):
            together = rows[begin : begin + size * run.world_size]
            mine = rank_order(together, rank=run.rank, world_size=run.world_size)
            batch = collate(mine or rows[:1], run.shards, run.profile)
            run.beat()
            losses = run.engine.module(**to_tensors(batch, run.device))
            if mine:
                sums += _per_source(losses, batch, len(run.names))
    run.engine.train()
    sums = _sum(run, sums)
    count = len(run.names)
    return {
        name: float(sums[number] / sums[count + number]) if sums[count + number] else None
        for number, name in enumerate(run.names)
    }


def _per_source(losses: Tensor, batch: Batch, count: int) -> Tensor:
    """Return `(2 * count,)`: sums of losses per source, then supervised positions per source."""
    of = torch.from_numpy(batch.sources[batch.loss_mask]).long()
    sums = torch.zeros(2 * count, dtype=torch.float64)
    sums[:count].index_add_(0, of, losses.double().cpu())
    sums[count:] += torch.bincount(of, minlength=count).double()
    return sums


def to_tensors(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return what `SupervisedLoss` takes, where the weights are."""
    parts = ("input_ids", "position_ids", "targets", "loss_mask")
    return {part: torch.from_numpy(getattr(batch, part)).to(device) for part in parts}


def _sum(run: Run, values: Tensor) -> Tensor:
    """Return the sum over ranks."""
    if run.world_size == 1:
        return values
    here = values.to(run.device)
    torch.distributed.all_reduce(here)
    return here.cpu()
