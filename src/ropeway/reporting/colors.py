"""Every color of the pages and plots. tests/unit/reporting/test_colors.py checks contrast and color blindness."""

from dataclasses import dataclass

# CSS variables of the pages in the browser's light and dark mode. Text colors have a contrast of at least 4.5:1 on
# every background they appear on (WCAG 2.2, 1.4.3). p0 to p6 differ under protanopia, deuteranopia and tritanopia.
LIGHT = {
    "paper": "#f6f7f9", "card": "#ffffff", "ink": "#1b2430", "dim": "#586274", "line": "#e1e5eb",
    "learn": "#bfe6dc", "learn-ink": "#06382e", "learn-sign": "#2f6a5e",
    "read": "#eceff3", "read-ink": "#4a5565", "read-sign": "#5f6b7c",
    "accent": "#0f766e", "soft": "#e6f2f0", "warn": "#b45309", "piece": "#7c6fc4",
    # parts of a source's stored tokens, in the order of `ledger_steps.split_tokens`
    "p0": "#12704f", "p1": "#63bf97", "p2": "#ea8827", "p3": "#979dc1", "p4": "#5038a8",
    "p5": "#e6ebf1", "p6": "#64114d",
}  # fmt: skip
DARK = {
    "paper": "#12161c", "card": "#1a2029", "ink": "#e4e8ee", "dim": "#97a3b4", "line": "#2b3440",
    "learn": "#0f4f45", "learn-ink": "#d5f5ee", "learn-sign": "#86c9bd",
    "read": "#252d38", "read-ink": "#aeb8c6", "read-sign": "#97a3b4",
    "accent": "#4fd1bf", "soft": "#17302d", "warn": "#f0b060", "piece": "#8f83d8",
    "p0": "#2fe0c0", "p1": "#1c6a45", "p2": "#f5b044", "p3": "#8ab4d0", "p4": "#a47bf0",
    "p5": "#3c4156", "p6": "#d35f81",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlotTheme:
    """Colors of a plot's frame and histogram.

    Attributes:
        in_row: Bars of lengths up to `max_length`.
        over: Bars of longer ones.
        limit: The line at `max_length` and its label.
    """

    background: str
    ink: str
    dim: str
    grid: str
    in_row: str
    over: str
    limit: str


def _theme(page: dict[str, str]) -> PlotTheme:
    return PlotTheme(page["card"], page["ink"], page["dim"], page["line"], page["accent"], page["p2"], page["warn"])


LIGHT_PLOT, DARK_PLOT = _theme(LIGHT), _theme(DARK)
# Plots outside report.html are on white: they are also shown on pages with their own colors (Hub, GitHub, Prefect).
MODELS = {"base": "#8893a5", "tuned": "#0f766e"}
VERSION, PRODUCTION = MODELS["tuned"], MODELS["base"]  # of a review
SERIES = ("#ea3f2c", "#2853ab", "#6d7618", "#472167", "#3d8dca", "#b7729e")  # validation losses, in order
MARKERS = ("o", "s", "^", "D", "v", "P")  # of SERIES, in the same order
HEAT = "YlGn"  # matplotlib's color map for shares
HEAT_DARK = 0.6  # text on a larger share is white
