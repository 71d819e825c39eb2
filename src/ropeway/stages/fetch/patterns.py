"""Match glob patterns against names of remote files, and check which dataset splits the matched files belong to.

Reading a test split together with others is almost always a mistake, so it must be stated.
"""

import re
from collections.abc import Iterable

from ropeway.runtime.errors import ConfigError

_SPECIAL = re.compile(r"(?P<folders>\*\*/)|(?P<rest>\*\*)|(?P<part>\*)|(?P<one>\?)|\[(?P<set>!?[^\]]+)\]")
_REGEX = {"folders": r"(?:[^/]+/)*", "rest": r".*", "part": r"[^/]*", "one": r"[^/]"}
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
    """Return whether a pattern has wildcards."""
    return any(sign in pattern for sign in MAGIC)


def match_names(patterns: list[str], names: list[str]) -> dict[str, list[str]]:
    """Return the names that each pattern matches, in their order; `*` stops at `/`, `**/` is any number of folders.

    >>> match_names(["**/*.parquet"], ["a.parquet", "x/y/b.parquet", "c.json"])
    {'**/*.parquet': ['a.parquet', 'x/y/b.parquet']}
    """
    return {pattern: [name for name in names if _compile_pattern(pattern).fullmatch(name)] for pattern in patterns}


def _compile_pattern(pattern: str) -> re.Pattern[str]:
    made, at = "", 0
    for found in _SPECIAL.finditer(pattern):
        signs = found["set"] and f"[{re.sub('^!', '^', found['set'])}]"
        made += re.escape(pattern[at : found.start()]) + (signs or _REGEX[found.lastgroup or ""])
        at = found.end()
    return re.compile(made + re.escape(pattern[at:]), re.DOTALL)


def split_of(name: str) -> str | None:
    """Return the split that the last matching word of a path names; None if no word does.

    >>> split_of("data/test-00000-of-00002.parquet"), split_of("train/latest.jsonl"), split_of("talks.jsonl")
    ('test', 'train', None)
    """
    words = _WORD.findall(name.lower())
    return next((split for word in reversed(words) for split, known in _NAMES.items() if word in known), None)


def check_splits(pattern: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise ConfigError if a pattern matches several splits, or a test or validation split and files of no split.

    The splits in `allowed` (`splits` of the source in params.yaml) may be read together.
    """
    found: dict[str | None, list[str]] = {}
    for name in names:
        found.setdefault(split_of(name), []).append(name)
    named = {split for split in found if split}
    if named <= set(allowed) or len(found) == 1 or found.keys() <= {None, TRAIN}:
        return
    listed = "; ".join(_list(split, some) for split, some in sorted(found.items(), key=lambda item: str(item[0])))
    raise ConfigError(
        f"sources: '{pattern}' matches files of several splits ({listed}). Name one split in the pattern, e.g. "
        f"train-*.jsonl; or set `splits: [{', '.join(sorted(named))}]` for this source to read them all"
    )


def _list(split: str | None, names: list[str]) -> str:
    more = len(names) - _SHOWN
    return f"{split or 'no split'}: {', '.join(sorted(names)[:_SHOWN])}" + (f" and {more} more" if more > 0 else "")
