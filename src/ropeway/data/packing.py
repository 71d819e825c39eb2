"""Which pieces share a row of the packed layout: best fit over lengths alone, before a token is moved."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ropeway.data.shards import Kind
from ropeway.runtime.errors import DataError


def plan_packing(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Return rows of indices into `lengths`: longest first, each into the fullest row that still has room.

    Best-fit decreasing, at worst about 11/9 of the fewest rows possible. Ties keep input order, so equal input gives an
    equal plan. Rows with room are found by one bit operation: bit r of a number says that some row has r tokens free.
    Source: Johnson et al. 1974, SIAM J. Comput. 3:4.

    Args:
        lengths: `(N,)` tokens of each piece, 1 to `capacity`.
        capacity: Tokens a row can hold.

    Raises:
        DataError: A piece is empty or longer than a row; it is named, never cut in silence.

    >>> plan_packing([5, 3, 2, 6], capacity=8)
    [[3, 2], [0, 1]]
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free tokens; first in, first filled
    heads = [0] * (capacity + 1)
    room = 0
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and not (sizes.min() >= 1 and sizes.max() <= capacity):
        wrong = int(np.flatnonzero((sizes < 1) | (sizes > capacity))[0])
        raise DataError(f"piece {wrong} has {sizes[wrong]} tokens; a row holds 1 to {capacity}")
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        fitting = room >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[free][heads[free]]
            heads[free] += 1
            if heads[free] == len(open_rows[free]):
                room &= ~(1 << free)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        left = free - size
        if left:
            open_rows[left].append(row)
            room |= 1 << left
    return rows


def split_document(length: int, *, capacity: int) -> list[tuple[int, int]]:
    """Return consecutive spans that hold all of a document: nothing is dropped.

    >>> split_document(5, capacity=2)
    [(0, 2), (2, 4), (4, 5)]
    """
    return [(begin, min(begin + capacity, length)) for begin in range(0, length, capacity)]


def turn_borders(kinds: NDArray[np.uint8]) -> list[int]:
    """Return where the prompter's turns begin, the conversation's own begin first (its system message included)."""
    prompter = kinds == Kind.PROMPTER
    begins = np.flatnonzero(prompter & ~np.concatenate(([False], prompter[:-1])))
    return [0, *(int(begin) for begin in begins[1:])]


def window_at_turns(borders: Sequence[int], length: int, *, capacity: int, draw: float) -> tuple[int, int]:
    """Return the span of an over-long conversation that is read: whole turns, from a border to a border.

    Args:
        borders: Where the prompter's turns begin, rising, from 0.
        length: Tokens of the conversation, more than `capacity`.
        capacity: Tokens a row can hold.
        draw: In [0, 1): which border it begins at, of those behind which a row can be filled; 0 is the first.

    >>> window_at_turns([0, 4, 7], 10, capacity=6, draw=0.0), window_at_turns([0, 4, 7], 10, capacity=6, draw=0.9)
    ((0, 4), (4, 10))
    """
    last = [border for border in borders if length - border <= capacity][:1]  # behind it a row would stay emptier
    begins = [border for border in borders if not last or border <= last[0]]
    begin = begins[int(draw * len(begins))]
    ends = [end for end in (*borders, length) if begin < end <= begin + capacity]
    return begin, ends[-1] if ends else begin + capacity  # one exchange longer than a row is cut
