"""Write a derived profile into params.yaml: the block is added at the end, nothing else is changed but `profile:`."""

from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

from ropeway.config.edit import read_exact, select_profile, write_exact
from ropeway.config.load_params import load_profiles
from ropeway.onboarding.derive import Entry
from ropeway.runtime.errors import ConfigError

_NULL = "tag:yaml.org,2002:null"
_WIDEST = 260  # characters of a mapping in flow style, which takes up to three lines
_WIDEST_LINE = 116


def render_profile(name: str, head: str, entries: Sequence[Entry]) -> str:
    """Return the block of a profile as YAML with the reasons as comments."""
    lines = [f"# {head}", f"{name}:"]
    for entry in entries:
        first, *more = _render_key(entry.key, entry.value, "  ")
        beside = f"{first:<34}  # {entry.why}"
        if entry.why and (more or len(beside) > _WIDEST_LINE):
            lines += [f"  # {entry.why}", first]
        else:
            lines.append(beside if entry.why else first)
        lines += more
    return "\n".join(lines) + "\n"


def _render_key(key: str, value: object, indent: str) -> list[str]:
    """Return the lines of a key: in flow style if that is short, else with a line per key of its mapping."""
    start, flow = f"{indent}{_flow(key)}: ", _flow(value)
    if len(start + flow) <= _WIDEST_LINE or not isinstance(value, dict):
        return [start + flow]
    if len(flow) > _WIDEST:
        nested = [line for name, part in value.items() for line in _render_key(name, part, indent + "  ")]
        return [start.rstrip(), *nested]
    lines = [start + "{"]
    for at, (name, part) in enumerate(value.items()):
        item = f"{_flow(name)}: {_flow(part)}" + ("," if at + 1 < len(value) else "}")
        if lines[-1].endswith(("{", "  ")):
            lines[-1] += item
        elif len(lines[-1]) + 1 + len(item) <= _WIDEST_LINE:
            lines[-1] += f" {item}"
        else:
            lines.append(f"{indent}  {item}")
    return lines


def _flow(value: object) -> str:
    """Return a value as YAML in one line."""
    yaml = YAML()
    yaml.width = 4096  # no line is broken
    yaml.default_flow_style = True
    yaml.representer.add_representer(type(None), lambda representer, _: representer.represent_scalar(_NULL, "null"))
    out = StringIO()
    yaml.dump({"k": value}, out)  # in a list, a mapping of one key would have no braces
    return out.getvalue().strip().removeprefix("{k: ").removesuffix("}")


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
