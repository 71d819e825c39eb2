"""Pictures of an evaluation as PNG and SVG: equal figures give equal bytes (no date, fixed ids, matplotlib's fonts)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, DIM, LINE = "#1b2430", "#667085", "#e1e5eb"
COLOURS = {"base": "#98a2b3", "tuned": "#0f766e"}
_PALETTE = ("#e08a1e", "#7c6fc4", "#c2556b", "#3b82c4", "#6b8e23", "#8b6f47")
_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": DIM,
    "axes.labelcolor": DIM,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "legend.frameon": False,
    "svg.fonttype": "path",  # looks alike in every viewer, whatever its fonts
}
_SIZE_INCHES = (8.0, 4.2)
_DOTS_PER_INCH = 130
# One dot per step is noise from a few rows; the line is their mean over the last steps, a tenth of all at most.
_SMOOTHED_STEPS = 20
Rows = Sequence[Mapping[str, Any]]
Grid = tuple[Sequence[int], Sequence[float], Sequence[Sequence[float]]]  # lengths, depths, share by depth and length


@contextmanager
def _drawn(folder: Path, name: str, size: tuple[float, float] = _SIZE_INCHES) -> Iterator[Figure]:
    """Yield a figure and write it as `name.png` and `name.svg`; ids in the SVG are made from its name."""
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(folder / f"{name}.png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def draw_losses(folder: Path, steps: Rows) -> None:
    """Draw training loss per step and validation losses from the lines of steps.csv."""
    with _drawn(folder, "loss") as figure:
        axes = figure.add_subplot()
        numbers, losses = _series(steps, "loss")
        axes.plot(numbers, losses, ".", color=COLOURS["tuned"], alpha=0.3, markersize=3)
        width = max(1, min(_SMOOTHED_STEPS, len(losses) // 10))
        mean = [sum(part) / len(part) for part in _windows(losses, width)]
        label = f"training, mean of {width} steps" if width > 1 else "training"
        axes.plot(numbers, mean, color=COLOURS["tuned"], linewidth=2, label=label)
        names = sorted({key for line in steps for key in line if key.startswith("validation_")})
        for name, colour in zip(names, _cycle(len(names)), strict=True):
            at, found = _series(steps, name)
            title = f"validation, {name.removeprefix('validation_')}"
            axes.plot(at, found, "o--", color=colour, markersize=5, linewidth=1.2, label=title)
        _finish(axes, "Loss while training", "optimizer step", "nats per supervised token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()


def draw_positions(folder: Path, table: Rows, *, max_length: int) -> None:
    """Draw each curve of positions.csv; dashed without scaling, a line where training ended."""
    curves = [name for name in table[0] if name not in ("position", "tokens")]
    with _drawn(folder, "positions") as figure:
        axes = figure.add_subplot()
        for name in curves:
            model, _, unscaled = name.partition("_")
            at, found = _series(table, name, x="position")
            how = {"linestyle": "--", "linewidth": 1.4} if unscaled else {"linewidth": 2.2}
            title = f"{model}, without RoPE scaling" if unscaled else _with_scaling(model, curves)
            axes.plot(at, found, marker=".", markersize=5, color=COLOURS[model], label=title, **how)
        axes.axvline(max_length, color=_PALETTE[0], linewidth=1.2)
        place: Any = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 9}
        axes.annotate(
            f"max_length {max_length:,}", (max_length, 1), xycoords=("data", "axes fraction"), color="#b45309", **place
        )
        axes.set_xlim(left=0)
        _finish(axes, "Loss by position", "position in tokens", "nats per token")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        # Below the axes: curves may be anywhere inside.
        figure.legend(loc="outside lower center", ncols=2)


def draw_passkey(folder: Path, grids: Mapping[str, Grid]) -> None:
    """Draw one heat map per model: share of keys found, by length and depth; beyond training too."""
    with _drawn(folder, "passkey", (8.0, 3.6)) as figure:
        panels = figure.subplots(1, len(grids), squeeze=False)[0]
        for axes, (name, (lengths, depths, shares)) in zip(panels, grids.items(), strict=True):
            image = axes.imshow(shares, cmap="YlGn", vmin=0, vmax=1, aspect="auto")
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            for row, line in enumerate(shares):
                for column, share in enumerate(line):
                    colour = "#ffffff" if share > 0.6 else INK  # noqa: PLR2004 - where YlGn turns dark
                    axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=9)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            found = sum(map(sum, shares)) / sum(map(len, shares))
            _finish(axes, f"Passkey, {name}: {found:.0%} found", "length in tokens", "depth of the key")
        bar = figure.colorbar(image, ax=list(panels), format=FuncFormatter(lambda value, _: f"{value:.0%}"))
        bar.outline.set_visible(False)  # type: ignore[operator]


def draw_sources(folder: Path, table: Rows) -> None:
    """Draw base against tuned per source, from the lines of scores.csv."""
    sources = list(dict.fromkeys(line["source"] for line in table))
    models = list(dict.fromkeys(line["model"] for line in table))
    high = 0.8 / len(models)
    with _drawn(folder, "sources", (8.0, 1.4 + 0.8 * len(sources))) as figure:
        axes = figure.add_subplot()
        for number, model in enumerate(models):
            losses = [float(line["loss"]) for line in table if line["model"] == model]
            at = [place + (number - (len(models) - 1) / 2) * high for place in range(len(sources))]
            bars = axes.barh(at, losses, height=high * 0.92, color=COLOURS[model], label=model)
            axes.bar_label(bars, fmt="%.3f", padding=4, color=INK, fontsize=9)
        axes.set_yticks(range(len(sources)), sources)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        _finish(axes, "Validation loss per source", "nats per supervised token", "")
        axes.legend(ncols=len(models), loc="lower right", bbox_to_anchor=(1, 1))


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _with_scaling(model: str, curves: Sequence[str]) -> str:
    return f"{model}, with RoPE scaling" if any(name.startswith(f"{model}_") for name in curves) else model


def _series(rows: Rows, column: str, x: str = "step") -> tuple[list[float], list[float]]:
    """Return the x and the values of the lines that have one."""
    pairs = [(float(line[x]), float(line[column])) for line in rows if line.get(column) not in (None, "")]
    return [at for at, _ in pairs], [value for _, value in pairs]


def _windows(values: Sequence[float], width: int) -> Iterator[Sequence[float]]:
    for end in range(1, len(values) + 1):
        yield values[max(0, end - width) : end]


def _cycle(count: int) -> Iterator[str]:
    for number in range(count):
        yield _PALETTE[number % len(_PALETTE)]
