"""Choose the sequences of an epoch and their order; pure functions over sizes.

Source: Open-Assistant's dataset loading and PerDatasetEpochSampler (July 2023). These functions reproduce its order
exactly (tests/contract/parity), with local random generators instead of the global ones.
"""

import math
import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ropeway.config.sections import DatasetOptions
from ropeway.runtime.errors import DataError

Item = TypeVar("Item")

SPLIT_SEED = 666  # Source: Open-Assistant's train_val_dataset; a constant there, not the run's seed


def plan_chunks(length: int, max_chunk_size: int | None) -> list[tuple[int, int]]:
    """Return (begin, end) spans of a document of `length` code points.

    Source: Open-Assistant's pretrain_datasets. An empty document has no chunk.

    >>> plan_chunks(5, 2), plan_chunks(0, 2)
    ([(0, 2), (2, 4), (4, 5)], [])
    """
    step = max_chunk_size or max(length, 1)
    return [(begin, min(begin + step, length)) for begin in range(0, length, step)]


def split_positions(count: int, val_split: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (train, validation) positions, both permuted; reproduces scikit-learn's `train_test_split`."""
    if val_split == 0:
        return np.arange(count), np.empty(0, dtype=np.int64)
    order = np.random.RandomState(SPLIT_SEED).permutation(count)  # the original's generator
    validation = math.ceil(val_split * count)
    return order[validation:], order[:validation]


def draw_validation(
    count: int, max_val_set: int | None, *, generator: np.random.RandomState, replace: bool
) -> NDArray[np.int64]:
    """Return the positions in the validation part to evaluate: all, or `max_val_set` random ones."""
    if max_val_set is None or count <= max_val_set:
        return np.arange(count)
    return generator.choice(count, max_val_set, replace=replace)


def epoch_count(size: int, options: DatasetOptions, *, name: str) -> int:
    """Return how many of `size` training sequences an epoch reads; a `fraction` above 1 counts repeats.

    Raises:
        DataError: `options.size` exceeds the number of sequences.
    """
    if options.size is not None and options.size > size:
        raise DataError(
            f"source {name}: size is {options.size:,} sequences per epoch, but its training part has {size:,}; reduce "
            "`size` in params.yaml, or replace it by a `fraction` above 1 to repeat sequences"
        )
    fraction = options.fraction if options.size is None else options.size / size
    return int(size * (1 if fraction is None else fraction))


def plan_order(sizes: Sequence[int], counts: Sequence[int], *, seed: int, epoch: int) -> list[int]:
    """Return an epoch's order: indices into the concatenated training parts of the sources.

    One generator seeded with seed + epoch draws `counts[i]` of source i, then shuffles all. A count above the size
    takes every sequence as often as it fits, and draws the rest without replacement.
    """
    return draw_order(sizes, counts, generator=random.Random(epoch + seed))


def draw_order(sizes: Sequence[int], counts: Sequence[int], *, generator: random.Random) -> list[int]:
    """Return an epoch's order drawn from `generator`; the original then draws the windows from the same generator."""
    order: list[int] = []
    begin = 0
    for size, count in zip(sizes, counts, strict=True):
        everything = range(begin, begin + size)
        # A count up to the size is one draw, as in the original, so its generator is in the original's state.
        whole, rest = divmod(count, size) if count > size else (0, count)
        order += [*everything] * whole + generator.sample(everything, rest)
        begin += size
    generator.shuffle(order)
    return order


def count_earlier(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return `(N,)`: how often each item of an order is in the order before this position.

    >>> count_earlier(np.array([7, 5, 7, 7, 5])).tolist()
    [0, 0, 1, 2, 1]
    """
    sorted_at = np.argsort(order, kind="stable")
    ordered = order[sorted_at]
    earlier = np.empty_like(order)
    earlier[sorted_at] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return earlier


def rank_order(order: Sequence[Item], *, rank: int, world_size: int) -> Sequence[Item]:
    """Return one rank's part of an epoch or step: every `world_size`-th item, starting at `rank`."""
    return order[rank::world_size]
