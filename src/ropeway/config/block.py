"""A run's block of params.yaml as its author wrote it, comments and order included, as text that stands alone."""

from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from ropeway.config.params import read_block
from ropeway.runtime.errors import ConfigError

_MERGE = "<<"


def read_pairs(text: str) -> list[tuple[Node, Node]]:
    """Return the (key, value) nodes of a file's first level; each knows where in the text it begins and ends.

    An alias is the very node of its anchor.
    """
    tree: MappingNode = YAML(typ="rt", pure=True).compose(text)
    return list(tree.value)


def cut_block(text: str, name: str) -> str:
    r"""Return the lines of a top-level key, with the comment right above it.

    >>> print(cut_block("a: 1\n\n# Why.\nb:   # it\n  c: 2\n\n# Next.\nd: 3\n", "b"), end="")
    # Why.
    b:   # it
      c: 2
    """
    lines = text.splitlines()
    keys = [key for key, _ in read_pairs(text)]
    at = next(number for number, key in enumerate(keys) if key.value == name)
    begin = keys[at].start_mark.line
    end = keys[at + 1].start_mark.line if at + 1 < len(keys) else len(lines)
    while end > begin + 1 and lines[end - 1][:1] in ("", "#"):  # they belong to what follows
        end -= 1
    while begin and lines[begin - 1].startswith("#"):
        begin -= 1
    return "\n".join(lines[begin:end]) + "\n"


def inherited_names(text: str, name: str) -> list[str]:
    """Return the top-level keys whose values a block merges, those first that others merge."""
    blocks = {key.value: value for key, value in read_pairs(text)}
    names: list[str] = []
    merges = [value for key, value in blocks[name].value if key.value == _MERGE]
    for merged in (one for value in merges for one in (value.value if isinstance(value, SequenceNode) else [value])):
        for owner in (one for one, block in blocks.items() if block is merged):
            names += [*inherited_names(text, owner), owner]
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
