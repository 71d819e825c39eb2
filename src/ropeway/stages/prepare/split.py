"""Split the sequences of a source into training, validation and unused; pure functions over arrays."""

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ropeway.config.params import PrepareParams
from ropeway.data.mixture import draw_validation, split_positions


@dataclass(frozen=True, slots=True)
class Split:
    """Sequence numbers of one source by part. Each sequence is in one part; with replacement, validation repeats some.

    Attributes:
        contaminated: Removed from the training part.
    """

    train: NDArray[np.int64]  # `(n,)`
    validation: NDArray[np.int64]  # `(v,)`
    unused: NDArray[np.int64]  # validation sequences beyond `max_val_set`
    duplicate: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # removed before the split
    contaminated: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def without_contaminated(self, hit: NDArray[np.bool_]) -> "Split":
        """Return the split without the training sequences for which `hit`, `(N,)`, is True; the order is kept."""
        gone = hit[self.train]
        return replace(self, train=self.train[~gone], contaminated=np.sort(self.train[gone]))


def plan_split(
    units: NDArray[np.int64],
    keys: NDArray[np.uint64],
    profile: PrepareParams,
    *,
    max_val_set: int | None,
    generator: np.random.RandomState,
    removed: NDArray[np.bool_] | None = None,
) -> Split:
    """Return the split of one source.

    Args:
        units: `(N,)` number of the unit of each sequence, ascending; a unit is a record, or one sequence.
        keys: `(N,)` hash of each sequence's unit.
        profile: The params; `split`, `val_split` and `validation_with_replacement` are read.
        max_val_set: Maximum number of validation sequences; the rest of the validation part is unused.
        generator: Shared by all sources in order, as in the original.
        removed: `(N,)` True for the sequences of records removed by dedup; they do not influence the split.
    """
    removed = np.zeros(len(units), np.bool_) if removed is None else removed
    stay, gone = np.flatnonzero(~removed), units[removed]
    gone = gone[np.diff(gone, prepend=-1) > 0]  # units are ascending: keep each once
    units, keys = units[stay] - np.searchsorted(gone, units[stay]), keys[stay]
    if profile.split == "by_hash":
        chosen = keys < np.uint64(int(profile.val_split * 2**64))
        train, part = np.flatnonzero(~chosen), np.flatnonzero(chosen)
    else:
        count = int(units[-1]) + 1 if len(units) else 0
        train, part = (sequences_of(order, units) for order in split_positions(count, profile.val_split))
    replace = profile.validation_with_replacement
    if profile.split == "by_hash" and not replace:
        # Take the lowest hashes: a new record replaces at most one of them, a random draw would change them all.
        validation = np.sort(part[np.argsort(keys[part], kind="stable")][:max_val_set])
    else:
        validation = part[draw_validation(len(part), max_val_set, generator=generator, replace=replace)]
    unused = np.setdiff1d(part, validation)
    return Split(stay[train], stay[validation], stay[unused], duplicate=np.flatnonzero(removed))


def sequences_of(order: NDArray[np.int64], units: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sequences of these units (records or single sequences), unit by unit.

    >>> sequences_of(np.array([2, 0]), np.array([0, 0, 2, 2, 2])).tolist()
    [2, 3, 4, 0, 1]
    """
    begins, ends = (np.searchsorted(units, order, side=side) for side in ("left", "right"))
    counts = ends - begins
    before = np.cumsum(counts) - counts  # sequences of the preceding units
    sequences: NDArray[np.int64] = np.repeat(begins - before, counts) + np.arange(int(counts.sum()))
    return sequences
