"""Which sequences an epoch reads, and in which order: pure functions over sizes.

Source: Open-Assistant's data set loading and PerDatasetEpochSampler (July 2023), whose sequences these reproduce
exactly (tests/contract/parity), with local generators instead of the global ones.
"""

import math
import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ropeway.config.params import DatasetOptions
from ropeway.runtime.errors import DataError

Item = TypeVar("Item")

SPLIT_SEED = 666  # Source: Open-Assistant's train_val_dataset; fixed there, not the run's seed


def plan_chunks(length: int, max_chunk_size: int | None) -> list[tuple[int, int]]:
    """Return (begin, end) spans of a document of `length` code points.

    Source: Open-Assistant's pretrain_datasets. An empty document has no chunk.

    >>> plan_chunks(5, 2), plan_chunks(0, 2)
    ([(0, 2), (2, 4), (4, 5)], [])
    """
    step = max_chunk_size or max(length, 1)
    return [(begin, min(begin + step, length)) for begin in range(0, length, step)]


def split_positions(count: int, val_split: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (train, validation) positions, both in permuted order; scikit-learn's `train_test_split` reproduced."""
    if val_split == 0:
        return np.arange(count), np.empty(0, dtype=np.int64)
    order = np.random.RandomState(SPLIT_SEED).permutation(count)  # the original's generator
    validation = math.ceil(val_split * count)
    return order[validation:], order[:validation]


def draw_validation(
    count: int, max_val_set: int | None, *, generator: np.random.RandomState, replace: bool
) -> NDArray[np.int64]:
    """Return positions in the validation part that are evaluated; all of them when the limit is not exceeded."""
    if max_val_set is None or count <= max_val_set:
        return np.arange(count)
    return generator.choice(count, max_val_set, replace=replace)


def epoch_count(size: int, options: DatasetOptions, *, name: str) -> int:
    """Return how many of `size` training sequences an epoch reads.

    Raises:
        DataError: `size` asks for more sequences than there are.
    """
    if options.size is not None and options.size > size:
        raise DataError(
            f"source {name}: size asks for {options.size:,} sequences an epoch, its training part has {size:,}; "
            "lower `size` in params.yaml"
        )
    fraction = options.fraction if options.size is None else options.size / size
    return int(size * min(1, 1 if fraction is None else fraction))


def plan_order(sizes: Sequence[int], counts: Sequence[int], *, seed: int, epoch: int) -> list[int]:
    """Return an epoch's order: indices into the sources' training parts laid one after another.

    Drawn from one generator seeded with seed + epoch: `counts[i]` of source i without replacement, then all shuffled.
    """
    return draw_order(sizes, counts, generator=random.Random(epoch + seed))


def draw_order(sizes: Sequence[int], counts: Sequence[int], *, generator: random.Random) -> list[int]:
    """Return an epoch's order drawn from this generator; the original then draws its windows from the same one."""
    order: list[int] = []
    begin = 0
    for size, count in zip(sizes, counts, strict=True):
        order += generator.sample(range(begin, begin + size), count)
        begin += size
    generator.shuffle(order)
    return order


def rank_order(order: Sequence[Item], *, rank: int, world_size: int) -> Sequence[Item]:
    """Return the part of an epoch, or of a step, that one rank reads: every `world_size`-th, from its own rank on."""
    return order[rank::world_size]
