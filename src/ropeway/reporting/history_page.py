"""The history of a model as a page, as Markdown, and as a table for the terminal, which loads no drawing library."""

from collections.abc import Sequence

from ropeway.reporting import colors
from ropeway.reporting.history import LEAST, METRICS, SPREADS, WINDOW, History, HistoryVersion
from ropeway.reporting.markdown import plain, table
from ropeway.runtime.progress import format_seconds
from ropeway.runtime.terminal import format_moment

MARKDOWN_VERSIONS = 10  # in the short table of a run's page
_HUGE = 100_000  # a cost without decimals


def render_history(history: History) -> str:
    """Return the HTML page; equal histories give equal bytes."""
    from ropeway.reporting.render import render

    light, dark = (_draw(history, theme) for theme in (colors.LIGHT_PLOT, colors.DARK_PLOT))
    return render(
        "history.html.jinja",
        title=f"{history.name}: history",
        history=history,
        status=describe_last(history),
        rule=describe_rule(history),
        uri=light,
        dark_uri=dark,
        alt=f"Mean loss, data drift, accuracy and training speed of {len(history.versions)} versions",
        rows=[_html_row(one, history) for one in reversed(history.versions)],
        has_cost=history.price is not None,
    )


def render_history_markdown(history: History) -> str:
    """Return a short text for a run's page: the state of the last version, a picture, a table of the newest ones."""
    shown = history.versions[-MARKDOWN_VERSIONS:]
    heads, rows = history_table(history, shown)
    cells = [
        {head: plain(cell) for head, cell in zip(heads, row, strict=True) if head not in ("published", "trained")}
        for row in reversed(rows)
    ]
    states = [f"- **{plain(words)}**" if is_bad else f"- {plain(words)}" for is_bad, words in describe_last(history)]
    picture = _draw(history, colors.LIGHT_PLOT) if len(history.versions) > 1 else ""
    parts = [
        f"# {plain(history.name)}: history",
        "\n".join(states),
        f"![Mean loss, drift, accuracy and training speed by version]({picture})" if picture else "",
        table(cells),
        plain(describe_rule(history)),
    ]
    return "\n\n".join(filter(None, parts))


def describe_rule(history: History) -> str:
    """Return the rule of regressions in one sentence; empty while no version has enough versions before it."""
    if not history.is_compared:
        return ""
    least = ", ".join(f"{metric.title} {metric.least:.0%}" for metric in METRICS)
    return (
        f"A value is a regression if it is worse than the median of up to {WINDOW} versions before it by more than "
        f"{SPREADS:g} times their spread (1.4826 x median absolute deviation) and by at least: {least}. At least "
        f"{LEAST} versions before it are needed; scores are compared on equal validation rows where enough versions "
        "have them."
    )


def describe_last(history: History) -> list[tuple[bool, str]]:
    """Return what to know about the newest version: (whether it is bad, one sentence)."""
    if not history.versions:
        return [(False, f"no version of {history.name} was published yet")]
    last = history.versions[-1]
    found = [(True, f"{last.version}: REGRESSION in {one.words}") for one in last.regressions]
    if last.gate == "not passed":
        found.append((True, f"{last.version}: the gate did not pass: {', '.join(last.failed)}"))
    if last.drifted:
        found.append((True, f"{last.version}: DATA DRIFT above a limit: {', '.join(last.drifted)}"))
    state = ["no regression"] if last.compared else []
    return found or [(False, f"{last.version}: {', '.join([*state, _describe_gate(last), _describe_drift(last)])}")]


