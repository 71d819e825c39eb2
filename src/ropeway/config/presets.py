"""Presets: values that profiles of params.yaml share. `preset: NAME` in a profile names a preset, or another profile.

A key that the profile states replaces the preset's; `resume_from` is never taken from a preset. The sections in
`MERGED_SECTIONS` are merged key by key, so that a profile states only what it changes in them. Presets are in
params.yaml, so that the file alone pins a run. Unlike with YAML's `<<`, no value is shared: `dvc exp run -S` on one
profile does not change another.
"""

from collections.abc import Iterator, Mapping

from ropeway.config.suggestion import unknown_name

KEY, SECTION = "preset", "presets"
OWN_KEY = "resume_from"  # of a profile: what another run continues from is nothing to inherit
MERGED_SECTIONS = ("stop", "duplicates", "contamination", "evaluation", "gate", "package", "card")

Block = Mapping[str, object]


class PresetError(ValueError):
    """A profile or preset cannot be resolved; the message says why."""


def split_presets(tree: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Return (profiles, presets) of a params file.

    Raises:
        PresetError: `presets` is not a mapping of mappings.
    """
    profiles = {name: block for name, block in tree.items() if name not in ("profile", SECTION)}
    presets = tree.get(SECTION) or {}
    if not isinstance(presets, Mapping) or not all(isinstance(block, Mapping) for block in presets.values()):
        raise PresetError(f"{SECTION}: expected a mapping of names to mappings of keys")
    return profiles, dict(presets)


def resolve_block(name: str, profiles: Mapping[str, object], presets: Mapping[str, object]) -> object:
    """Return a profile's block with the values of its presets; what is not a mapping is returned as it is.

    Raises:
        PresetError: A preset does not exist, is not a mapping, or is based on itself.
    """
    block = profiles[name]
    if not isinstance(block, Mapping):
        return block
    merged: dict[str, object] = {}
    for one in reversed([block, *(known for _, known in iterate_presets(name, profiles, presets))]):
        merged = merge_blocks(merged, one)
    return {**merged, OWN_KEY: block.get(OWN_KEY)} if KEY in block else merged


def iterate_presets(
    name: str, profiles: Mapping[str, object], presets: Mapping[str, object]
) -> Iterator[tuple[str, Block]]:
    """Yield (name, block) of the presets of a profile, the nearest first.

    Raises:
        PresetError: As in `resolve_block`.
    """
    known = {**profiles, **presets}
    block, seen = profiles[name], [] if name in presets else [name]
    while isinstance(block, Mapping) and block.get(KEY) is not None:
        base = block[KEY]
        if not isinstance(base, str) or base not in known:
            raise PresetError(
                f"{KEY}: {base!r} {unknown_name(str(base), [*presets, *(one for one in profiles if one != name)])}"
            )
        if base in seen:
            raise PresetError(f"{KEY}: {' -> '.join([*seen, base])} is a circle; remove one of these")
        block = known[base]
        if not isinstance(block, Mapping):
            raise PresetError(f"{KEY}: {base} is not a mapping of keys")
        seen.append(base)
        yield base, block


def find_origins(name: str, profiles: Mapping[str, object], presets: Mapping[str, object]) -> dict[str, str]:
    """Return key -> the profile or preset that states it, of sections that are merged `section.key` -> the same."""
    own = profiles[name]
    chain = [(name, own if isinstance(own, Mapping) else {}), *iterate_presets(name, profiles, presets)]
    origins: dict[str, str] = {}
    for owner, block in reversed(chain):
        for key, value in block.items():
            if key in MERGED_SECTIONS and isinstance(value, Mapping):
                origins |= {f"{key}.{inner}": owner for inner in value}
            elif key != KEY:
                origins[key] = owner
    if KEY in chain[0][1]:
        origins[OWN_KEY] = name
    return origins


def merge_blocks(lower: Block, upper: Block) -> dict[str, object]:
    """Return the keys of both; those of `upper` win, in `MERGED_SECTIONS` key by key.

    >>> merge_blocks({"a": 1, "gate": {"x": 1, "y": 2}}, {"preset": "base", "gate": {"y": 3}})
    {'a': 1, 'gate': {'x': 1, 'y': 3}}
    """
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        if key in MERGED_SECTIONS and isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = {**below, **value}
        elif key != KEY:
            merged[key] = value
    return merged
