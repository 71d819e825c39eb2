"""One training run as one rank holds it: its engine, and which rows each of its steps reads."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ropeway.config.params import Profile
from ropeway.data.batches import Batch, EpochPlan, Row, collate, join, locate, plan_epoch
from ropeway.data.mixture import rank_order
from ropeway.data.shards import Shards
from ropeway.stages.train.flops import token_flops


@dataclass(frozen=True, slots=True)
class Rewind:
    """Steps whose numbers went wrong, so that their rows are left out: they are passed over, no other row moves.

    Attributes:
        first_step: The first of them.
        last_step: The last of them, at which a rule of `stop` ended the run.
        reason: What the rule said.
        checkpoint_step: Where training went on from.
        rows: How many rows are left out.
        sequences: Which sequences of each source those rows hold.
    """

    first_step: int
    last_step: int
    reason: str
    checkpoint_step: int
    rows: int
    sequences: dict[str, list[int]]


@dataclass
class Run:
    """What one rank trains with.

    Attributes:
        engine: The DeepSpeed engine around `SupervisedLoss`.
        accumulation_steps: Micro-batches per rank per optimizer step.
        beat: Called before every forward pass, so that a watchdog sees the run is alive.
        rewinds: What is left out so far; the same on every rank.
    """

    profile: Profile
    shards: Shards
    engine: Any
    rank: int
    world_size: int
    accumulation_steps: int
    plans: dict[int, EpochPlan] = field(default_factory=dict)
    beat: Callable[[], None] = lambda: None
    rewinds: tuple[Rewind, ...] = ()

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
            yield collate([join(cut)] if packed else cut, self.shards, self.profile)
