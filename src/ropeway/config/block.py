"""A run's block of params.yaml as its author wrote it, comments and order included, as text that stands alone."""

import re
from pathlib import Path

from ropeway.config.params import read_block
from ropeway.runtime.errors import ConfigError

_KEY = re.compile(r"""^(["']?)(?P<key>[\w.-]+)\1\s*:""")
_ANCHOR = re.compile(r"^[^#]*?:\s*&(?P<anchor>[\w.-]+)")
_MERGE = re.compile(r"^\s+<<:\s*\*(?P<anchor>[\w.-]+)", re.MULTILINE)


def cut_block(text: str, name: str) -> str:
    r"""Return the lines of a top-level key, with the comment right above it.

    >>> print(cut_block("a: 1\n\n# Why.\nb:   # it\n  c: 2\n\n# Next.\nd: 3\n", "b"), end="")
    # Why.
    b:   # it
      c: 2
    """
    lines = text.splitlines()
    begin = next(at for at, line in enumerate(lines) if (found := _KEY.match(line)) and found["key"] == name)
    end = next((at for at in range(begin + 1, len(lines)) if lines[at][:1] not in ("", " ", "#")), len(lines))
    while end > begin + 1 and lines[end - 1][:1] in ("", "#"):  # they belong to what follows
        end -= 1
    while begin and lines[begin - 1].startswith("#"):
        begin -= 1
    return "\n".join(lines[begin:end]) + "\n"


def inherited_names(text: str, name: str) -> list[str]:
    """Return the top-level keys whose values a block merges, those first that others merge."""
    owners = {found["anchor"]: line for line in text.splitlines() if (found := _ANCHOR.match(line))}
    names: list[str] = []
    for merge in _MERGE.finditer(cut_block(text, name)):
        found = _KEY.match(owners[merge["anchor"]])
        if found:
            names += [*inherited_names(text, found["key"]), found["key"]]
    return list(dict.fromkeys(names))


def write_blocks(params: Path, name: str, target: Path) -> None:
    """Write a profile's block, after those it inherits from, as they stand in params.yaml; then read them back.

    Raises:
        ConfigError: Cut out it means something else than in the file, e.g. by an alias below its first level.
    """
    text = params.read_text(encoding="utf-8")
    target.write_text("\n".join(cut_block(text, one) for one in (*inherited_names(text, name), name)), encoding="utf-8")
    try:
        equal = read_block(target, name) == read_block(params, name)
    except ConfigError:
        equal = False
    if not equal:
        raise ConfigError(
            f"{params}: the block of '{name}' means something else when it is cut out; write it as one top-level "
            "mapping that takes from others by `<<: *name` alone"
        )
