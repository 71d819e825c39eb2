"""One training run as one rank holds it: its engine, and which rows each of its steps reads."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ropeway.config.params import TrainParams
from ropeway.data.batches import Batch, EpochPlan, Row, collate, join_rows, locate, plan_epoch
from ropeway.data.mixture import rank_order
from ropeway.data.shards import Shards
from ropeway.stages.train.model import token_flops


@dataclass(frozen=True, slots=True)
class Rewind:
    """Steps whose numbers went wrong, so that their rows are left out: they are passed over, no other row moves."""

    first_step: int  # the first of them
    last_step: int  # the last of them, at which a rule of `stop` ended the run
    reason: str  # what the rule said
    checkpoint_step: int  # where training went on from
    rows: int  # how many rows are left out
    sequences: dict[str, list[int]]  # which sequences of each source those rows hold


@dataclass
class Run:
    """What one rank trains with.

    Attributes:
        beat: Called before every forward pass, so that a watchdog sees the run is alive.
    """

    profile: TrainParams
    shards: Shards
    engine: Any  # the DeepSpeed engine around `SupervisedLoss`
    rank: int
    world_size: int
    accumulation_steps: int  # micro-batches per rank per optimizer step
    plans: dict[int, EpochPlan] = field(default_factory=dict)
    beat: Callable[[], None] = lambda: None
    rewinds: tuple[Rewind, ...] = ()  # what is left out so far; the same on every rank

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

    @cached_property
    def token_flops(self) -> float:
        """What one token needs of the model's matrix products, forward and backward."""
        return token_flops(self.engine.module.model)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(self.epoch_steps)

    def rows(self, step: int) -> tuple[int, list[int]]:
        """Return (epoch, positions in it) of all rows of a step (1-based), over all ranks."""
        epoch, inner = locate(self.epoch_steps, step - 1)
        size = self.profile.global_batch_size
        return epoch, list(range(inner * size, (inner + 1) * size))

    def is_left_out(self, step: int) -> bool:
        """Return whether a step is passed over."""
        return any(rewind.first_step <= step <= rewind.last_step for rewind in self.rewinds)

    def sequences(self, step: int) -> list[tuple[str, int]]:
        """Return (source, sequence) of all that the rows of a step hold, over all ranks."""
        epoch, positions = self.rows(step)
        pieces = [piece for position in positions for piece in self.plan(epoch).row(position)]
        return [(self.names[piece.source], piece.sequence) for piece in pieces]

    def dealt(self, step: int) -> list[Row]:
        """Return this rank's rows of a step: every `world_size`-th, as the original's sampler deals."""
        epoch, positions = self.rows(step)
        plan = self.plan(epoch)
        return [plan.row(position) for position in rank_order(positions, rank=self.rank, world_size=self.world_size)]

    def batches(self, rows: Sequence[Row]) -> Iterator[Batch]:
        """Yield the micro-batches of this rank's rows."""
        size = self.profile.per_device_train_batch_size
        for begin in range(0, len(rows), size):
            cut = rows[begin : begin + size]
            packed = self.profile.layout == "packed"
            yield collate([join_rows(cut)] if packed else cut, self.shards, self.profile)


def learning_rate(profile: TrainParams, applied: int, *, total_steps: int) -> float:
    """Return the rate that the next optimizer step uses, when `applied` steps were applied before it.

    Our own pure function: the engine's rate is compared with it at every step.

    DeepSpeed takes one step at rate 0 before its scheduler starts counting, and again rate 0 at count 0: so steps 1
    and 2 use 0, and the full rate comes at step warm-up + 2. Source: deepspeed 0.19.8, runtime/lr_schedules.py.
    """
    count = max(applied - 1, 0)
    warmup = max(profile.warmup_steps, 2)
    if count < warmup:
        return profile.learning_rate * count / warmup
    if profile.lr_schedule == "constant":
        return profile.learning_rate
    if profile.lr_schedule == "linear":
        return profile.learning_rate * max(0.0, (total_steps - count) / max(1.0, total_steps - warmup))
    progress = min(1.0, (count - warmup + 1) / max(1, total_steps - warmup))
    return profile.learning_rate * (1 + math.cos(math.pi * progress)) / 2
