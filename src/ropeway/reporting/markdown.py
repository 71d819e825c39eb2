"""Markdown from values: tables whose cells cannot break them, whoever wrote the words in them."""

from collections.abc import Mapping, Sequence

_MOST_CHARACTERS = 700
_ESCAPED = {
    "\\": "\\\\",
    "|": "\\|",
    "<": "&lt;",
    ">": "&gt;",
    "`": "\\`",
    "*": "\\*",
    "_": "\\_",
    "[": "\\[",
    "]": "\\]",
}


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows of equal keys as a markdown table; nothing for none. Cells are markdown already."""
    if not rows:
        return ""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([row.get(head, "") for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(words: object) -> str:
    r"""Return words as a cell shows them: no markup acts, a line's end is ⏎, long ones are cut.

    >>> plain("a|b\n<script>")
    'a\\|b ⏎ &lt;script&gt;'
    """
    text = str(words)
    cut = len(text) > _MOST_CHARACTERS
    text = " ⏎ ".join(line.strip() for line in text[:_MOST_CHARACTERS].strip().splitlines())
    text = "".join(_ESCAPED.get(c, c if c.isprintable() else repr(c)[1:-1].replace("\\", "\\\\")) for c in text)
    return text + (" … (longer)" if cut else "")


def code(words: object) -> str:
    """Return words in code style, inside a cell or out of it."""
    text = "".join(c if c.isprintable() else "?" for c in str(words)).replace("`", "'")
    return f"`{text}`" if text else ""


def fence(words: str) -> str:
    """Return a block of code."""
    return f"```\n{words}\n```"
