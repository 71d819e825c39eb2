"""All plots, drawn with matplotlib. Equal numbers give equal bytes: no date, fixed ids, matplotlib's own font."""

import base64
import io
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from ropeway.reporting import colors
from ropeway.reporting.loss_curves import Curve

_STYLE: Any = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so it is the same on every machine
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",  # independent of the viewer's fonts
}
_SIZE_INCHES = (8.0, 4.2)
_DOTS_PER_INCH = 130
_SMOOTHED_STEPS = 20  # window of the mean training loss, at most a tenth of all steps
_NO_METADATA: Any = {"Date": None, "Creator": None}
_MIN_BINS, _MAX_TICKS = 8, 8
_ABOVE: Any = {
    "xycoords": ("data", "axes fraction"), "xytext": (0, 3), "textcoords": "offset points",
    "ha": "center", "va": "bottom", "fontsize": 9,
}  # fmt: skip
Rows = Sequence[Mapping[str, Any]]
Grid = tuple[Sequence[int], Sequence[float], Sequence[Sequence[float]]]  # lengths, depths, share by depth and length
KindGrid = tuple[Sequence[int], Sequence[str], Sequence[Sequence[float]]]  # lengths, kinds, score by kind and length


@contextmanager
def _styled_figure(
    name: str, size: tuple[float, float] = _SIZE_INCHES, theme: colors.PlotTheme = colors.LIGHT_PLOT
) -> Iterator[Figure]:
    """Yield a figure in the project's style; SVG ids in it are derived from `name`."""
    dim = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), theme.dim)
    frame: Any = {**dim, "figure.facecolor": theme.background, "axes.facecolor": theme.background}
    frame |= {"text.color": theme.ink, "grid.color": theme.grid}
    with mpl.rc_context({**_STYLE, **frame, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def _save(figure: Figure, folder: Path, name: str) -> None:
    figure.savefig(folder / f"{name}.png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", metadata=_NO_METADATA)


def _to_uri(figure: Figure) -> str:
    """Return a figure as a data URI of an SVG image."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata=_NO_METADATA)
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


@dataclass(frozen=True, slots=True)
class Bin:
    """Sequences of `begin` to `end` tokens, both included; `is_over` when they exceed `max_length`."""

    begin: int
    end: int
    count: int
    is_over: bool


@dataclass(frozen=True, slots=True)
class Lengths:
    """The histogram of a source: data URIs for light and dark mode, alternative text, and the counts."""

    uri: str
    dark_uri: str
    alt: str
    bins: tuple[Bin, ...]


def count_lengths(lengths: NDArray[np.int32], max_length: int) -> tuple[Bin, ...]:
    """Return a histogram of lengths: four bins per doubling, a border at `max_length`, no empty bins at the start.

    >>> [(part.begin, part.end) for part in count_lengths(np.array([1, 20], dtype=np.int32), 11)][5:]
    [(6, 6), (7, 7), (8, 9), (10, 11), (12, 13), (14, 15), (16, 19), (20, 23)]
    """
    longest = int(lengths.max())
    edges = {1, 2, 3} | ({max_length + 1} if longest > max_length else set())
    quarter = 4
    while max(edges) <= longest:
        edges |= {part * quarter // 4 for part in (4, 5, 6, 7, 8)}
        quarter *= 2
    steps = sorted(edges)
    steps = steps[: bisect_left(steps, longest + 1) + 1]
    counts = np.histogram(lengths, bins=np.asarray(steps))[0].tolist()
    first = min(next(at for at, count in enumerate(counts) if count), max(len(counts) - _MIN_BINS, 0))
    return tuple(
        Bin(steps[at], steps[at + 1] - 1, counts[at], steps[at] > max_length) for at in range(first, len(counts))
    )


def draw_lengths(lengths: NDArray[np.int32], max_length: int) -> Lengths | None:
    """Return the histogram of a source's sequence lengths, with a line at `max_length`; None without sequences."""
    if not len(lengths):
        return None
    bins = count_lengths(lengths, max_length)
    alt = f"Histogram of {len(lengths):,} sequence lengths, longest {int(lengths.max()):,} tokens"
    light, dark = (_draw_histogram(bins, max_length, theme) for theme in (colors.LIGHT_PLOT, colors.DARK_PLOT))
    return Lengths(light, dark, alt, bins)


def _draw_histogram(bins: Sequence[Bin], max_length: int, theme: colors.PlotTheme) -> str:
    with _styled_figure("lengths", (5.0, 2.2), theme) as figure:  # 10 pt stay legible at the width of a phone
        axes = figure.add_subplot()
        shades = [theme.over if part.is_over else theme.in_row for part in bins]
        axes.bar(range(len(bins)), [part.count for part in bins], width=0.92, align="edge", color=shades)
        every = math.ceil(len(bins) / _MAX_TICKS)
        axes.set_xticks(range(0, len(bins), every), [f"{part.begin:,}" for part in bins[::every]])
        axes.set_xlim(0, len(bins))
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if any(part.is_over for part in bins):
            at = next(number for number, part in enumerate(bins) if part.is_over) - 0.04
            axes.axvline(at, color=theme.limit, linewidth=1.2, linestyle="--")
            axes.annotate(f"max_length {max_length:,}", (at, 1), color=theme.limit, **_ABOVE)
        _label_axes(axes, "", "tokens per sequence", "sequences")
        return _to_uri(figure)


def draw_curves(curves: Sequence[Curve]) -> str:
    """Return losses by step as a data URI, for the Markdown that Prefect's pages show."""
    with _styled_figure("curves", (8.0, 3.6)) as figure:
        axes = figure.add_subplot()
        for curve in curves:
            steps, losses = zip(*curve.points, strict=True)
            style = "--" if curve.is_dashed else "-"
            axes.plot(steps, losses, style, color=curve.color, label=curve.name, marker=curve.marker, markersize=5)
        _label_axes(axes, "", "optimizer step", "nats per supervised token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper left", ncols=min(len(curves), 3))
        return _to_uri(figure)


@dataclass(frozen=True, slots=True)
class HistoryLine:
    """A number by version.

    Attributes:
        points: (version number, value).
        bad: Version numbers at which it is a regression.
    """

    name: str
    points: Sequence[tuple[int, float]]
    color: str
    bad: tuple[int, ...] = ()
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class HistoryPanel:
    """One chart of a history.

    Attributes:
        limit: Value of a horizontal line; None for none.
        failed: Version numbers that the gate did not pass.
        promoted: Version numbers that a person promoted to production.
    """

    title: str
    lines: Sequence[HistoryLine]
    limit: float | None = None
    failed: tuple[int, ...] = ()
    promoted: tuple[int, ...] = ()


def draw_history(panels: Sequence[HistoryPanel], theme: colors.PlotTheme) -> str:
    """Return charts of a model's versions, two side by side, as a data URI."""
    rows = math.ceil(len(panels) / 2)
    with _styled_figure("history", (11.0, 2.6 * rows), theme) as figure:
        figure.get_layout_engine().set(hspace=0.08)  # type: ignore[union-attr, call-arg]
        grid = figure.subplots(rows, 2, squeeze=False, sharex=True)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_panel(axes, panel, theme)
        for axes in grid[-1]:
            axes.set_xlabel("version")
        return _to_uri(figure)


def _draw_panel(axes: Axes, panel: HistoryPanel, theme: colors.PlotTheme) -> None:
    for line in panel.lines:
        if not line.points:
            continue
        at, values = zip(*line.points, strict=True)
        style, label = "--" if line.is_dashed else "-", line.name or "_"
        axes.plot(at, values, style, marker=".", color=line.color, label=label, linewidth=1.6, markersize=5)
        by_version = dict(line.points)
        marks = [("o", line.bad, "regression", theme.limit), ("X", panel.failed, "gate not passed", theme.over)]
        marks += [("^", panel.promoted, "promoted", theme.ink)]
        for marker, versions, name, color in marks:
            shown = [version for version in versions if version in by_version]
            face = "none" if marker == "o" else color
            size: Any = {"markersize": 12 if marker == "o" else 7, "markeredgewidth": 2 if marker == "o" else 0}
            if shown:
                heights = [by_version[version] for version in shown]
                axes.plot(shown, heights, marker, color=color, markerfacecolor=face, label=name, **size)
    if panel.limit is not None:
        axes.axhline(panel.limit, color=theme.limit, linewidth=1.2, linestyle=":", label=f"limit {panel.limit:g}")
    if not any(line.points for line in panel.lines):
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=theme.dim)
    axes.set_title(panel.title, fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8.5, labelcolor=theme.ink, loc="best")


def draw_losses(folder: Path, steps: Rows) -> None:
    """Draw training loss per step and validation losses from the rows of steps.csv."""
    with _styled_figure("loss") as figure:
        axes = figure.add_subplot()
        numbers, losses = _series(steps, "loss")
        axes.plot(numbers, losses, ".", color=colors.MODELS["tuned"], alpha=0.3, markersize=3)
        width = max(1, min(_SMOOTHED_STEPS, len(losses) // 10))
        windows = (losses[max(0, end - width) : end] for end in range(1, len(losses) + 1))
        mean = [sum(part) / len(part) for part in windows]
        label = f"training, mean of {width} steps" if width > 1 else "training"
        axes.plot(numbers, mean, color=colors.MODELS["tuned"], linewidth=2, label=label)
        names = sorted({key for line in steps for key in line if key.startswith("validation_")})
        for name, color, marker in zip(names, cycle(colors.SERIES), cycle(colors.MARKERS), strict=False):
            at, found = _series(steps, name)
            title = f"validation, {name.removeprefix('validation_')}"
            axes.plot(at, found, f"{marker}--", color=color, markersize=5, linewidth=1.2, label=title)
        _label_axes(axes, "Loss during training", "optimizer step", "nats per supervised token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        _save(figure, folder, "loss")


def draw_positions(folder: Path, table: Rows, *, max_length: int) -> None:
    """Draw each curve of positions.csv, dashed without RoPE scaling, and a line at `max_length`."""
    curves = [name for name in table[0] if name not in ("position", "tokens")]
    with _styled_figure("positions") as figure:
        axes = figure.add_subplot()
        for name in curves:
            model, _, unscaled = name.partition("_")
            at, found = _series(table, name, x="position")
            how = {"linestyle": "--", "linewidth": 1.4} if unscaled else {"linewidth": 2.2}
            is_scaled = any(other.startswith(f"{model}_") for other in curves)  # else both variants are the same
            title = f"{model}, {'without' if unscaled else 'with'} RoPE scaling" if is_scaled else model
            marker = "s" if model == "base" else "o"
            axes.plot(at, found, marker=marker, markersize=4, color=colors.MODELS[model], label=title, **how)
        axes.axvline(max_length, color=colors.LIGHT_PLOT.limit, linewidth=1.2)
        axes.annotate(f"max_length {max_length:,}", (max_length, 1), color=colors.LIGHT_PLOT.limit, **_ABOVE)
        axes.set_xlim(left=0)
        _label_axes(axes, "Loss by position", "position in tokens", "nats per token")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        # Below the axes: inside, it could cover a curve.
        figure.legend(loc="outside lower center", ncols=2)
        _save(figure, folder, "positions")


def draw_passkey(folder: Path, grids: Mapping[str, Grid]) -> None:
    """Draw one heat map per model: share of keys found by length and depth, also beyond `max_length`."""
    named = {
        f"Passkey, {name}: {_mean(shares):.0%} found": (lengths, [f"{depth:.0%}" for depth in depths], shares)
        for name, (lengths, depths, shares) in grids.items()
    }
    _draw_heat_maps(folder, "passkey", named, "depth of the key")


def draw_long_context(folder: Path, grids: Mapping[str, KindGrid]) -> None:
    """Draw one heat map per model: score by length and kind of question."""
    named = {f"Long context, {name}: {_mean(grid[2]):.0%}": grid for name, grid in grids.items()}
    _draw_heat_maps(folder, "long_context", named, "")


def _mean(shares: Sequence[Sequence[float]]) -> float:
    return sum(map(sum, shares)) / sum(map(len, shares))


def _draw_heat_maps(folder: Path, name: str, grids: Mapping[str, KindGrid], rows: str) -> None:
    """Draw grids side by side, by title: columns are lengths; `rows` labels the other axis."""
    with _styled_figure(name, (8.0, 3.6)) as figure:
        panels = figure.subplots(1, len(grids), squeeze=False)[0]
        for axes, (title, (lengths, labels, shares)) in zip(panels, grids.items(), strict=True):
            image = axes.imshow(shares, cmap=colors.HEAT, vmin=0, vmax=1, aspect="auto")
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(labels)), labels)
            for row, line in enumerate(shares):
                for column, share in enumerate(line):
                    color = colors.LIGHT_PLOT.background if share > colors.HEAT_DARK else colors.LIGHT_PLOT.ink
                    axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=color, fontsize=9)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            _label_axes(axes, title, "length in tokens", rows)
        bar = figure.colorbar(image, ax=list(panels), format=FuncFormatter(lambda value, _: f"{value:.0%}"))
        bar.outline.set_visible(False)  # type: ignore[operator]
        _save(figure, folder, name)


def draw_sources(folder: Path, table: Rows) -> None:
    """Draw validation loss of base and tuned per source, from the rows of scores.csv."""
    sources = list(dict.fromkeys(line["source"] for line in table))
    models = list(dict.fromkeys(line["model"] for line in table))
    high = 0.8 / len(models)
    with _styled_figure("sources", (8.0, 1.4 + 0.8 * len(sources))) as figure:
        axes = figure.add_subplot()
        for number, model in enumerate(models):
            losses = [float(line["loss"]) for line in table if line["model"] == model]
            at = [place + (number - (len(models) - 1) / 2) * high for place in range(len(sources))]
            bars = axes.barh(at, losses, height=high * 0.92, color=colors.MODELS[model], label=model)
            axes.bar_label(bars, fmt=f"{model} %.3f", padding=4, color=colors.LIGHT_PLOT.ink, fontsize=9)
        axes.set_yticks(range(len(sources)), sources)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0, labelcolor=colors.LIGHT_PLOT.ink)
        _label_axes(axes, "Validation loss per source", "nats per supervised token", "")
        axes.legend(ncols=len(models), loc="lower right", bbox_to_anchor=(1, 1))
        _save(figure, folder, "sources")


def _label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _series(rows: Rows, column: str, x: str = "step") -> tuple[list[float], list[float]]:
    """Return x and value of the rows that have a value."""
    pairs = [(float(line[x]), float(line[column])) for line in rows if line.get(column) not in (None, "")]
    return [at for at, _ in pairs], [value for _, value in pairs]
