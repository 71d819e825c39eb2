"""The training loop: per optimizer step read micro-batches, accumulate gradients, step, log; validate and save."""

import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ropeway.data.batches import Batch, validation_rows
from ropeway.runtime.errors import TrainingError
from ropeway.stages.train.loss import micro_batch_loss, token_loss
from ropeway.stages.train.model import step_flops
from ropeway.stages.train.stop import Fault, Line, attempted_steps, count_spikes, find_fault
from ropeway.stages.train.training_run import Run, learning_rate

# A look at the stop request is a collective, after which all ranks have waited for the slowest. In short steps the look
# after each step is enough.
LONG_STEP_SECONDS = 10.0
VALIDATION_BATCHES_PER_LOOK = 8
_HEAD = 6  # numbers before the ones per source in the sums of a step


@dataclass(frozen=True, slots=True)
class OptimizerStep:
    """Result of one optimizer step.

    Attributes:
        save_due: Whether a checkpoint is due by rank 0's clock; the same on every rank.
        seconds: Duration on rank 0; the same number on every rank.
        usage: `model_flops`, FLOPs of forward and backward over all ranks; `peak_memory_bytes`, the highest peak of
            any rank so far.
    """

    line: Line  # its line of the log; independent of clock and machine
    stopping: bool  # a rank was asked to stop
    usage: Line
    save_due: bool = False
    seconds: float = 0.0


class SaveTimer:
    """Whether a checkpoint is due by the clock of rank 0."""

    def __init__(self, run: Run, clock: Callable[[], float] = time.monotonic) -> None:
        """Start to count `save_minutes`."""
        minutes = run.profile.save_minutes
        self._seconds = 60 * minutes if minutes is not None and run.rank == 0 else math.inf
        self._clock, self._saved_at = clock, clock()

    def is_due(self) -> bool:
        """Return whether `save_minutes` have passed since the last save; False on every rank but the first."""
        return self._clock() - self._saved_at >= self._seconds

    def restart(self) -> None:
        """Count from now, after a save."""
        self._saved_at = self._clock()


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
    """Train from the step after the last line of `log` to the last step; return False when asked to stop.

    A stop inside a long step or a validation drops it: the checkpoint is of the step before or without the validation,
    and the resumed run repeats it with the same result. A save that is due during a loss spike waits until the spike is
    over, so no checkpoint but the last holds one. `poll_save` is called after each step and completes a save in the
    background.

    Raises:
        FaultError: A stop rule found a fault (`ropeway.stages.train.stop`); `log` ends with the step that has it.
        TrainingError: No step was applied.
    """
    if log and _awaits_validation(run, log[-1]) and not _finish_validation(run, log, save=save, stop=stop):
        return False
    saved, due, is_long, timer = len(log), False, True, SaveTimer(run)
    for step in range(len(log) + 1, run.total_steps + 1):
        began = time.perf_counter()
        result = (
            leave_out_step(run, step, log, stop=stop)
            if run.is_left_out(step)
            else train_step(run, step, log, stop=stop, timer=timer, looks_often=is_long)
        )
        if result is None:
            if len(log) > saved and not count_spikes(log, run.profile.stop):
                save(log)
            return False
        line, stopping, is_long = result.line, result.stopping, result.seconds > LONG_STEP_SECONDS
        log.append(line)
        fp16 = run.profile.dtype == "fp16"
        if attempted_steps(log[-1:]) and (
            fault := find_fault(log, run.profile.stop, fp16=fp16, min_loss_scale=_min_loss_scale(run))
        ):
            raise FaultError(fault)
        poll_save()
        seconds = time.perf_counter() - began
        if _awaits_validation(run, line):
            stopping |= not _add_validation(run, line, stop=stop)
        show({**line, "total_steps": run.total_steps, "seconds": seconds, **result.usage})
        ended = step == run.total_steps and not _awaits_validation(run, line)
        due |= step % run.profile.save_steps == 0 or result.save_due
        if ended or ((due or stopping) and not count_spikes(log, run.profile.stop)):
            save(log)
            saved, due = step, False
            timer.restart()
            stopping |= _is_stop_requested(run, stop)
        if stopping and not ended:
            return False
    if not any(line["applied"] for line in log):
        raise TrainingError(
            f"0 of {run.total_steps} steps were applied: all were skipped for gradient overflow, and the weights are "
            "the base model's. Set dtype: bf16, or lower initial_scale_power in the DeepSpeed JSON or learning_rate"
        )
    return True


def _awaits_validation(run: Run, line: Line) -> bool:
    """Return whether a validation is due after a step that its line does not have yet."""
    is_due = line["step"] == run.total_steps or line["step"] % run.profile.eval_steps == 0
    return is_due and not any(key.startswith("validation_") for key in line)


def _add_validation(run: Run, line: Line, *, stop: Callable[[], bool]) -> bool:
    """Add the validation losses to a step's line; return False when asked to stop, before or after they are added."""
    losses = validate(run, stop=stop)
    if losses is None:
        return False
    line |= {f"validation_{name}": loss for name, loss in losses.items()}
    return not _is_stop_requested(run, stop)


