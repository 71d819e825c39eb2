"""Markdown that shows text as it is, whatever is in it."""

import re
from collections.abc import Sequence

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$])")


def escape(text: str) -> str:
    r"""Return text that Markdown shows verbatim, on one line.

    >>> escape("Part #1: <b>\nnext")
    'Part \\#1: \\<b\\><br>next'
    """
    return "<br>".join(_SPECIAL.sub(r"\\\1", line) for line in text.split("\n"))


def fence(text: str, language: str = "") -> str:
    r"""Return a code block whose fence is longer than any in the text.

    >>> fence("x")
    '```\nx\n```'
    """
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    bars = "`" * (longest + 1)
    return f"{bars}{language}\n{text.rstrip()}\n{bars}"


def figure(value: float) -> str:
    """Return a figure to four digits, zeros at the end kept, so that a column reads alike.

    >>> figure(2.03), figure(13.5), figure(8347.2), figure(0.25)
    ('2.030', '13.50', '8347', '0.2500')
    """
    return f"{value:#.4g}".rstrip(".")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, numbers on the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *([escape(row[0]), *row[1:]] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def list_names(names: Sequence[str]) -> str:
    """Return names as code, separated by commas."""
    return ", ".join(f"`{name}`" for name in names)
