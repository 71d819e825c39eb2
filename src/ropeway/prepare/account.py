"""Fills the ledger from what was written, through the same plan and the same collation that training uses."""

from collections import Counter
from dataclasses import fields

import numpy as np

from ropeway.ledger import Account, Epoch, EpochOfSource, Ledger, Parts, Records
from ropeway.params import Profile
from ropeway.prepare.split import Split
from ropeway.rows import EpochPlan, collate, plan_epoch
from ropeway.shards import Shards, SourceShards


def account_for(shards: Shards, records: dict[str, Records], splits: dict[str, Split], profile: Profile) -> Ledger:
    """Return the ledger of these shards: every epoch of the run is walked row by row, as it will be read."""
    plans = [plan_epoch(shards, profile, epoch=epoch) for epoch in range(profile.num_train_epochs)]
    walked = [_walk(plan) for plan in plans]
    sources = tuple(
        Account(
            name=source.name,
            kind=source.kind,
            records=records[source.name],
            sequences=_count_parts(source, splits[source.name], of_tokens=False),
            tokens=_count_parts(source, splits[source.name], of_tokens=True),
            epochs=tuple(epoch[number] for epoch in walked),
        )
        for number, source in enumerate(shards.sources)
    )
    size = profile.global_batch_size
    epochs = tuple(Epoch(p.epoch, p.rows, size, p.steps, p.rows - p.steps * size) for p in plans)
    return Ledger(sources, epochs)


def _count_parts(source: SourceShards, split: Split, *, of_tokens: bool) -> Parts:
    weights = source.lengths.astype(np.int64) if of_tokens else np.ones(len(source.lengths), dtype=np.int64)
    parts = (split.train, np.unique(split.validation), split.unused)
    return Parts(int(weights.sum()), *(int(weights[part].sum()) for part in parts))


def _walk(plan: EpochPlan) -> list[EpochOfSource]:
    """Return one epoch's account per source."""
    sources = plan.shards.sources
    counts: list[Counter[str]] = [Counter() for _ in sources]
    for index in range(plan.rows):
        row = plan.row(index)
        (piece,) = row
        batch = collate([row], plan.shards, plan.profile)
        whole = int(sources[piece.source].lengths[piece.sequence])
        tokens = int((batch.sources >= 0).sum())
        counts[piece.source] += Counter(
            drawn=1,
            drawn_tokens=whole,
            cells=batch.input_ids.size,
            padding=int((batch.sources < 0).sum()),
            row_tokens=tokens,
            supervised=int(batch.loss_mask.sum()),
        )
        if tokens < whole:
            how = "windowed" if piece.begin else "cut"
            counts[piece.source] += Counter({how: 1, f"{how}_tokens": whole - (piece.end - piece.begin)})
    names = [field.name for field in fields(EpochOfSource) if field.name not in ("epoch", "not_drawn")]
    return [
        EpochOfSource(plan.epoch, len(source.train) - count["drawn"], **{name: count[name] for name in names})
        for source, count in zip(sources, counts, strict=True)
    ]