def history_table(
    history: History, versions: Sequence[HistoryVersion]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return (heads, rows) of a table as text; the cost is a column only if a price is known."""
    heads = ["version", "published", "loss", "vs champion", "accuracy", "drift, JS", "gate", "decided by", "trained"]
    heads += ["tokens/s", *(["cost"] if history.price is not None else []), "notes"]
    rows = []
    for one in versions:
        cells = [one.version, format_moment(one.published_at).removesuffix(" UTC"), _number(one.loss, 3)]
        cells += [_signed(one.change), _number(one.accuracy, 3), _number(one.drift_before, 3), one.gate or "none"]
        cells += [_decided(one), _seconds(one.train_seconds), _number(one.tokens_per_second, 0)]
        cells += [_cost(one.cost)] if history.price is not None else []
        rows.append((*cells, "; ".join([*one.aliases, *_notes(one, is_brief=True)])))
    return tuple(heads), rows


def _html_row(one: HistoryVersion, history: History) -> dict[str, object]:
    """Return a row of the page: cells of (text, whether it is flagged)."""
    bad = {regression.metric for regression in one.regressions}
    cells = [
        (_number(one.loss, 3), "loss" in bad),
        (_signed(one.change), False),
        (_number(one.accuracy, 3), "accuracy" in bad),
        (_number(one.drift_before, 3), _above(one.drift_before, one)),
        (_number(one.drift_oldest, 3), _above(one.drift_oldest, one)),
        ("" if one.seen is None else f"{one.seen:.0%}", False),
        (_seconds(one.run_seconds), False),
        (_number(one.tokens_per_second, 0), "tokens_per_second" in bad),
        *([(_cost(one.cost), False)] if history.price is not None else []),
    ]
    return {
        "version": one,
        "published": format_moment(one.published_at).removesuffix(" UTC"),
        "cells": cells,
        "gate": one.gate or "none",
        "gate_failed": one.gate == "not passed",
        "decided": _decided(one),
        "notes": _notes(one),
        "aliases": ", ".join(one.aliases),
        "is_bad": bool(one.regressions or one.failed),
    }


def _above(value: float | None, one: HistoryVersion) -> bool:
    return value is not None and one.drift_limit is not None and value > one.drift_limit


def _notes(one: HistoryVersion, *, is_brief: bool = False) -> list[str]:
    found = [f"REGRESSION: {found.brief if is_brief else found.words}" for found in one.regressions]
    found += [f"drift: {', '.join(one.drifted)}"] if one.drifted else []
    found += [f"gate not passed: {', '.join(one.failed)}"] if one.failed else []
    return [*found, *(["withdrawn"] if one.withdrawn else [])]


def _describe_gate(one: HistoryVersion) -> str:
    return "published without a gate" if one.gate is None else f"gate {one.gate}"


def _describe_drift(one: HistoryVersion) -> str:
    return "drift not compared" if one.drift_before is None else "no drift above a limit"


def _decided(one: HistoryVersion) -> str:
    return f"{one.decision}: {one.reviewer}" if one.decision else ""


def _draw(history: History, theme: colors.PlotTheme) -> str:
    from ropeway.reporting.pictures import HistoryLine, HistoryPanel, draw_history

    versions = history.versions
    limits = [one.drift_limit for one in versions if one.drift_limit is not None]

    def line(name: str, key: str, color: str, *, is_dashed: bool = False) -> HistoryLine:
        points = [(one.number, value) for one in versions if (value := getattr(one, key)) is not None]
        bad = tuple(one.number for one in versions if any(found.metric == key for found in one.regressions))
        return HistoryLine(name, points, color, bad, is_dashed=is_dashed)

    failed = tuple(one.number for one in versions if one.gate == "not passed")
    promoted = tuple(one.number for one in versions if one.decision in ("approved", "promoted"))
    drift = [
        line("from the version before", "drift_before", theme.in_row),
        line("from the oldest of the window", "drift_oldest", theme.dim, is_dashed=True),
    ]
    panels = [
        HistoryPanel("Mean loss, nats/token", [line("", "loss", theme.in_row)], failed=failed, promoted=promoted),
        HistoryPanel("Data drift, JS in bits", drift, limit=limits[-1] if limits else None),
        HistoryPanel("Mean accuracy", [line("", "accuracy", theme.in_row)]),
        HistoryPanel("Training, tokens/s", [line("", "tokens_per_second", theme.in_row)]),
    ]
    return draw_history(panels, theme)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{round(value, 3) + 0.0:+.3f}"


def _seconds(value: float | None) -> str:
    return "" if value is None else format_seconds(value)


def _cost(value: float | None) -> str:
    return "" if value is None else f"{value:,.{0 if value >= _HUGE else 2}f}"
