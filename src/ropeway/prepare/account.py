"""Fills the ledger from what was written, through the same plan and the same loss masks that training uses.

Counted over columns of numbers, not batch by batch: collating every row to count it took a sixth of prepare's time. A
test holds the two against each other.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ropeway.ledger import Account, Epoch, EpochOfSource, Ledger, Parts, Records
from ropeway.params import Profile
from ropeway.prepare.split import Split
from ropeway.rows import PAD_MULTIPLE, EpochPlan, loss_mask, loss_masks, plan_epoch
from ropeway.shards import Shards, SourceShards


def account_for(shards: Shards, records: dict[str, Records], splits: dict[str, Split], profile: Profile) -> Ledger:
    """Return the ledger of these shards: every row of every epoch of the run is counted, as it will be read."""
    plans = [plan_epoch(shards, profile, epoch=epoch) for epoch in range(profile.num_train_epochs)]
    learned = [_count_learned(source, profile) for source in shards.sources]
    walked = [_walk(plan, learned) for plan in plans]
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


def _walk(plan: EpochPlan, learned: Sequence[NDArray[np.int32]]) -> list[EpochOfSource]:
    """Return one epoch's account per source; `learned` is what `_count_learned` says of each."""
    owners, sequences = plan.drawn_all()
    pieces = _lay_out(plan, owners, sequences)
    tokens = pieces.end - pieces.begin
    widths = np.bincount(pieces.row, weights=tokens, minlength=plan.rows).astype(np.int64)
    padding = -widths % PAD_MULTIPLE  # each row by itself; its first sequence's source answers for it
    first = np.searchsorted(pieces.row, np.arange(plan.rows))
    accounts = []
    for number, source in enumerate(plan.shards.sources):
        drawn, own = sequences[owners == number], pieces.source == number
        counts = _count_lost(source, pieces.of(own), plan)
        row_tokens, padded = int(tokens[own].sum()), int(padding[pieces.source[first] == number].sum())
        accounts.append(
            EpochOfSource(
                epoch=plan.epoch,
                not_drawn=len(source.train) - len(drawn),
                drawn=len(drawn),
                drawn_tokens=int(source.lengths[drawn].sum(dtype=np.int64)),
                **counts,
                cells=row_tokens + padded,
                padding=padded,
                row_tokens=row_tokens,
                supervised=_count_supervised(source, pieces.of(own), learned[number], plan.profile),
            )
        )
    return accounts


@dataclass(frozen=True, slots=True)
class Pieces:
    """P pieces in the order of the rows, each column `(P,)`; see `ropeway.rows.Piece`."""

    row: NDArray[np.int64]
    source: NDArray[np.int64]
    sequence: NDArray[np.int64]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]

    def of(self, chosen: NDArray[np.bool_]) -> "Pieces":
        """Return these pieces only."""
        return Pieces(*(getattr(self, field.name)[chosen] for field in fields(self)))


def _lay_out(plan: EpochPlan, owners: NDArray[np.int64], sequences: NDArray[np.int64]) -> Pieces:
    """Return the pieces of every row. A sequence that fits is a row as it is; only the others are asked of the plan."""
    if plan.packed is not None:
        rows = ((number, *astuple(piece)) for number, row in enumerate(plan.packed) for piece in row)
        flat = np.fromiter(chain.from_iterable(rows), dtype=np.int64).reshape(-1, 5)
        return Pieces(*flat.T)
    lengths = np.empty(len(sequences), dtype=np.int64)
    for number, source in enumerate(plan.shards.sources):
        lengths[owners == number] = source.lengths[sequences[owners == number]]
    begin, end = np.zeros_like(lengths), lengths
    for index in np.flatnonzero(lengths > plan.profile.max_length).tolist():
        ((_, _, begin[index], end[index]),) = map(astuple, plan.row(index))
    return Pieces(np.arange(len(lengths)), owners, sequences, begin, end)


def _count_learned(source: SourceShards, profile: Profile) -> NDArray[np.int32]:
    """Return `(N,)` supervised tokens of each whole sequence of a source."""
    counts = [np.empty(0, dtype=np.int32)]
    for kinds, lengths in source.iterate_kinds():
        so_far = np.append(np.int32(0), np.cumsum(loss_masks(kinds, lengths, profile), dtype=np.int32))
        ends = np.cumsum(lengths)
        counts.append(so_far[ends] - so_far[ends - lengths])
    return np.concatenate(counts)


def _count_supervised(source: SourceShards, pieces: Pieces, learned: NDArray[np.int32], profile: Profile) -> int:
    whole = pieces.end - pieces.begin == source.lengths[pieces.sequence]
    cut = pieces.of(~whole)
    spans = zip(cut.sequence.tolist(), cut.begin.tolist(), cut.end.tolist(), strict=True)
    parts = (source.read(sequence)[1][begin:end] for sequence, begin, end in spans)
    return int(learned[pieces.sequence[whole]].sum(dtype=np.int64)) + sum(
        int(loss_mask(kinds, profile).sum()) for kinds in parts
    )


def _count_lost(source: SourceShards, pieces: Pieces, plan: EpochPlan) -> dict[str, int]:
    """Return the tokens around pieces that nobody reads; a document that packing splits is read whole."""
    lost = source.lengths[pieces.sequence] - (pieces.end - pieces.begin)
    if source.is_document and plan.packed is not None:
        lost = np.zeros_like(lost)
    windowed, cut = (lost > 0) & (pieces.begin > 0), (lost > 0) & (pieces.begin == 0)
    return {
        "windowed": int(windowed.sum()),
        "windowed_tokens": int(lost[windowed].sum()),
        "cut": int(cut.sum()),
        "cut_tokens": int(lost[cut].sum()),
    }
