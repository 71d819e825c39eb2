"""A training run on one rank: its engine, and the rows that each step reads."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ropeway.config.params import TrainParams
from ropeway.data.batches import (
    PAD_MULTIPLE,
    Batch,
    EpochPlan,
    Row,
    collate,
    join_rows,
    locate,
    plan_epoch,
    slice_tokens,
)
from ropeway.data.mixture import Item, rank_order
from ropeway.data.shards import Shards
from ropeway.models.sequence_parallel import SequenceGroup
from ropeway.stages.train.model import token_flops


@dataclass(frozen=True, slots=True)
class Rewind:
    """Steps that are left out after a fault. All other steps keep their rows."""

    first_step: int  # first step left out
    last_step: int  # last step left out, at which a rule of `stop` found the fault
    reason: str  # the fault
    checkpoint_step: int  # the checkpoint that training resumed from
    rows: int  # number of rows left out
    sequences: dict[str, list[int]]  # source -> numbers of the sequences in those rows


@dataclass
class Run:
    """A training run on one rank.

    Attributes:
        accumulation_steps: Micro-batches per rank and optimizer step.
        heartbeat: Called before every forward pass, as a heartbeat for the watchdog.
        sequence: The ranks that share this rank's rows; None if it has rows of its own.
    """

    profile: TrainParams
    shards: Shards
    engine: Any  # the DeepSpeed engine around `SupervisedLoss`
    rank: int
    world_size: int
    accumulation_steps: int
    plans: dict[int, EpochPlan] = field(default_factory=dict)
    heartbeat: Callable[[], None] = lambda: None
    rewinds: tuple[Rewind, ...] = ()  # rewinds so far; the same on every rank
    sequence: SequenceGroup | None = None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self.engine.device
        return device

    @property
    def source_names(self) -> list[str]:
        """The names of the sources, in the order of the shards."""
        return [source.name for source in self.shards.sources]

    @property
    def sharing_ranks(self) -> int:
        """Number of ranks that share this rank's rows, itself included."""
        return self.sequence.size if self.sequence else 1

    @property
    def pad_multiple(self) -> int:
        """Rows are padded to a multiple of this many tokens, which the ranks that share them divide."""
        return math.lcm(PAD_MULTIPLE, self.sharing_ranks)

    def own_part(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this rank's items, such as rows, out of those of all ranks; ranks that share rows have the same."""
        shared = self.sharing_ranks
        return rank_order(items, rank=self.rank // shared, world_size=self.world_size // shared)

    def collate(self, rows: Sequence[Row]) -> Batch:
        """Return the batch of these rows; if ranks share them, this rank's slice of their tokens."""
        batch = collate(rows, self.shards, self.profile, pad_to_multiple_of=self.pad_multiple)
        return slice_tokens(batch, self.sequence.index, self.sequence.size) if self.sequence else batch

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of an epoch; the last one is cached."""
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
        """FLOPs per token of the model's matrix products, forward and backward."""
        return token_flops(self.engine.module.model)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(self.epoch_steps)

    def rows(self, step: int) -> tuple[int, list[int]]:
        """Return (epoch, positions in it) of all rows of a step (counted from 1), over all ranks."""
        epoch, inner = locate(self.epoch_steps, step - 1)
        size = self.profile.global_batch_size
        return epoch, list(range(inner * size, (inner + 1) * size))

    def is_left_out(self, step: int) -> bool:
        """Return whether a step is left out after a rewind."""
        return any(rewind.first_step <= step <= rewind.last_step for rewind in self.rewinds)

    def sequences(self, step: int) -> list[tuple[str, int]]:
        """Return (source, sequence) of every piece in the rows of a step, over all ranks."""
        epoch, positions = self.rows(step)
        pieces = [piece for position in positions for piece in self.plan(epoch).row(position)]
        return [(self.source_names[piece.source], piece.sequence) for piece in pieces]

    def rank_rows(self, step: int) -> list[Row]:
        """Return this rank's rows of a step: every `world_size`-th, as Open-Assistant's sampler assigns them."""
        epoch, positions = self.rows(step)
        plan = self.plan(epoch)
        return [plan.row(position) for position in self.own_part(positions)]

    def batches(self, rows: Sequence[Row]) -> Iterator[Batch]:
        """Yield the micro-batches of this rank's rows."""
        size = self.profile.per_device_train_batch_size
        for begin in range(0, len(rows), size):
            cut = rows[begin : begin + size]
            packed = self.profile.layout == "packed"
            yield self.collate([join_rows(cut)] if packed else cut)


def learning_rate(profile: TrainParams, applied: int, *, total_steps: int) -> float:
    """Return the learning rate of the next optimizer step after `applied` applied steps.

    A pure function, with which the engine's learning rate is compared at every step.

    DeepSpeed runs one step at rate 0 before its scheduler starts counting, and again at count 0: steps 1 and 2 have
    rate 0, and the full rate is reached at step warm-up + 2. Source: deepspeed 0.19.8, runtime/lr_schedules.py.
    Without warm-up a constant schedule has the full rate at every step.
    """
    if not profile.warmup_steps and profile.lr_schedule == "constant":
        return profile.learning_rate
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
