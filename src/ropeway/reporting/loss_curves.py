"""Losses by optimizer step, from the rows of steps.csv."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from ropeway.reporting import colors

_MOST_POINTS = 400  # per curve
_RECENT = 0.1  # weight of a step in the smoothed line


@dataclass(frozen=True, slots=True)
class Curve:
    """A loss by optimizer step.

    Attributes:
        points: (step, nats/token).
        marker: matplotlib's marker of each point; empty for none.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: str
    marker: str = ""
    is_dashed: bool = False


def loss_curves(rows: Sequence[Mapping[str, str]], label: str, color: str) -> list[Curve]:
    """Return a run's smoothed training loss and its validation losses, from the rows of steps.csv."""
    columns = [name for name in (rows[0] if rows else {}) if name.startswith("validation_")]
    found = [Curve(f"{label}, training", smooth(list(_points(rows, "loss"))), color)]
    for name, shade, marker in zip(columns, cycle(colors.SERIES), cycle(colors.MARKERS), strict=False):
        points = list(_points(rows, name))
        title = f"{label}, validation {name.removeprefix('validation_')}"
        found.append(Curve(title, points, shade, marker, is_dashed=True))
    return [curve for curve in found if curve.points]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the exponential moving average, thinned to about 400 points; the last step is kept."""
    mean, out = 0.0, list[tuple[float, float]]()
    for number, (step, loss) in enumerate(points):
        mean = loss if number == 0 else mean + max(_RECENT, 1 / (number + 1)) * (loss - mean)
        out.append((step, mean))
    stride = max(1, math.ceil(len(out) / _MOST_POINTS))
    return [*out[::stride], *(out[-1:] if out and (len(out) - 1) % stride else [])]


def _points(rows: Sequence[Mapping[str, str]], column: str) -> Iterator[tuple[float, float]]:
    """Yield (step, value) where a column has a finite number."""
    for row in rows:
        try:
            step, value = float(row["step"]), float(row[column])
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(value):
            yield step, value
