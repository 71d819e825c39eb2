"""The nearest known name, for an error message about an unknown one."""

import difflib
from collections.abc import Iterable

_CUTOFF = 0.7  # similarity of a suggestion; at difflib's 0.6 `nowhere` suggests `other`


def did_you_mean(name: str, known: Iterable[str], *, count: int = 1) -> str:
    """Return the part of a message that names the nearest known names; empty if none is near.

    >>> did_you_mean("laptpo", ["laptop", "smollm2"]), did_you_mean("x", ["laptop"])
    ('; did you mean laptop?', '')
    """
    near = difflib.get_close_matches(name, list(dict.fromkeys(map(str, known))), n=count, cutoff=_CUTOFF)
    return f"; did you mean {', '.join(near)}?" if near else ""


def unknown_name(name: str, known: Iterable[str], *, listed: str = "available") -> str:
    """Return the end of a message about a name that does not exist: the nearest known one, then all of them.

    >>> unknown_name("laptpo", ["laptop", "smollm2"])
    'does not exist; did you mean laptop? Available: laptop, smollm2'
    >>> unknown_name("x", ["laptop"]), unknown_name("x", [])
    ('does not exist; available: laptop', 'does not exist; available: none')
    """
    names = list(dict.fromkeys(map(str, known)))
    near = did_you_mean(name, names)
    label = f" {listed.capitalize()}" if near else f"; {listed}"
    return f"does not exist{near}{label}: {', '.join(names) or 'none'}"
