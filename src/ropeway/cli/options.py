"""Options and arguments that several commands have."""

from typing import TYPE_CHECKING, Annotated

import typer

from ropeway.cli.completion import complete_profile, complete_version
from ropeway.runtime.workspace import Workspace, find_root

if TYPE_CHECKING:
    from ropeway.config.params import Profile

ProfileOption = Annotated[
    str | None,
    typer.Option(help="Profile in params.yaml. Default: its `profile:` line.", autocompletion=complete_profile),
]
VersionArgument = Annotated[
    str,
    typer.Argument(help="NAME@v3, NAME@ALIAS or NAME@DIGEST (8 digits or more).", autocompletion=complete_version),
]
RegistryOption = Annotated[
    str | None, typer.Option(help="URL of the registry. Default: ROPEWAY_REGISTRY, else ./registry.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, with full digests and unrounded numbers.")]


def open_profile(profile: str | None) -> "tuple[Workspace, Profile]":
    """Return the workspace of this folder and the chosen profile."""
    from ropeway.config.load_params import load_profile

    name, chosen = load_profile(find_root() / "params.yaml", profile)
    return Workspace(find_root(), name), chosen
