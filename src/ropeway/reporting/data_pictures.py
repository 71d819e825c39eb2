"""Pictures of report.html: a histogram of lengths (SVG), a bar of where tokens are. Integers only: equal bytes."""

from bisect import bisect_left
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

_WIDTH, _HEIGHT = 640, 190
_LEFT, _TOP, _BOTTOM = 8, 22, 22
_FEWEST_BINS = 8
_LABEL_SPACE = 52  # between two labels below the axis
_PARTS = (
    "supervised",
    "read, not supervised",
    "lost to windows and cuts",
    "not drawn",
    "validation",
    "unused",
    "duplicates and contaminated",
)


def plan_bins(longest: int, max_length: int) -> list[int]:
    """Return rising edges from 1 beyond `longest`: four to a doubling, and one behind `max_length`.

    >>> plan_bins(20, 11)
    [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24]
    """
    edges = {max_length + 1} if longest > max_length else set()
    quarter = 4
    edges |= {1, 2, 3}
    while True:
        for part in (4, 5, 6, 7):
            edges.add(part * quarter // 4)
            if part * quarter // 4 > longest:
                return sorted(edges)
        quarter *= 2


def draw_histogram(lengths: NDArray[np.int32], max_length: int) -> str:
    """Return the SVG of a source's lengths, over-long ones in a colour of their own, `max_length` marked."""
    if not len(lengths):
        return "<p>No sequence.</p>"
    edges = plan_bins(int(lengths.max()), max_length)
    counts = np.histogram(lengths, bins=np.asarray(edges))[0].tolist()
    first = min(next(at for at, count in enumerate(counts) if count), max(len(counts) - _FEWEST_BINS, 0))
    edges, counts = edges[first:], counts[first:]
    wide, tall = (_WIDTH - 2 * _LEFT) // len(counts), max(counts)
    room, floor = _HEIGHT - _TOP - _BOTTOM, _HEIGHT - _BOTTOM
    parts = []
    for at, count in enumerate(counts):
        high = max(count * room // tall, 1) if count else 0
        over = ' class="over"' if edges[at] > max_length else ""
        says = f"{edges[at]:,} to {edges[at + 1] - 1:,} tokens: {count:,}"
        box = f'x="{_LEFT + at * wide}" y="{floor - high}" width="{max(wide - 1, 1)}" height="{high}"'
        parts.append(f"<rect{over} {box}><title>{says}</title></rect>" if count else "")
    parts.append(f'<path d="M{_LEFT} {floor}h{wide * len(counts)}" class="axis"/>')
    every = -(-_LABEL_SPACE // wide)
    labels = range(0, len(edges), every)
    parts += [f'<text x="{_LEFT + at * wide}" y="{_HEIGHT - 6}">{edges[at]:,}</text>' for at in labels]
    if edges[0] <= max_length < edges[-1]:
        line = _LEFT + bisect_left(edges, max_length + 1) * wide
        side = f'x="{line - 5}" text-anchor="end"' if line > _WIDTH // 2 else f'x="{line + 5}"'
        parts.append(f'<path d="M{line} 4V{floor}" class="limit"/>')
        parts.append(f'<text {side} y="14" class="limit">max_length {max_length:,}</text>')
    words = f"Histogram of {len(lengths):,} lengths, longest {int(lengths.max()):,} tokens"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{words}">{"".join(parts)}</svg>'


def draw_bar(parts: Mapping[str, int]) -> str:
    """Return one bar of a source's tokens; its parts are as long as they are many."""
    total = sum(parts.values())
    if not total:
        return '<span class="bar"></span>'
    pieces = "".join(
        f'<i class="p{_PARTS.index(name)}" style="flex-grow:{count}" '
        f'title="{name}: {count:,} ({count / total:.1%})"></i>'
        for name, count in parts.items()
        if count
    )
    return f'<span class="bar">{pieces}</span>'


def draw_key() -> str:
    """Return what the colours of a bar mean."""
    items = "".join(f'<span><i class="p{at}"></i>{name}</span>' for at, name in enumerate(_PARTS))
    return f'<p class="barkey">Where stored tokens are in epoch 0: {items}</p>'
