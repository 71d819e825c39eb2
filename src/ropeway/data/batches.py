"""Build batches from sequences: windows, loss masks, rows, collation. Training and evaluation share this code.

Shapes: B rows, T tokens. Every row is a function of (params, lengths, epoch, index). No global random generator is
used, so read order, number of workers and resuming never change a row.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ropeway.config.params import EpochParams, RowParams
from ropeway.data.loss_mask import loss_mask
from ropeway.data.mixture import count_earlier, epoch_count, plan_order
from ropeway.data.packing import plan_packing, split_document, turn_starts, window_at_turns
from ropeway.data.shards import Kind, Shards
from ropeway.runtime.manifest import digest_of

PAD_MULTIPLE = 16  # Source: Open-Assistant's training collator, pad_to_multiple_of=16


class RandomGenerator(Protocol):
    """The methods of `random.Random` that windows use."""

    def random(self) -> float:
        """Return a float in [0, 1)."""

    def randint(self, a: int, b: int, /) -> int:
        """Return an integer from a to b, both included."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a row: tokens [begin, end) of one stored sequence."""

    source: int
    sequence: int
    begin: int
    end: int


Row = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch.

    Attributes:
        input_ids: `(B, T)` tokens, padded on the right.
        position_ids: `(B, T)`, restarting at every piece of a packed row.
        targets: `(B, T)`, the next token of each position.
        loss_mask: `(B, T)`, True where predicting the next token counts in the loss.
        sources: `(B, T)` number of the source, -1 on padding.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    sources: NDArray[np.int16]


def plan_window(
    length: int, *, max_length: int, probability: float, generator: RandomGenerator, is_document: bool
) -> tuple[int, int]:
    """Return the span [begin, end) to read of a sequence of `length` tokens.

    One number is drawn for documents and short sequences too, as in the original, so that the generator's state stays
    equal to the original's.
    """
    windowed = generator.random() < probability and not is_document
    if length <= max_length:
        return 0, length
    begin = generator.randint(0, length - max_length) if windowed else 0
    return begin, begin + max_length


def collate(
    rows: Sequence[Row], shards: Shards, profile: RowParams, *, pad_to_multiple_of: int | None = PAD_MULTIPLE
) -> Batch:
    """Return the batch of these rows, padded to the longest row (rounded up).

    Targets are each padded row rolled left by one, as in the original: the target of a row's last token is padding, or
    the row's first token if the row is full. The loss mask selects the targets that count.
    """
    longest = max(sum(piece.end - piece.begin for piece in row) for row in rows)
    width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of if pad_to_multiple_of else longest
    shape = (len(rows), width)
    batch = Batch(
        input_ids=np.full(shape, shards.special["pad"], dtype=np.int64),
        position_ids=np.zeros(shape, dtype=np.int64),
        targets=np.empty(shape, dtype=np.int64),
        loss_mask=np.zeros(shape, dtype=np.bool_),
        sources=np.full(shape, -1, dtype=np.int16),
    )
    ends: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        at = 0
        for piece in row:
            tokens, kinds = shards.sources[piece.source].read(piece.sequence)
            here = slice(at, at := at + piece.end - piece.begin)
            cut = slice(piece.begin, piece.end)
            batch.input_ids[number, here] = tokens[cut]
            batch.position_ids[number, here] = np.arange(piece.end - piece.begin)
            batch.loss_mask[number, here] = loss_mask(kinds[cut], profile)
            batch.sources[number, here] = piece.source
            if profile.document_end == "eos" and kinds[piece.end - 1] == Kind.DOCUMENT_END:
                ends.append((number, at - 1))
        batch.position_ids[number, at:] = np.arange(width - at) + (at if len(row) == 1 else 0)
    batch.targets[:] = np.roll(batch.input_ids, -1, axis=1)
    for place in ends:
        batch.targets[place] = shards.special["eos"]
    return batch


def slice_tokens(batch: Batch, index: int, count: int) -> Batch:
    """Return the `index`-th of `count` equal slices of every row's tokens: `(B, T / count)`."""
    width = batch.input_ids.shape[1] // count
    here = (slice(None), slice(index * width, (index + 1) * width))
    return Batch(
        batch.input_ids[here], batch.position_ids[here], batch.targets[here], batch.loss_mask[here], batch.sources[here]
    )


