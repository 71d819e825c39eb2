"""Check the text of a field."""

import re

from ropeway.stages.fetch.values import UnreadableError

SHOWN_NAME = 40  # characters of a name in a reason
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_text(value: object) -> str:
    """Return a field's text.

    Raises:
        UnreadableError: It is no text, or has characters that cannot be stored.
    """
    if value is None:
        raise UnreadableError("null text")
    if not isinstance(value, str):
        raise UnreadableError("not text")
    if "\0" in value:
        raise UnreadableError("NUL")
    if not value.isascii() and _SURROGATE.search(value):
        raise UnreadableError("lone surrogate")
    return value
