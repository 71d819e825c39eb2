"""`ropeway params …`: what params.yaml says, where each value comes from, and what a key means."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from ropeway.cli.completion import complete_block
from ropeway.cli.options import JsonOption
from ropeway.runtime.workspace import find_root

params_app = typer.Typer(no_args_is_help=True, help="Show, explain and compare the profiles of params.yaml.")


@params_app.command("show")
def show_params(
    profile: Annotated[
        str | None,
        typer.Argument(
            help="A profile or a preset. Default: the profile that params.yaml selects.",
            autocompletion=complete_block,
        ),
    ] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Show every value of a profile or a preset, and which of its presets states it."""
    from ropeway.config.load_params import list_presets, load_profile, read_stated
    from ropeway.runtime.terminal import AlignedTable, show

    path = find_root() / "params.yaml"
    is_preset = profile in list_presets(path)
    name = profile if profile and is_preset else load_profile(path, profile)[0]
    block, origins = read_stated(path, name)
    if as_json:
        typer.echo(json.dumps({"profile": name, "values": block, "stated_by": origins}, indent=1, default=str))
        return
    rows = [(key, _shown(value), _origin(origins, key)) for key, value in flatten(block)]
    show(AlignedTable(("key", "value", "stated by"), rows, title=f"{'preset' if is_preset else 'profile'} {name}"))


@params_app.command("explain")
def explain_param(
    key: Annotated[str, typer.Argument(help="A key, e.g. learning_rate or evaluation.passkey.lengths.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Say what a key means, its type and range, and its value in each profile and preset."""
    from ropeway.config.describe import explain_key
    from ropeway.config.load_params import list_presets, load_profiles, read_stated
    from ropeway.runtime.terminal import AlignedTable, show

    found = explain_key(key)
    path = find_root() / "params.yaml"
    values = {}
    for name in [*load_profiles(path)[1], *list_presets(path)] if path.is_file() else ():
        here: object = read_stated(path, name)[0]
        for part in key.split("."):
            here = here.get(part, _ABSENT) if isinstance(here, dict) else _ABSENT
        values[name] = here
    if as_json:
        described = [{"type": one.kind, "meaning": one.meaning, "keys": one.keys} for one in found]
        typer.echo(json.dumps({"key": key, "described": described, "values": values}, indent=1, default=str))
        return
    for one in found:
        show(f"{key}: {one.kind}", one.meaning, *([f"keys: {', '.join(one.keys)}"] if one.keys else []))
    show("", AlignedTable(("profile or preset", "value"), [(name, _shown(value)) for name, value in values.items()]))


@params_app.command("diff")
def diff_params(
    first: Annotated[
        str,
        typer.Argument(
            help="A profile or preset, or FILE:NAME, e.g. in another version of params.yaml.",
            autocompletion=complete_block,
        ),
    ],
    second: Annotated[str, typer.Argument(help="The same.", autocompletion=complete_block)],
    *,
    as_json: JsonOption = False,
) -> None:
    """Compare two profiles or presets value by value, with the values of their presets."""
    from ropeway.config.load_params import read_stated
    from ropeway.runtime.terminal import AlignedTable, show

    one, other = (dict(flatten(read_stated(*_locate(name))[0])) for name in (first, second))
    keys = [key for key in dict.fromkeys([*one, *other]) if one.get(key, _ABSENT) != other.get(key, _ABSENT)]
    if as_json:
        found = {key: {first: one.get(key), second: other.get(key)} for key in keys}
        typer.echo(json.dumps(found, indent=1, default=str))
        return
    rows = [(key, _shown(one.get(key, _ABSENT)), _shown(other.get(key, _ABSENT))) for key in keys]
    show(AlignedTable(("key", first, second), rows) if rows else f"{first} and {second} have the same values")


@params_app.command("schema")
def print_schema() -> None:
    """Print the JSON Schema of params.yaml, which editors use to complete and check it."""
    from ropeway.config.describe import build_json_schema

    typer.echo(json.dumps(build_json_schema(), indent=1))


_ABSENT = "(not stated)"
_WIDEST = 36  # characters of a value in a table, so that three columns fit 80


def _locate(name: str) -> tuple[Path, str]:
    file, _, profile = name.rpartition(":")
    return (Path(file) if file else find_root() / "params.yaml"), profile


def flatten(block: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) of every value in nested mappings.

    >>> list(flatten({"a": {"b": 1, "c": {}}, "d": [1]}))
    [('a.b', 1), ('a.c', {}), ('d', [1])]
    """
    for key, value in block.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _origin(origins: Mapping[str, str], key: str) -> str:
    parts = key.split(".")
    starts = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((origins[start] for start in starts if start in origins), "")


def _shown(value: object) -> str:
    """Return a value in a line; `--json` has all of it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"
