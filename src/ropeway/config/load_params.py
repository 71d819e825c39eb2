"""How params.yaml is read: as YAML 1.2, all its profiles checked, all faults named at once."""

from copy import deepcopy
from functools import lru_cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from ropeway.config.faults import explain_faults
from ropeway.config.params import PROFILE_NAME, Profile
from ropeway.runtime.errors import ConfigError


def load_profiles(path: Path, *, text: str | None = None) -> tuple[str, dict[str, Profile]]:
    """Return the name of the chosen profile and every profile of a params file; `text` spares reading it again.

    Raises:
        ConfigError: The file is missing, is not YAML 1.2, or does not describe runs; all faults are listed at once.
    """
    tree = _read_yaml(path, text)
    if not isinstance(tree, dict) or not isinstance(tree.get("profile"), str):
        raise ConfigError(f"{path}: expected a mapping with a key `profile` that names one of its runs")
    chosen = tree.pop("profile")
    if chosen not in tree:
        raise ConfigError(f"{path}: profile '{chosen}' does not exist; there are: {', '.join(tree)}")
    profiles, faults = {}, []
    for name, block in tree.items():
        if not (isinstance(name, str) and PROFILE_NAME.fullmatch(name)) or ".." in name:
            faults.append(
                f"{path}: profile name {str(name)[:80]!r}: expected 1 to 64 of A-Z a-z 0-9 . _ -, e.g. laptop"
            )
            continue
        try:
            profiles[name] = TypeAdapter(Profile).validate_python(block)
        except ValidationError as error:
            faults += [f"{path}, profile '{name}':", *explain_faults(error, Profile)]
    if faults:
        raise ConfigError("\n".join(faults))
    return chosen, profiles


def load_profile(path: Path, name: str | None = None, *, text: str | None = None) -> tuple[str, Profile]:
    """Return (name, profile): the one asked for, else the file's chosen one.

    Raises:
        ConfigError: As in `load_profiles`, or the profile asked for does not exist.
    """
    chosen, profiles = load_profiles(path, text=text)
    name = name or chosen
    if name not in profiles:
        raise ConfigError(f"{path}: profile '{name}' does not exist; there are: {', '.join(profiles)}")
    return name, profiles[name]


def read_block(path: Path, profile: str) -> dict[str, object]:
    """Return a profile's keys and values as the file states them; ConfigError where there is no such profile."""
    tree = _read_yaml(path)
    block = tree.get(profile) if isinstance(tree, dict) else None
    if not isinstance(block, dict):
        raise ConfigError(f"{path}: profile '{profile}' does not exist")
    return block


def read_text(path: Path) -> str:
    """Return the text of a params file.

    Raises:
        ConfigError: It is missing or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; run this inside a Ropeway workspace (a clone of the project)") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not readable as YAML 1.2: {error}") from None


def _read_yaml(path: Path, text: str | None = None) -> object:
    """Read YAML 1.2, as DVC does. PyYAML reads 1.1, where `1e-5` is text and `on` is true."""
    try:
        return deepcopy(_parse(read_text(path) if text is None else text))
    except MarkedYAMLError as error:
        raise ConfigError(f"{path}: not readable as YAML 1.2: {error}") from None


@lru_cache(maxsize=4)  # a command reads the file more than once, and pure Python takes 0.1 s for it
def _parse(text: str) -> object:
    return YAML(typ="safe", pure=True).load(text)
