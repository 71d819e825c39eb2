"""Patterns as `glob` reads them, held against names that are in no file system."""

import re

_SPECIAL = re.compile(r"(?P<folders>\*\*/)|(?P<rest>\*\*)|(?P<part>\*)|(?P<one>\?)|\[(?P<set>!?[^\]]+)\]")
_MEANINGS = {"folders": r"(?:[^/]+/)*", "rest": r".*", "part": r"[^/]*", "one": r"[^/]"}
MAGIC = "*?["


def is_glob(pattern: str) -> bool:
    """Return whether a pattern can name more than one thing."""
    return any(sign in pattern for sign in MAGIC)


def match_names(patterns: list[str], names: list[str]) -> dict[str, list[str]]:
    """Return for each pattern the names it matches, in their order; `*` stays in its folder, `**/` is any or none.

    >>> match_names(["**/*.parquet"], ["a.parquet", "x/y/b.parquet", "c.json"])
    {'**/*.parquet': ['a.parquet', 'x/y/b.parquet']}
    """
    return {pattern: [name for name in names if _expression(pattern).fullmatch(name)] for pattern in patterns}


def _expression(pattern: str) -> re.Pattern[str]:
    made, at = "", 0
    for found in _SPECIAL.finditer(pattern):
        signs = found["set"] and f"[{re.sub('^!', '^', found['set'])}]"
        made += re.escape(pattern[at : found.start()]) + (signs or _MEANINGS[found.lastgroup or ""])
        at = found.end()
    return re.compile(made + re.escape(pattern[at:]), re.DOTALL)
