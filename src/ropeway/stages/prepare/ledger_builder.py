"""Build the ledger from the written shards, with the epoch plan and the loss masks that training uses.

Counts are computed on arrays, not batch by batch: collating every row took a sixth of prepare's time. A test compares
both ways.
"""

from dataclasses import dataclass, fields
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ropeway.config.params import PrepareParams, RowParams
from ropeway.data.batches import PAD_MULTIPLE, EpochPlan, plan_epoch
from ropeway.data.ledger import (
    EpochTotals,
    Findings,
    ForgetTotals,
    Ledger,
    RecordTotals,
    SourceEpoch,
    SourceLedger,
    SplitTotals,
)
from ropeway.data.loss_mask import loss_mask, loss_masks
from ropeway.data.shards import Kind, Shards, SourceShards
from ropeway.stages.prepare.split import Split


def plan_epochs(shards: Shards, profile: PrepareParams) -> list[EpochPlan]:
    """Return the plan of every epoch."""
    return [plan_epoch(shards, profile, epoch=epoch) for epoch in range(profile.num_train_epochs)]


def build_ledger(
    plans: list[EpochPlan],
    records: dict[str, RecordTotals],
    splits: dict[str, Split],
    findings: dict[str, Findings],
    profile: PrepareParams,
    *,
    forget: ForgetTotals | None = None,
) -> Ledger:
    """Return the ledger of these plans; it counts every row of every epoch as training will read it."""
    shards = plans[0].shards
    counted = [_count_epoch(plan) for plan in plans]
    sources = tuple(
        SourceLedger(
            name=source.name,
            kind=source.kind,
            records=records[source.name],
            sequences=_count_parts(source, splits[source.name], of_tokens=False),
            tokens=_count_parts(source, splits[source.name], of_tokens=True),
            findings=findings[source.name],
            epochs=tuple(epoch[number] for epoch in counted),
        )
        for number, source in enumerate(shards.sources)
    )
    size = profile.global_batch_size
    epochs = tuple(EpochTotals(p.epoch, len(p.order), p.rows, size, p.steps, p.rows - p.steps * size) for p in plans)
    return Ledger(sources, epochs, forget)


def _count_parts(source: SourceShards, split: Split, *, of_tokens: bool) -> SplitTotals:
    weights = source.lengths.astype(np.int64) if of_tokens else np.ones(len(source.lengths), dtype=np.int64)
    parts = (split.train, np.unique(split.validation), split.unused, split.duplicate, split.contaminated)
    return SplitTotals(int(weights.sum()), *(int(weights[part].sum()) for part in parts))


def _count_epoch(plan: EpochPlan) -> list[SourceEpoch]:
    """Return the counts of one epoch, by source."""
    owners, sequences = plan.drawn_sequences()
    pieces = _list_pieces(plan, owners, sequences)
    tokens = pieces.end - pieces.begin
    widths = np.bincount(pieces.row, weights=tokens, minlength=plan.rows).astype(np.int64)
    padding = -widths % PAD_MULTIPLE  # each row padded separately; counted for the source of its first sequence
    first = np.searchsorted(pieces.row, np.arange(plan.rows))
    accounts = []
    for number, source in enumerate(plan.shards.sources):
        drawn, own = sequences[owners == number], pieces.source == number
        distinct = np.unique(drawn)
        drawn_tokens = int(source.lengths[drawn].sum(dtype=np.int64))
        counts = _count_lost_tokens(source, pieces.select(own), plan)
        row_tokens, padded = int(tokens[own].sum()), int(padding[pieces.source[first] == number].sum())
        accounts.append(
            SourceEpoch(
                epoch=plan.epoch,
                not_drawn=len(source.train) - len(distinct),
                drawn=len(drawn),
                drawn_tokens=drawn_tokens,
                **counts,
                cells=row_tokens + padded,
                padding=padded,
                row_tokens=row_tokens,
                supervised=_count_supervised(source, pieces.select(own), plan.profile),
                repeated=len(drawn) - len(distinct),
                repeated_tokens=drawn_tokens - int(source.lengths[distinct].sum(dtype=np.int64)),
            )
        )
    return accounts


@dataclass(frozen=True, slots=True)
class PieceColumns:
    """P pieces in the order of the rows; each column is `(P,)`, see `ropeway.data.batches.Piece`."""

    row: NDArray[np.int64]
    source: NDArray[np.int64]
    sequence: NDArray[np.int64]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]

    def select(self, chosen: NDArray[np.bool_]) -> "PieceColumns":
        """Return the chosen pieces."""
        return PieceColumns(*(getattr(self, field.name)[chosen] for field in fields(self)))


def _list_pieces(plan: EpochPlan, owners: NDArray[np.int64], sequences: NDArray[np.int64]) -> PieceColumns:
    """Return the pieces of every row; `plan.row` is called for over-long conversations only, which are windowed."""
    if plan.packed is not None:
        rows = ((n, p.source, p.sequence, p.begin, p.end) for n, row in enumerate(plan.packed) for p in row)
        return PieceColumns(*np.fromiter(chain.from_iterable(rows), dtype=np.int64).reshape(-1, 5).T)
    lengths = np.empty(len(sequences), dtype=np.int64)
    is_document = np.empty(len(sequences), dtype=np.bool_)
    for number, source in enumerate(plan.shards.sources):
        here = owners == number
        lengths[here], is_document[here] = source.lengths[sequences[here]], source.is_document
    begin, end = np.zeros_like(lengths), np.minimum(lengths, plan.profile.max_length)
    for index in np.flatnonzero((lengths > plan.profile.max_length) & ~is_document).tolist():
        (piece,) = plan.row(index)
        begin[index], end[index] = piece.begin, piece.end
    return PieceColumns(np.arange(len(lengths)), owners, sequences, begin, end)


def _count_supervised(source: SourceShards, pieces: PieceColumns, profile: RowParams) -> int:
    """Return the number of supervised tokens of these pieces, one shard at a time.

    Whether a token is supervised depends on its kind and the next token's kind, so the loss mask of the complete
    sequence also holds inside a piece, except at the piece's last token, where its kind alone decides.
    """
    last_counts = np.array([loss_mask(np.array([kind], dtype=np.uint8), profile)[0] for kind in Kind])
    order = np.argsort(pieces.sequence, kind="stable")
    order = order[(pieces.end > pieces.begin)[order]]
    sequence, begin, end = pieces.sequence[order], pieces.begin[order], pieces.end[order]
    total = first = 0
    for kinds, lengths in source.iterate_kinds():
        here = slice(*np.searchsorted(sequence, (first, first + len(lengths))))
        if here.start < here.stop:
            so_far = np.zeros(len(kinds) + 1, np.int32)  # half the bytes of int64
            np.cumsum(loss_masks(kinds, lengths, profile), out=so_far[1:])
            offsets = (np.cumsum(lengths) - lengths)[sequence[here] - first]
            last = offsets + end[here] - 1
            total += int(
                (so_far[last] - so_far[offsets + begin[here]]).sum(dtype=np.int64) + last_counts[kinds[last]].sum()
            )
        first += len(lengths)
    return total


def _count_lost_tokens(source: SourceShards, pieces: PieceColumns, plan: EpochPlan) -> dict[str, int]:
    """Return the counts of tokens that are not read, before or after a piece; packing reads all of a document."""
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
