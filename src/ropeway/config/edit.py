"""params.yaml as text: one-line edits that a command makes for a person, and a run's block cut out as written."""

import os
import re
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from ropeway.config.load_params import load_profile, load_profiles, read_block
from ropeway.config.params import RUN
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.lock import workspace_lock

_MERGE = "<<"


def read_pairs(text: str) -> list[tuple[Node, Node]]:
    """Return the (key, value) nodes of a file's first level; each knows where in the text it begins and ends.

    An alias is the very node of its anchor.
    """
    tree: MappingNode = YAML(typ="rt", pure=True).compose(text)
    return list(tree.value)


def choose_profile(root: Path, name: str) -> None:
    """Make params.yaml name this profile: its line `profile:` alone is edited, and it stays so.

    Raises:
        ConfigError: The line is not where an edit of one line can reach it.
    """
    path = root / "params.yaml"
    text = path.read_text(encoding="utf-8")
    if load_profile(path)[0] == name:
        return
    key, value = next(pair for pair in read_pairs(text) if pair[0].value == "profile")
    if value.start_mark.index < key.end_mark.index:
        raise ConfigError(f"{path}: the value of `profile` is an alias; write the profile's name there")
    path.write_text(_replace(text, value, name), encoding="utf-8")
    print(f"params.yaml: profile is {name} now, and stays so", flush=True)


def resume_from(root: Path, profile: str | None, run: str) -> None:
    """Write `resume_from` into a profile's block (that of the chosen profile if None); it stays there.

    Raises:
        ConfigError: Not of that form, or the block cannot be edited without changing another.
        TemporaryError: A run holds the workspace.
    """
    path = root / "params.yaml"
    if not re.fullmatch(RUN, run):
        raise ConfigError(f"--resume-from: expected FINGERPRINT or FINGERPRINT@STEP, 16 hex digits, found {run!r}")
    name, chosen = load_profile(path, profile)
    if chosen.resume_from == run:
        return
    with workspace_lock(root, command="ropeway run --resume-from", profile=name):
        tried = path.with_name(f".params.{os.getpid()}.partial")
        try:
            tried.write_text(set_resume_from(path.read_text(encoding="utf-8"), name, run), encoding="utf-8")
            old, new = (load_profiles(one)[1] for one in (path, tried))
            if new != old | {name: old[name].model_copy(update={"resume_from": run})}:
                raise ConfigError(
                    f"{path}: writing resume_from into '{name}' would change other profiles, which inherit it; give "
                    "each a line `resume_from: null` of its own"
                )
            tried.replace(path)
        finally:
            tried.unlink(missing_ok=True)
    print(
        f"params.yaml: resume_from of {name} is {run} now, and stays so; null trains from the beginning again",
        flush=True,
    )


def set_resume_from(text: str, profile: str, run: str) -> str:
    r"""Return the text of params.yaml with the value of a block's `resume_from` replaced, or the line added.

    >>> print(set_resume_from("a:\n  resume_from: null  # why\nb: 1\n", "a", "00ff@12"), end="")
    a:
      resume_from: "00ff@12"  # why
    b: 1
    >>> print(set_resume_from("a: &x\n  b: 1\n", "a", "00ff"), end="")
    a: &x
      resume_from: "00ff"
      b: 1
    """
    block = {key.value: value for key, value in read_pairs(text)}[profile]
    stated = next((value for key, value in block.value if key.value == "resume_from"), None)
    if stated is not None:
        return _replace(text, stated, f'"{run}"')  # quoted: digits alone would be a number
    first = block.value[0][0].start_mark
    apart = ", " if isinstance(block, MappingNode) and block.flow_style else "\n" + " " * first.column
    return f'{text[: first.index]}resume_from: "{run}"{apart}{text[first.index :]}'


def _replace(text: str, node: Node, value: str) -> str:
    return text[: node.start_mark.index] + value + text[node.end_mark.index :]


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
