"""Patterns as `glob` reads them, matched against names in no file system, and the splits that matched files belong to.

A pattern that reads a test split among others is a mistake.
"""

import re
from collections.abc import Iterable

from ropeway.runtime.errors import ConfigError

_SPECIAL = re.compile(r"(?P<folders>\*\*/)|(?P<rest>\*\*)|(?P<part>\*)|(?P<one>\?)|\[(?P<set>!?[^\]]+)\]")
_MEANINGS = {"folders": r"(?:[^/]+/)*", "rest": r".*", "part": r"[^/]*", "one": r"[^/]"}
MAGIC = "*?["
TRAIN = "train"
_NAMES = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "heldout", "holdout"),
}
_WORD = re.compile(r"[a-z]+")
_SHOWN = 3


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


def split_of(name: str) -> str | None:
    """Return the split that a path names in one of its parts, the last one that does; None where none does.

    >>> split_of("data/test-00000-of-00002.parquet"), split_of("train/latest.jsonl"), split_of("talks.jsonl")
    ('test', 'train', None)
    """
    words = _WORD.findall(name.lower())
    return next((split for word in reversed(words) for split, known in _NAMES.items() if word in known), None)


def check_splits(pattern: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise ConfigError when a pattern spans several splits, or a test or validation split and files without a name.

    Those of `splits` in params, `allowed`, may be read together.
    """
    found: dict[str | None, list[str]] = {}
    for name in names:
        found.setdefault(split_of(name), []).append(name)
    stated = {split for split in found if split}
    if stated <= set(allowed) or len(found) == 1 or found.keys() <= {None, TRAIN}:
        return
    listed = "; ".join(_list(split, some) for split, some in sorted(found.items(), key=lambda item: str(item[0])))
    raise ConfigError(
        f"sources: '{pattern}' reads files of several splits ({listed}). Name one split in the pattern, as in "
        f"train-*.jsonl; or state `splits: [{', '.join(sorted(stated))}]` beside it to read them all"
    )


def _list(split: str | None, names: list[str]) -> str:
    more = len(names) - _SHOWN
    return f"{split or 'no split'}: {', '.join(sorted(names)[:_SHOWN])}" + (f" and {more} more" if more > 0 else "")
