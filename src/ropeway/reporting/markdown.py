"""Markdown from untrusted values: escaped text, tables and code blocks."""

import re
from collections.abc import Mapping, Sequence

_MOST_CHARACTERS = 700
_ESCAPED = {"<": "&lt;", ">": "&gt;", **{mark: f"\\{mark}" for mark in "\\|`*_{}[]#~$"}}


def table(rows: Sequence[Mapping[str, str]], *, numbers: bool = False) -> str:
    """Return rows of Markdown cells as a table; columns are those of the first row; `numbers` right-aligns them."""
    if not rows:
        return ""
    heads = list(rows[0])
    lines = [
        heads,
        ["---", *(["---:" if numbers else "---"] * (len(heads) - 1))],
        *([row.get(head, "") for head in heads] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(words: object) -> str:
    r"""Return text escaped on one line; a newline becomes ⏎, unprintable characters their escape.

    >>> escape("a|b\n<script>")
    'a\\|b ⏎ &lt;script&gt;'
    """
    text = " ⏎ ".join(str(words).splitlines())
    return "".join(_ESCAPED.get(c, c if c.isprintable() else repr(c)[1:-1].replace("\\", "\\\\")) for c in text)


def plain(words: object) -> str:
    """Return text escaped as by `escape` and truncated, for a table cell."""
    text = "\n".join(line.strip() for line in str(words).strip().splitlines())
    return escape(text[:_MOST_CHARACTERS]) + (" … (longer)" if len(text) > _MOST_CHARACTERS else "")


def code(words: object) -> str:
    r"""Return text as inline code, also valid in a table cell, which a bare `|` would end in the middle of the code.

    >>> code("a|b")
    '`a\\|b`'
    """
    text = "".join(c if c.isprintable() else "?" for c in str(words)).replace("`", "'").replace("|", "\\|")
    return f"`{text}`" if text else ""


def fence(words: str, language: str = "") -> str:
    r"""Return a code block with a fence longer than any in the text; lone surrogates become escapes.

    >>> fence("x")
    '```\nx\n```'
    """
    longest = max((len(run) for run in re.findall(r"`{3,}", words)), default=2)
    bars = "`" * (longest + 1)
    text = words.rstrip().encode("utf-8", "backslashreplace").decode()
    return f"{bars}{language}\n{text}\n{bars}"
