"""Whether a new profile can have a name; imports nothing that takes long."""

from pathlib import Path

from ruamel.yaml import YAML

from ropeway.config.load_params import list_presets, load_profiles
from ropeway.config.presets import SECTION
from ropeway.config.sections import PROFILE_NAME
from ropeway.runtime.errors import ConfigError


def check_profile_name(path: Path, name: str) -> None:
    """Raise ConfigError unless params.yaml at `path` is valid and can have a new profile of this name."""
    if not PROFILE_NAME.fullmatch(name):
        raise ConfigError(f"{name!r}: expected a profile name of A-Z a-z 0-9 . _ -, e.g. my_model")
    if name in ("profile", SECTION) or not isinstance(YAML(typ="safe", pure=True).load(name), str):
        raise ConfigError(f"{name!r}: YAML or params.yaml reads this as something else; choose another name")
    profiles = load_profiles(path)[1]
    if name in list_presets(path):
        raise ConfigError(f"{name!r} is the name of a preset; choose another name")
    if name in profiles:
        raise ConfigError(f"{path}: there is a profile '{name}'; choose another name, or remove its block")