def _finish_validation(
    run: Run, log: list[Line], *, save: Callable[[list[Line]], None], stop: Callable[[], bool]
) -> bool:
    """Validate after the last step of the log, where the attempt before was stopped; return False when asked to stop.

    The checkpoint of a run's last step is saved again, since its log is the one that counts.
    """
    go_on = _add_validation(run, log[-1], stop=stop)
    if log[-1]["step"] == run.total_steps and not _awaits_validation(run, log[-1]):
        save(log)
        return True
    return go_on


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return a 64-bit seed for this step and rank, independent of earlier random draws."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def train_step(
    run: Run,
    step: int,
    log: Sequence[Line],
    *,
    stop: Callable[[], bool],
    timer: SaveTimer | None = None,
    looks_often: bool = False,
) -> OptimizerStep | None:
    """Run one optimizer step over all ranks; return None when asked to stop before its last micro-batch.

    Gradients are no part of a checkpoint, and weights, optimizer and schedule change only with the last micro-batch:
    the state is then that of the step before. The engine must not be used for another step.

    Args:
        run: The run.
        step: Number of the step, from 1 on.
        log: The lines of the steps before.
        stop: Whether this rank was asked to stop.
        timer: Whether a checkpoint is due by the clock.
        looks_often: Whether the ranks look at the stop request after every micro-batch; the same on every rank.
    """
    began = time.perf_counter()
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
    # loss, tokens, stop requests, FLOPs, whether a save is due, seconds; then losses and supervised tokens per source;
    # then each rank's peak memory
    sums = torch.zeros(_HEAD + 2 * count + run.world_size, dtype=torch.float64)
    for number, (batch, loss, losses) in enumerate(forward_backward(run, batches), start=1):
        if looks_often and number < len(batches) and _is_stop_requested(run, stop):
            return None
        run.engine.step()
        sums[0] += loss / (run.accumulation_steps * run.world_size)
        sums[1] += float((batch.sources >= 0).sum())
        sums[_HEAD : _HEAD + 2 * count] += _per_source(losses, batch, count)
    sums[2] = float(stop())
    sums[3] = step_flops(run.token_flops, run.engine.module.model.config, rows) / run.sharing_ranks
    if run.rank == 0:
        sums[4] = float(timer is not None and timer.is_due())
        sums[5] = time.perf_counter() - began
    sums[_HEAD + 2 * count + run.rank] = _peak_memory(run.device)
    sums = _sum_over_ranks(run, sums)
    line = _trained_line(run, _untrained_line(run, step, log), sums, rate)
    usage = {"model_flops": float(sums[3]), "peak_memory_bytes": int(sums[_HEAD + 2 * count :].max())}
    return OptimizerStep(line, bool(sums[2]), usage, save_due=bool(sums[4]), seconds=float(sums[5]))


def leave_out_step(run: Run, step: int, log: Sequence[Line], *, stop: Callable[[], bool]) -> OptimizerStep:
    """Return the result of a step left out after a rewind: nothing is trained, the learning rate does not advance."""
    line = _untrained_line(run, step, log) | {"left_out": run.profile.global_batch_size}
    return OptimizerStep(
        line, _is_stop_requested(run, stop), {"model_flops": 0.0, "peak_memory_bytes": _peak_memory(run.device)}
    )


def forward_backward(run: Run, batches: Sequence[Batch]) -> Iterator[tuple[Batch, float, Tensor]]:
    """Yield (batch, loss, `(N,)` losses) of each micro-batch after its backward pass; the caller steps the engine."""
    counts = torch.tensor([int(batch.loss_mask.sum()) for batch in batches])
    total = int(_sum_over_ranks(run, counts.sum()[None])[0])
    if run.sequence:
        counts = run.sequence.sum(counts.to(run.device)).cpu()
    for batch, count in zip(batches, counts.tolist(), strict=True):
        run.heartbeat()
        losses = run.engine(**to_tensors(batch, run.device))
        loss = micro_batch_loss(losses, total=count, sharing_ranks=run.sharing_ranks)
        if run.profile.loss_normalisation == "token":
            loss = token_loss(losses, total=total, micro_batches=len(batches) * run.world_size)
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
    losses, supervised = sums[_HEAD:].tolist()[:count], sums[_HEAD + count :].tolist()[:count]
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
    """Return whether any rank was asked to stop; a collective, so every rank must call it."""
    return bool(_sum_over_ranks(run, torch.tensor([float(stop())]))[0])


def _peak_memory(device: torch.device) -> int:
    """Return the peak memory of this rank in bytes: of its GPU, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB: getrusage(2)


@torch.no_grad()
def validate(run: Run, *, stop: Callable[[], bool]) -> dict[str, float | None] | None:
    """Return each source's mean validation loss per token; None when asked to stop before the end.

    It uses no random numbers, so training is not affected.

    Every rank runs the same number of forward passes; a rank without rows left repeats a row that is not counted.
    """
    sums = torch.zeros(2 * len(run.source_names), dtype=torch.float64)
    run.engine.eval()
    for number, (batch, is_counted) in enumerate(_validation_batches(run), start=1):
        run.heartbeat()
        losses = run.engine.module(**to_tensors(batch, run.device))
        if is_counted:
            sums += _per_source(losses, batch, len(run.source_names))
        if number % VALIDATION_BATCHES_PER_LOOK == 0 and _is_stop_requested(run, stop):
            run.engine.train()
            return None
    run.engine.train()
    sums = _sum_over_ranks(run, sums)
    count = len(run.source_names)
    return {
        name: float(sums[number] / sums[count + number]) if sums[count + number] else None
        for number, name in enumerate(run.source_names)
    }


def _validation_batches(run: Run) -> Iterator[tuple[Batch, bool]]:
    """Yield this rank's validation batches, as many as on every rank, and whether each is counted."""
    size = run.profile.per_device_eval_batch_size
    for _, rows in validation_rows(run.shards, run.profile):
        size_of_all = size * run.world_size // run.sharing_ranks
        for begin in range(0, len(rows), size_of_all):
            together = rows[begin : begin + size_of_all]
            mine = run.own_part(together)
            yield run.collate(mine or rows[:1]), bool(mine)


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
