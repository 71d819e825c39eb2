"""Loss curves as an SVG inside a data URI, which Prefect's pages draw (3.9.1) and which needs no file host."""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 20, 40
_NAMES_IN_ROW, _NAME_HEIGHT = 3, 18
_MOST_POINTS = 400  # a page is drawn from it; 3,319 steps need no more
_RECENT = 0.1  # weight of a step in the smoothed line
COLOURS = ("#2563eb", "#9ca3af", "#ea580c", "#7c3aed", "#0d9488")


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a picture: its name and its points by step; single points are marked."""

    name: str
    points: Sequence[Point]
    colour: str
    is_marked: bool = False


def loss_curves(rows: Sequence[Mapping[str, str]], label: str, *, colour: str) -> list[Curve]:
    """Return a run's curves from its steps.csv: training loss, smoothed, and validation loss where it was measured."""
    training = list(_points(rows, "loss"))
    columns = [name for name in (rows[0] if rows else {}) if name.startswith("validation_")]
    found = [Curve(f"{label}, training", smooth(training), colour)]
    found += [
        Curve(
            f"{label}, validation {name.removeprefix('validation_')}", list(_points(rows, name)), shade, is_marked=True
        )
        for name, shade in zip(columns, (*COLOURS[2:], *COLOURS[2:]), strict=False)
    ]
    return [curve for curve in found if curve.points]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Return an exponential mean, thinned to what a page can draw; the last step is kept."""
    mean, out = 0.0, list[Point]()
    for number, (step, loss) in enumerate(points):
        mean = loss if number == 0 else mean + max(_RECENT, 1 / (number + 1)) * (loss - mean)
        out.append((step, mean))
    stride = max(1, math.ceil(len(out) / _MOST_POINTS))
    return [*out[::stride], *(out[-1:] if out and (len(out) - 1) % stride else [])]


def draw_curves(curves: Sequence[Curve]) -> str:
    """Return curves as one SVG; empty where there is nothing to draw."""
    points = [point for curve in curves for point in curve.points]
    if len(points) < 2:  # noqa: PLR2004 - a line has two ends
        return ""
    last = max(step for step, _ in points)
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    margin = (high - low or 1) * 0.05
    low, high = low - margin, high + margin

    top = _TOP + _NAME_HEIGHT * math.ceil(len(curves) / _NAMES_IN_ROW)

    def place(step: float, loss: float) -> str:
        x = _LEFT + step / (last or 1) * (_WIDTH - _LEFT - _RIGHT)
        y = top + (high - loss) / (high - low) * (_HEIGHT - top - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
            f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">'
        ),
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="#ffffff"/>',
        *_axes(last, low, high, top),
    ]
    for number, curve in enumerate(curves):
        parts.append(
            f'<polyline fill="none" stroke="{curve.colour}" stroke-width="2" '
            f'points="{" ".join(place(*point) for point in curve.points)}"/>'
        )
        if curve.is_marked:
            spots = [place(*point).split(",") for point in curve.points]
            parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{curve.colour}"/>' for x, y in spots]
        parts += _legend(number, curve)
    return "".join([*parts, "</svg>"])


def data_uri(svg: str) -> str:
    """Return an SVG as an address that holds it."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _axes(last: float, low: float, high: float, top: float) -> Iterator[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for part in range(5):
        y = top + part / 4 * (bottom - top)
        yield f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#e5e7eb"/>'
        yield _text(_LEFT - 8, y + 4, f"{high - part / 4 * (high - low):.2f}", "end")
        x = _LEFT + part / 4 * (right - _LEFT)
        yield _text(x, bottom + 18, f"{part / 4 * last:,.0f}", "middle")
    yield _text((_LEFT + right) / 2, _HEIGHT - 6, "optimizer step", "middle")


def _legend(number: int, curve: Curve) -> Iterator[str]:
    """Yield a curve's name above the picture, in columns of equal width."""
    row, column = divmod(number, _NAMES_IN_ROW)
    x, y = _LEFT + column * (_WIDTH - _LEFT - _RIGHT) / _NAMES_IN_ROW, 16 + row * _NAME_HEIGHT
    yield f'<line x1="{x:.0f}" y1="{y}" x2="{x + 14:.0f}" y2="{y}" stroke="{curve.colour}" stroke-width="3"/>'
    yield _text(x + 20, y + 4, curve.name, "start")


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#4b5563">{escape(words)}</text>'


def _points(rows: Sequence[Mapping[str, str]], column: str) -> Iterator[Point]:
    """Yield (step, value) where a column has a finite number."""
    for row in rows:
        try:
            step, value = float(row["step"]), float(row[column])
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(value):
            yield step, value
