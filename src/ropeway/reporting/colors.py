"""Every color of a page and of a picture: change one here and nowhere else."""

# CSS variables of the pages, in the browser's light and dark mode.
LIGHT = {
    "paper": "#f6f7f9", "card": "#ffffff", "ink": "#1b2430", "dim": "#667085", "line": "#e1e5eb",
    "learn": "#bfe6dc", "learn-ink": "#06382e", "read": "#eceff3", "read-ink": "#4a5565",
    "accent": "#0f766e", "soft": "#e6f2f0", "warn": "#b45309", "piece": "#7c6fc4",
    # where the tokens of a source are, in the order of `ledger_steps.split_tokens`
    "p0": "#0f766e", "p1": "#8fb8b2", "p2": "#e08a1e", "p3": "#cbd3dd", "p4": "#7c6fc4",
    "p5": "#e3e7ed", "p6": "#c2556b",
}  # fmt: skip
DARK = {
    "paper": "#12161c", "card": "#1a2029", "ink": "#e4e8ee", "dim": "#97a3b4", "line": "#2b3440",
    "learn": "#0f4f45", "learn-ink": "#d5f5ee", "read": "#252d38", "read-ink": "#aeb8c6",
    "accent": "#4fd1bf", "soft": "#17302d", "warn": "#f0b060", "piece": "#8f83d8",
    "p0": "#2fb3a2", "p1": "#2f6660", "p2": "#e09a3e", "p3": "#465262", "p4": "#8f83d8",
    "p5": "#333d4a", "p6": "#d9748a",
}  # fmt: skip

# Pictures, always on white.
BACKGROUND, INK, DIM, GRID = "#ffffff", LIGHT["ink"], LIGHT["dim"], LIGHT["line"]
MODELS = {"base": "#98a2b3", "tuned": "#0f766e"}
VERSION, PRODUCTION = "#2563eb", "#9ca3af"  # of a review
SERIES = ("#e08a1e", "#7c6fc4", "#c2556b", "#3b82c4", "#6b8e23", "#8b6f47")  # validation curves, in order
IN_ROW, OVER = "#0f766e", "#e08a1e"  # lengths up to max_length, and above
LIMIT, LIMIT_TEXT = "#e08a1e", "#b45309"  # the line at max_length
HEAT = "YlGn"  # matplotlib's color map for shares
HEAT_DARK = 0.6  # text on a larger share is white
