"""Options of `ropeway registry …`, and how its commands open a registry and print.

Importing this loads typer and nothing heavier.
"""

import json
import re
from typing import TYPE_CHECKING, Annotated

import typer

from ropeway.cli.completion import complete_alias, complete_version
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.workspace import Workspace, find_root

if TYPE_CHECKING:
    from ropeway.registry import Registry

Reference = Annotated[
    str,
    typer.Argument(help="NAME@ALIAS, NAME@v3 or NAME@DIGEST (8 digits or more)", autocompletion=complete_version),
]
AliasReference = Annotated[str, typer.Argument(help="NAME@ALIAS", autocompletion=complete_alias)]
Url = Annotated[
    str | None,
    typer.Option("--registry", help="file:///path or s3://bucket/prefix. Default: ROPEWAY_REGISTRY, else ./registry."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, with full digests and unrounded numbers.")]
By = Annotated[str | None, typer.Option(help="Who does it, recorded permanently. Default: the user name.")]
Reason = Annotated[str, typer.Option(help="The reason, recorded permanently.")]


def open_registry(url: str | None) -> "Registry":
    """Return the registry of `--registry`, else the workspace's."""
    from ropeway.registry import Registry

    return Registry.open(url or Workspace(find_root(), "").registry_url)


def user_name() -> str:
    """Return who runs this; raise ConfigError when the system does not know."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers; OSError since Python 3.13
        raise ConfigError("the current user has no name; pass --by NAME") from None


def print_json(value: object) -> None:
    """Print a value for programs; lone surrogates, which UTF-8 cannot encode, as JSON escapes."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    typer.echo(re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text))


def print_words(*lines: str) -> None:
    """Print lines for a person, wrapped to the terminal."""
    from ropeway.runtime.terminal import show

    show(*lines)
