"""Read and validate params.yaml: YAML 1.2, every profile checked, all errors reported at once."""

from copy import deepcopy
from functools import lru_cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.reader import ReaderError

from ropeway.config.faults import explain_faults
from ropeway.config.params import Profile
from ropeway.config.presets import KEY, PresetError, find_origins, resolve_block, split_presets
from ropeway.config.sections import PROFILE_NAME
from ropeway.config.suggestion import unknown_name
from ropeway.config.yaml_limits import MAX_BYTES, BoundedComposer
from ropeway.runtime.errors import ConfigError


def load_profiles(path: Path, *, text: str | None = None) -> tuple[str, dict[str, Profile]]:
    """Return the selected profile's name and all profiles of a params file; `text` is its content if already read.

    Raises:
        ConfigError: The file is missing, is not YAML 1.2, or has invalid keys or values; all errors are listed at once.
    """
    tree = _read_yaml(path, text)
    if not isinstance(tree, dict) or not isinstance(tree.get("profile"), str):
        raise ConfigError(f"{path}: expected a mapping with a key `profile` that names one of its profiles")
    chosen = tree["profile"]
    blocks, presets = _split(path, tree)
    if chosen not in blocks:
        raise ConfigError(f"{path}: profile '{chosen}' {unknown_name(chosen, blocks)}")
    profiles, faults = {}, []
    for name, block in blocks.items():
        if not (isinstance(name, str) and PROFILE_NAME.fullmatch(name)) or ".." in name:
            faults.append(
                f"{path}: profile name {str(name)[:80]!r}: expected 1 to 64 of A-Z a-z 0-9 . _ -, e.g. laptop"
            )
            continue
        try:
            profiles[name] = TypeAdapter(Profile).validate_python(resolve_block(name, blocks, presets))
        except PresetError as error:
            faults += [f"{path}, profile '{name}':", f"  {error}"]
        except ValidationError as error:
            base = block.get(KEY) if isinstance(block, dict) else None
            hint = f" (with the values of its {KEY} {base})" if base else ""
            faults += [f"{path}, profile '{name}'{hint}:", *explain_faults(error, Profile)]
    if faults:
        raise ConfigError("\n".join(faults))
    return chosen, profiles


def load_profile(path: Path, name: str | None = None, *, text: str | None = None) -> tuple[str, Profile]:
    """Return (name, profile) of the requested profile, or of the one that the file selects.

    Raises:
        ConfigError: As in `load_profiles`, or the requested profile does not exist.
    """
    chosen, profiles = load_profiles(path, text=text)
    name = name or chosen
    if name not in profiles:
        raise ConfigError(f"{path}: profile '{name}' {unknown_name(name, profiles)}")
    return name, profiles[name]


def read_block(path: Path, profile: str) -> dict[str, object]:
    """Return a profile's keys and values as written in the file, with those of its presets.

    Raises:
        ConfigError: The profile or its preset does not exist.
    """
    tree = _read_yaml(path)
    blocks, presets = _split(path, tree if isinstance(tree, dict) else {})
    try:
        block = resolve_block(profile, blocks, presets) if profile in blocks else None
    except PresetError as error:
        raise ConfigError(f"{path}, profile '{profile}': {error}") from None
    if not isinstance(block, dict):
        raise ConfigError(f"{path}: profile '{profile}' {unknown_name(profile, blocks)}")
    return block


def list_presets(path: Path) -> list[str]:
    """Return the names of the presets in a params file."""
    tree = _read_yaml(path)
    return list(_split(path, tree if isinstance(tree, dict) else {})[1])


def resolve_preset(path: Path, preset: str) -> dict[str, object]:
    """Return the keys and values of a preset, with those of its own presets; empty if there is none."""
    tree = _read_yaml(path)
    blocks, presets = _split(path, tree if isinstance(tree, dict) else {})
    try:
        found = resolve_block("", {**blocks, "": {KEY: preset}}, presets)
    except PresetError as error:
        raise ConfigError(f"{path}: {error}") from None
    return dict(found) if isinstance(found, dict) else {}


def read_stated(path: Path, name: str) -> tuple[dict[str, object], dict[str, str]]:
    """Return (values, origins) of a profile or a preset, with those of its own presets.

    Origins are as in `ropeway.config.presets.find_origins`. The values of a preset alone need not be complete.

    Raises:
        ConfigError: There is neither a profile nor a preset of this name.
    """
    if name not in list_presets(path):
        read_block(path, name)  # it exists, and so do its presets
    tree = _read_yaml(path)
    profiles, presets = _split(path, tree if isinstance(tree, dict) else {})
    named = {**presets, **profiles}
    try:
        found, origins = resolve_block(name, named, {}), find_origins(name, named, {})
    except PresetError as error:
        raise ConfigError(f"{path}, '{name}': {error}") from None
    return (dict(found) if isinstance(found, dict) else {}), origins


def list_blocks(path: Path, text: str) -> list[dict[str, object]]:
    """Return the blocks of all profiles and presets as written in the text of a params file, in its order."""
    tree = _read_yaml(path, text)
    blocks, presets = _split(path, tree if isinstance(tree, dict) else {})
    return [block for block in (*blocks.values(), *presets.values()) if isinstance(block, dict)]


def _split(path: Path, tree: dict[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    try:
        return split_presets(tree)
    except PresetError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_text(path: Path) -> str:
    """Return the text of a params file.

    Raises:
        ConfigError: The file is missing or is not UTF-8.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ConfigError(f"{path}: {size:,} bytes, expected {MAX_BYTES:,} at most; a params file has some 10,000")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; run this inside a Ropeway workspace (a clone of the project)") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a folder, expected a params file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}. Save the file as UTF-8") from None


def _read_yaml(path: Path, text: str | None = None) -> object:
    """Read YAML 1.2, as DVC does. PyYAML reads 1.1, where `1e-5` is text and `on` is true."""
    text = read_text(path) if text is None else text
    try:
        return deepcopy(_parse(text))
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{path}:{line}: expected printable text, found {text[error.position]!r}; remove it"
        ) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else path
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{where}: not valid YAML 1.2: {problem}. Correct that line") from None
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML 1.2: {error}") from None


class _MarkingConstructor(SafeConstructor):
    """Reports the line of a value that matches a type's pattern but is not valid, e.g. the date 2024-13-45.

    It also refuses a key that a mapping with `<<:` has twice, which ruamel (0.18) accepts, the last one winning.
    """

    def flatten_mapping(self, node: MappingNode) -> object:
        """Merge what `<<:` names into a mapping, which may override it but not repeat itself."""
        first: dict[str, Node] = {}
        keys = [key for key, _ in node.value if isinstance(key, ScalarNode)]
        for key in keys if getattr(node, "merge", None) is None else ():  # else merged before
            if (known := first.setdefault(key.value, key)) is not key:
                problem = f"found the key {key.value!r} twice, first in line {known.start_mark.line + 1}; remove one"
                raise MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().flatten_mapping(node)

    def construct_object(self, node: Node, deep: bool = False) -> object:  # noqa: FBT001, FBT002 - ruamel's signature
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, TypeError) as error:
            raise MarkedYAMLError(problem=f"{node.value!r}: {error}", problem_mark=node.start_mark) from None


@lru_cache(maxsize=4)  # a command reads the file more than once, and pure Python takes 0.1 s for it
def _parse(text: str) -> object:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor, yaml.Composer = _MarkingConstructor, BoundedComposer
    return yaml.load(text)
