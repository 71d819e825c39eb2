"""Write a derived profile into params.yaml: the block is added at the end, nothing else is changed but `profile:`."""

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from ropeway.config.edit import read_exact, select_profile, write_exact
from ropeway.config.load_params import load_profiles
from ropeway.onboarding.derive import Entry
from ropeway.runtime.errors import ConfigError

_NULL = "tag:yaml.org,2002:null"
_WIDEST = 100  # characters of a mapping in one line
_WIDEST_LINE = 116  # with its comment, which else is on a line above


def render_profile(name: str, head: str, entries: Sequence[Entry]) -> str:
    """Return the block of a profile as YAML with the reasons as comments."""
    block = CommentedMap()
    for entry in entries:
        block[entry.key] = _to_yaml(entry.value)
    yaml = YAML()
    yaml.width = 4096  # no line is broken
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), lambda representer, _: representer.represent_scalar(_NULL, "null"))
    out = StringIO()
    yaml.dump({name: block}, out)
    lines = [f"# {head}", *out.getvalue().splitlines()]
    reasons = {f"  {entry.key}:": entry.why for entry in entries if entry.why}
    return "\n".join(_comment(line, reasons) for line in lines) + "\n"


def _comment(line: str, reasons: dict[str, str]) -> str:
    key = line.partition(":")[0] + ":"
    why = reasons.pop(key, "") if line.startswith("  ") and line[2:3].strip() else ""
    beside = f"{line:<34}  # {why}"
    return beside if why and len(beside) <= _WIDEST_LINE else f"  # {why}\n{line}" if why else line.rstrip()


def _to_yaml(value: object) -> object:
    """Return a value whose short parts are written in one line."""
    is_short = len(json.dumps(value)) <= _WIDEST
    if isinstance(value, dict):
        mapping = CommentedMap({key: _to_yaml(one) for key, one in value.items()})
        if is_short:
            mapping.fa.set_flow_style()
        return mapping
    if isinstance(value, list):
        sequence = CommentedSeq([_to_yaml(one) for one in value])
        if is_short:
            sequence.fa.set_flow_style()
        return sequence
    return value


def add_profile(path: Path, name: str, block: str) -> None:
    """Add a block to params.yaml and select it; the file is only replaced if every profile in it is valid.

    Raises:
        ConfigError: The name is in use, or the profile is not valid.
    """
    text = read_exact(path)
    _, profiles = load_profiles(path, text=text)
    if name in profiles:
        raise ConfigError(f"{path}: there is a profile '{name}'; choose another name, or remove its block")
    end = "\r\n" if "\r\n" in text else "\n"
    changed = select_profile(path, text, name).rstrip("\r\n") + end * 2 + block.replace("\n", end)
    _, now = load_profiles(path, text=changed)
    if {other: now[other] for other in profiles} != profiles:
        raise ConfigError(f"{path}: adding '{name}' would change another profile; nothing was written")
    write_exact(path, changed)
