"""Fills the ledger from what was written, through the same plan and the same collation that training uses."""

from collections import Counter
from dataclasses import fields

import numpy as np

from ropeway.ledger import Account, Epoch, EpochOfSource, Ledger, Parts, Records
from ropeway.params import Profile
from ropeway.prepare.split import Split
from ropeway.rows import EpochPlan, Piece, collate, plan_epoch
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
    epochs = tuple(Epoch(p.epoch, len(p.order), p.rows, size, p.steps, p.rows - p.steps * size) for p in plans)
    return Ledger(sources, epochs)


def _count_parts(source: SourceShards, split: Split, *, of_tokens: bool) -> Parts:
    weights = source.lengths.astype(np.int64) if of_tokens else np.ones(len(source.lengths), dtype=np.int64)
    parts = (split.train, np.unique(split.validation), split.unused)
    return Parts(int(weights.sum()), *(int(weights[part].sum()) for part in parts))


def _walk(plan: EpochPlan) -> list[EpochOfSource]:
    """Return one epoch's account per source."""
    sources = plan.shards.sources
    counts: list[Counter[str]] = [Counter() for _ in sources]
    for index in range(len(plan.order)):
        source, sequence = plan.drawn(index)
        counts[source] += Counter(drawn=1, drawn_tokens=int(sources[source].lengths[sequence]))
    for index in range(plan.rows):
        row = plan.row(index)
        batch = collate([row], plan.shards, plan.profile)
        padding = int((batch.sources < 0).sum())
        counts[row[0].source] += Counter(cells=padding, padding=padding)
        for source in {piece.source for piece in row}:
            here = batch.sources == source
            tokens = int(here.sum())
            counts[source] += Counter(cells=tokens, row_tokens=tokens, supervised=int((batch.loss_mask & here).sum()))
        for piece in row:
            counts[piece.source] += _count_lost(piece, plan)
    names = [field.name for field in fields(EpochOfSource) if field.name not in ("epoch", "not_drawn")]
    return [
        EpochOfSource(plan.epoch, len(source.train) - count["drawn"], **{name: count[name] for name in names})
        for source, count in zip(sources, counts, strict=True)
    ]


def _count_lost(piece: Piece, plan: EpochPlan) -> Counter[str]:
    """Return the tokens around a piece that nobody reads; a document that packing splits is read whole."""
    source = plan.shards.sources[piece.source]
    lost = int(source.lengths[piece.sequence]) - (piece.end - piece.begin)
    if not lost or (source.is_document and plan.packed is not None):
        return Counter()
    how = "windowed" if piece.begin else "cut"
    return Counter({how: 1, f"{how}_tokens": lost})
