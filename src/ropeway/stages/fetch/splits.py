"""Which split of a data set a file's name says it is: a pattern that reads a test split among others is a mistake."""

import re
from collections.abc import Iterable

from ropeway.runtime.errors import ConfigError

TRAIN = "train"
_NAMES = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "heldout", "holdout"),
}
_WORD = re.compile(r"[a-z]+")
_SHOWN = 3


def split_of(name: str) -> str | None:
    """Return the split that a path names in one of its parts, the last one that does; None where none does.

    >>> split_of("data/test-00000-of-00002.parquet"), split_of("train/latest.jsonl"), split_of("talks.jsonl")
    ('test', 'train', None)
    """
    words = _WORD.findall(name.lower())
    return next((split for word in reversed(words) for split, known in _NAMES.items() if word in known), None)


def check_splits(pattern: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise ConfigError when a pattern spans several splits, or a test or validation split and files without a name.

    Args:
        pattern: As params have it.
        names: The files that it matches.
        allowed: The splits that params name under `splits`: these may be read together.
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
