"""Stands before the package of this name, and loads it when it is first asked: its import builds grammars (1 s).

jsonschema imports it where it is installed, and Prefect imports jsonschema. The dev extra brings it, for the validation
of mlbom.cdx.json; nobody else has it, so that only the tests' Prefect processes would wait for it.
"""

import functools
import importlib
import sys
from pathlib import Path


def is_valid_syntax(term: str, value: str) -> bool:
    """Ask the package."""
    return bool(_load().is_valid_syntax(term, value))


@functools.cache
def _load():
    here, path, ours = str(Path(__file__).parent), sys.path, sys.modules.pop("rfc3987_syntax", None)
    sys.path = [one for one in path if one != here]
    try:
        return importlib.import_module("rfc3987_syntax")
    finally:
        sys.path = path
        if ours:
            sys.modules["rfc3987_syntax"] = ours
