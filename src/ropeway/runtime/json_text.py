"""Parse JSON that somebody else wrote: Python's parser answers deep nesting with a RecursionError, not a ValueError.

A document that Python can just parse exhausts the stack of whatever walks over it next, so the limit is far below
Python's. Numbers are limited by Python itself: an integer has at most 4,300 digits.
"""

import json
from pathlib import Path
from typing import Any

from ropeway.runtime.errors import DataError

MAX_DEPTH = 100  # nested lists and objects; config.json, manifests and tool schemas have up to 20


def parse_json(data: str | bytes) -> Any:  # noqa: ANN401 - JSON
    """Return the value of a JSON document.

    Raises:
        ValueError: It is not JSON, has an integer of too many digits, or is nested deeper than `MAX_DEPTH`.
    """
    try:
        value = json.loads(data)
    except RecursionError:
        raise _too_deep() from None
    if _count_opened(data) > MAX_DEPTH and is_too_deep(value):
        raise _too_deep()
    return value


def read_json(path: Path, *, remedy: str) -> Any:  # noqa: ANN401 - JSON
    """Return the value of a JSON file.

    Args:
        path: The file.
        remedy: Sentence of the error message that says what to do.

    Raises:
        DataError: The file is missing, or as in `parse_json`.
    """
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a JSON document ({error}). {remedy}") from None


def is_too_deep(value: object) -> bool:
    """Return whether lists and objects are nested deeper than `MAX_DEPTH`.

    >>> is_too_deep([[1], {"a": [2]}])
    False
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level for inner in _items(outer) if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _count_opened(data: str | bytes) -> int:
    """Return how many brackets a document opens, those in its strings included: at least its depth."""
    if isinstance(data, str):
        return data.count("[") + data.count("{")
    return data.count(b"[") + data.count(b"{")


def _items(value: object) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _too_deep() -> ValueError:
    return ValueError(f"more than {MAX_DEPTH} nested lists or objects")
