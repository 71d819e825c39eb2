"""Markdown from values: text, tables and code that cannot break out of their place, whoever wrote the words in them."""

import re
from collections.abc import Mapping, Sequence

_MOST_CHARACTERS = 700
_ESCAPED = {"<": "&lt;", ">": "&gt;", **{mark: f"\\{mark}" for mark in "\\|`*_{}[]#~$"}}


def table(rows: Sequence[Mapping[str, str]], *, numbers: bool = False) -> str:
    """Return rows of Markdown cells as a table, its columns those of the first row; `numbers` are set to the right."""
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
    r"""Return words on one line as Markdown shows them verbatim; a line's end is ⏎, unprintable characters are named.

    >>> escape("a|b\n<script>")
    'a\\|b ⏎ &lt;script&gt;'
    """
    text = " ⏎ ".join(str(words).splitlines())
    return "".join(_ESCAPED.get(c, c if c.isprintable() else repr(c)[1:-1].replace("\\", "\\\\")) for c in text)


def plain(words: object) -> str:
    """Return words as `escape` does, long ones cut, for a cell of a table."""
    text = "\n".join(line.strip() for line in str(words).strip().splitlines())
    return escape(text[:_MOST_CHARACTERS]) + (" … (longer)" if len(text) > _MOST_CHARACTERS else "")


def code(words: object) -> str:
    """Return words in code style, inside a cell or out of it."""
    text = "".join(c if c.isprintable() else "?" for c in str(words)).replace("`", "'")
    return f"`{text}`" if text else ""


def fence(words: str, language: str = "") -> str:
    r"""Return a block of code whose fence is longer than any in the text; characters no encoding has are named.

    >>> fence("x")
    '```\nx\n```'
    """
    longest = max((len(run) for run in re.findall(r"`{3,}", words)), default=2)
    bars = "`" * (longest + 1)
    text = words.rstrip().encode("utf-8", "backslashreplace").decode()
    return f"{bars}{language}\n{text}\n{bars}"
