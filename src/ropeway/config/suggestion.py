"""The nearest known name for an error message about an unknown one."""

import difflib
from collections.abc import Iterable

_MAX_LISTED = 12


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known one, and all if they are few.

    >>> suggest("laptpo", ["laptop", "smollm2"])
    '; did you mean laptop? Known: laptop, smollm2'
    >>> suggest("x", [])
    '; none is known'
    """
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, names, n=1)
    listed = f"Known: {', '.join(names[:_MAX_LISTED])}" + (", …" if len(names) > _MAX_LISTED else "")
    if near:
        return f"; did you mean {near[0]}? {listed}"
    return f". {listed}" if names else "; none is known"
