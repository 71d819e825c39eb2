"""Pack pieces of sequences into rows: best-fit decreasing, from lengths alone."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ropeway.data.shards import Kind
from ropeway.runtime.errors import DataError


def plan_packing(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Return rows of indices into `lengths`; each piece, longest first, goes into the fullest row that it fits.

    Best-fit decreasing needs at most about 11/9 of the optimal number of rows. Ties keep input order, so equal input
    gives an equal plan. The row is found by one bit operation: bit r of `free_bits` means that a row has r tokens free.
    Source: Johnson et al. 1974, SIAM J. Comput. 3:4.

    Args:
        lengths: `(N,)` tokens of each piece, 1 to `capacity`.
        capacity: Tokens per row.

    Raises:
        DataError: A piece is empty or longer than a row; pieces are never truncated silently.

    >>> plan_packing([5, 3, 2, 6], capacity=8)
    [[3, 2], [0, 1]]
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free tokens; first in, first filled
    heads = [0] * (capacity + 1)
    free_bits = 0
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and not (sizes.min() >= 1 and sizes.max() <= capacity):
        wrong = int(np.flatnonzero((sizes < 1) | (sizes > capacity))[0])
        raise DataError(f"piece {wrong} has {sizes[wrong]} tokens, expected 1 to {capacity}, the tokens of a row")
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        fitting = free_bits >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[free][heads[free]]
            heads[free] += 1
            if heads[free] == len(open_rows[free]):
                free_bits &= ~(1 << free)
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        left = free - size
        if left:
            open_rows[left].append(row)
            free_bits |= 1 << left
    return rows


def split_document(length: int, *, capacity: int) -> list[tuple[int, int]]:
    """Return the consecutive spans of up to `capacity` tokens that cover a document.

    >>> split_document(5, capacity=2)
    [(0, 2), (2, 4), (4, 5)]
    """
    return [(begin, min(begin + capacity, length)) for begin in range(0, length, capacity)]


def turn_starts(kinds: NDArray[np.uint8]) -> list[int]:
    """Return where the prompter's turns begin; the first start is 0, which includes the system message.

    Under a Jinja template a start is the token after an answer.
    """
    prompter = (kinds == Kind.PROMPTER) | (kinds == Kind.CONTEXT)
    begins = np.flatnonzero(prompter & ~np.concatenate(([False], prompter[:-1])))
    return [0, *(int(begin) for begin in begins[1:])]


def window_at_turns(starts: Sequence[int], length: int, *, capacity: int, draw: float) -> tuple[int, int]:
    """Return the span of an over-long conversation to read; it consists of complete exchanges.

    Args:
        starts: Where the prompter's turns begin, ascending, from 0.
        length: Tokens of the conversation, more than `capacity`.
        capacity: Tokens per row.
        draw: In [0, 1): selects the start, among those after which a row can be filled; 0 is the first.

    >>> window_at_turns([0, 4, 7], 10, capacity=6, draw=0.0), window_at_turns([0, 4, 7], 10, capacity=6, draw=0.9)
    ((0, 4), (4, 10))
    """
    last = [start for start in starts if length - start <= capacity][:1]  # a later start would leave the row emptier
    begins = [start for start in starts if not last or start <= last[0]]
    begin = begins[int(draw * len(begins))]
    ends = [end for end in (*starts, length) if begin < end <= begin + capacity]
    return begin, ends[-1] if ends else begin + capacity  # an exchange longer than a row is truncated