@dataclass(frozen=True)
class EpochPlan:
    """The rows of one epoch, in the order they are read; equal on every rank.

    Attributes:
        order: `(N,)` indices into the concatenated training parts of the sources.
        packed: The rows of the packed layout; None in the padded layout, where each sequence is a row.
    """

    profile: EpochParams
    shards: Shards
    epoch: int
    order: NDArray[np.int64]
    packed: tuple[Row, ...] | None = None

    @property
    def rows(self) -> int:
        """Number of rows of the epoch."""
        return len(self.order) if self.packed is None else len(self.packed)

    @property
    def steps(self) -> int:
        """Number of optimizer steps, rounded down as in the original; the ledger counts the rows left over."""
        return self.rows // self.profile.global_batch_size

    @property
    def digest(self) -> str:
        """Digest of the plan, compared across ranks before step 1."""
        return digest_of([self.epoch, self.order.tolist(), None if self.packed is None else self.span(0, self.rows)])

    def span(self, begin: int, end: int) -> str:
        """Return a short digest of the contents of rows [begin, end)."""
        if self.packed is None:
            return digest_of(self.order[begin:end].tolist())[:12]
        pieces = [(p.source, p.sequence, p.begin, p.end) for row in self.packed[begin:end] for p in row]
        return digest_of(pieces)[:12]

    def row(self, index: int) -> Row:
        """Return the row at a position of the epoch."""
        if self.packed is not None:
            return self.packed[index]
        source, sequence = self.drawn_sequence(index)
        part = self.shards.sources[source]
        begin, end = plan_window(
            int(part.lengths[sequence]),
            max_length=self.profile.max_length,
            probability=self.profile.random_offset_probability,
            generator=window_generator(self.profile.rng_seed, self.epoch, part.name, sequence, self.repeat(index)),
            is_document=part.is_document,
        )
        return (Piece(source, sequence, begin, end),)

    def drawn_sequence(self, index: int) -> tuple[int, int]:
        """Return (source, sequence) at a position of the epoch's order."""
        source, position = locate([len(part.train) for part in self.shards.sources], int(self.order[index]))
        return source, int(self.shards.sources[source].train[position])

    def repeat(self, index: int) -> int:
        """Return how often the epoch draws the sequence of this position before it; 0 unless `fraction` is above 1."""
        return int(self._repeats[index])

    @cached_property
    def _repeats(self) -> NDArray[np.int64]:
        return count_earlier(self.order)

    def drawn_sequences(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return `drawn_sequence` of all positions: `(N,)` sources and `(N,)` sequences."""
        begins = np.cumsum([0, *(len(part.train) for part in self.shards.sources)])
        sources = np.searchsorted(begins, self.order, side="right") - 1
        trained = np.concatenate([np.empty(0, np.int64), *(part.train for part in self.shards.sources)])
        return sources.astype(np.int64), trained[self.order]

    def trained_sequences(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (sources, sequences), `(n,)` each, of the rows that a step reads: all but those left over."""
        rows = self.steps * self.profile.global_batch_size
        if self.packed is None:
            sources, sequences = self.drawn_sequences()
            return sources[:rows], sequences[:rows]
        pieces = [(piece.source, piece.sequence) for row in self.packed[:rows] for piece in row]
        both = np.asarray(pieces, np.int64).reshape(-1, 2)
        return both[:, 0], both[:, 1]


def plan_epoch(shards: Shards, profile: EpochParams, *, epoch: int) -> EpochPlan:
    """Return the plan of one epoch."""
    options = dict(profile.mixture)
    sizes = [len(source.train) for source in shards.sources]
    counts = [
        epoch_count(size, options[source.name], name=source.name)
        for source, size in zip(shards.sources, sizes, strict=True)
    ]
    order = plan_order(sizes, counts, seed=profile.rng_seed, epoch=epoch)
    plan = EpochPlan(profile, shards, epoch, np.asarray(order, dtype=np.int64))
    return replace(plan, packed=_pack(plan)) if profile.layout == "packed" else plan


def _pack(plan: EpochPlan) -> tuple[Row, ...]:
    """Return an epoch's packed rows, shuffled, because packing puts long pieces first."""
    pieces = [piece for index in range(len(plan.order)) for piece in _plan_pieces(plan, index)]
    rows = plan_packing([piece.end - piece.begin for piece in pieces], capacity=plan.profile.max_length)
    generator = random.Random(f"{plan.profile.rng_seed}/packing/{plan.epoch}")
    generator.shuffle(rows)
    return tuple(tuple(pieces[index] for index in row) for row in rows)


def _plan_pieces(plan: EpochPlan, index: int) -> list[Piece]:
    """Return the pieces of a drawn sequence: all of a document; complete turns of an over-long conversation."""
    source, sequence = plan.drawn_sequence(index)
    part, capacity = plan.shards.sources[source], plan.profile.max_length
    length = int(part.lengths[sequence])
    if length <= capacity:
        return [Piece(source, sequence, 0, length)]
    if part.is_document:
        return [Piece(source, sequence, *span) for span in split_document(length, capacity=capacity)]
    generator = window_generator(plan.profile.rng_seed, plan.epoch, part.name, sequence, plan.repeat(index))
    windowed = generator.random() < plan.profile.random_offset_probability
    draw = generator.random() if windowed else 0.0
    starts = turn_starts(part.read(sequence)[1])
    return [Piece(source, sequence, *window_at_turns(starts, length, capacity=capacity, draw=draw))]


def join_rows(rows: Sequence[Row]) -> Row:
    """Return rows joined into one: a packed micro-batch is `(1, T)`; flash kernels see boundaries in one row only."""
    return tuple(piece for row in rows for piece in row)


def validation_rows(shards: Shards, profile: RowParams) -> list[tuple[str, list[Row]]]:
    """Return the validation rows of each source; over-long sequences are truncated on the right, never windowed."""
    return [
        (
            source.name,
            [
                (Piece(number, int(sequence), 0, min(int(source.lengths[sequence]), profile.max_length)),)
                for sequence in source.validation
            ],
        )
        for number, source in enumerate(shards.sources)
    ]


def window_generator(seed: int, epoch: int, source: str, sequence: int, repeat: int = 0) -> random.Random:
    """Return the random generator of one sequence's window in one epoch, independent of read order.

    Repeats of a sequence in the epoch have windows of their own.
    """
    return random.Random(f"{seed}/window/{epoch}/{source}/{sequence}" + (f"/{repeat}" if repeat else ""))


def locate(sizes: Sequence[int], index: int) -> tuple[int, int]:
    """Return (source, position) of an index into concatenated parts.

    >>> locate([3, 5], 4)
    (1, 1)
    """
    for source, size in enumerate(sizes):
        if index < size:
            return source, index
        index -= size
    raise IndexError(f"index exceeds the last of {sum(sizes)} sequences by {index + 1}")
