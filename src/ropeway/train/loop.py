"""The training loop over the DeepSpeed engine: plan, micro-batches, backward, step, log, maybe evaluate, maybe save."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ropeway.errors import ConfigError, TrainingError
from ropeway.params import Profile
from ropeway.rows import Batch, EpochPlan, Row, collate, join, locate, plan_epoch, validation_rows
from ropeway.shards import Shards
from ropeway.train.loss import micro_batch_loss, token_loss
from ropeway.train.schedule import learning_rate

Line = dict[str, Any]
# fp32: tests/unit/test_packing.py holds packed rows to 1e-4. The 16-bit limits are rounding by estimate, not measured.
ISOLATION_TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}


@dataclass
class Run:
    """What one rank trains with.

    Attributes:
        engine: The DeepSpeed engine around `SupervisedLoss`.
        accumulation_steps: Micro-batches per rank per optimizer step.
    """

    profile: Profile
    shards: Shards
    engine: Any
    rank: int
    world_size: int
    accumulation_steps: int
    plans: dict[int, EpochPlan] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.engine.device
        return device

    @property
    def names(self) -> list[str]:
        """The sources, in the order of the shards."""
        return [source.name for source in self.shards.sources]

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of an epoch; one is kept."""
        if epoch not in self.plans:
            self.plans.clear()
            self.plans[epoch] = plan_epoch(self.shards, self.profile, epoch=epoch)
        return self.plans[epoch]

    @cached_property
    def epoch_steps(self) -> list[int]:
        """Optimizer steps of each epoch; packed epochs may differ by a row or two."""
        return [self.plan(epoch).steps for epoch in range(self.profile.num_train_epochs)]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(self.epoch_steps)

    def rows(self, step: int) -> tuple[int, list[int]]:
        """Return (epoch, positions in it) of all rows of a step (1-based), over all ranks."""
        epoch, inner = locate(self.epoch_steps, step - 1)
        size = self.profile.global_batch_size
        return epoch, list(range(inner * size, (inner + 1) * size))

    def batches(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches: it reads every `world_size`-th row, as the original's sampler deals."""
        epoch, positions = self.rows(step)
        plan, size = self.plan(epoch), self.profile.per_device_train_batch_size
        mine = [plan.row(position) for position in positions[self.rank :: self.world_size]]
        cuts = [mine[begin : begin + size] for begin in range(0, self.accumulation_steps * size, size)]
        packed = self.profile.layout == "packed"
        return [collate([join(cut)] if packed else cut, self.shards, self.profile) for cut in cuts]


def train(
    run: Run,
    log: list[Line],
    *,
    save: Callable[[list[Line]], None],
    stop: Callable[[], bool],
    show: Callable[[Line], None],
) -> bool:
    """Train from the step after the last line of `log` to the end; return False when stopped before it.

    Raises:
        TrainingError: Loss or gradient norm is not finite, or no step was applied.
    """
    saved = len(log)
    for step in range(len(log) + 1, run.total_steps + 1):
        began = time.perf_counter()
        line, stopping = take_step(run, step, applied=sum(entry["applied"] for entry in log), stop=stop)
        last = step == run.total_steps
        if last or step % run.profile.eval_steps == 0:
            line |= {f"validation_{name}": loss for name, loss in validate(run).items()}
        log.append(line)
        show({**line, "total_steps": run.total_steps, "seconds": time.perf_counter() - began})
        if last or stopping or step % run.profile.save_steps == 0:
            save(log)
            saved = step
        if stopping and not last:
            return False
    if saved < run.total_steps:
        save(log)
    if not any(line["applied"] for line in log):
        raise TrainingError(f"none of {run.total_steps} steps was applied (all overflowed); the weights are the base's")
    return True


def take_step(run: Run, step: int, *, applied: int, stop: Callable[[], bool]) -> tuple[Line, bool]:
    """Make one optimizer step over all ranks; return its log line and whether a rank was asked to stop."""
    expected = learning_rate(run.profile, applied, total_steps=run.total_steps)
    rate = float(run.engine.optimizer.param_groups[0]["lr"])
    if not math.isclose(rate, expected, rel_tol=1e-6, abs_tol=1e-15):
        raise TrainingError(f"step {step}: the engine's learning rate is {rate:.6e}, the schedule says {expected:.6e}")
    batches = run.batches(step)
    total = int(_sum(run, torch.tensor([float(sum(batch.loss_mask.sum() for batch in batches))]))[0])
    sums = torch.zeros(3 + 2 * len(run.names), dtype=torch.float64)
    for batch in batches:
        losses = run.engine(**_tensors(batch, run.device))
        loss = micro_batch_loss(losses)
        if run.profile.loss_normalisation == "token":
            loss = token_loss(losses, total=total, micro_batches=run.accumulation_steps * run.world_size)
        run.engine.backward(loss)
        run.engine.step()
        sums[0] += float(loss.detach()) / (run.accumulation_steps * run.world_size)
        sums[1] += float((batch.sources >= 0).sum())
        sums[3:] += _per_source(losses.detach(), batch, len(run.names))
    sums[2] = float(stop())
    sums = _sum(run, sums)
    line = _line(run, step, sums, rate)
    if line["applied"] and not (math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])):
        raise TrainingError(
            f"step {step}: loss is {line['loss']}, gradient norm {line['grad_norm']}; both must be finite. "
            "Lower learning_rate, or look at the rows of this step"
        )
    return line, bool(sums[2])


def _line(run: Run, step: int, sums: Tensor, rate: float) -> Line:
    epoch, positions = run.rows(step)
    count = len(run.names)
    norm = run.engine.get_global_grad_norm()
    optimizer = run.engine.optimizer
    line: Line = {
        "step": step,
        "epoch": epoch,
        "loss": float(sums[0]),
        "learning_rate": rate,
        "grad_norm": float(norm) if norm is not None else math.nan,
        "loss_scale": float(getattr(optimizer, "loss_scale", 1.0)) if run.profile.dtype == "fp16" else 1.0,
        "applied": int(run.engine.was_step_applied()),
        "tokens": int(sums[1]),
        "supervised_tokens": int(sums[3 + count :].sum()),
        "rows": run.plan(epoch).span(positions[0], positions[-1] + 1),
    }
    for number, name in enumerate(run.names):
        supervised = float(sums[3 + count + number])
        line[f"loss_{name}"] = float(sums[3 + number]) / supervised if supervised else None
    return line


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
        run.engine.module(**_tensors(collate([one], run.shards, run.profile), run.device))
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
            mine: list[Row] = rows[begin : begin + size * run.world_size][run.rank :: run.world_size]
            batch = collate(mine or rows[:1], run.shards, run.profile)
            losses = run.engine.module(**_tensors(batch, run.device))
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


def _tensors(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    parts = ("input_ids", "position_ids", "targets", "loss_mask")
    return {part: torch.from_numpy(getattr(batch, part)).to(device) for part in parts}


def _sum(run: Run, values: Tensor) -> Tensor:
    """Return the sum over ranks."""
    if run.world_size == 1:
        return values
    here = values.to(run.device)
    torch.distributed.all_reduce(here)
    return here.cpu()
