"""What all `ropeway registry …` commands share: the application, its options, opening a store, printing."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ropeway.runtime.errors import ConfigError
from ropeway.runtime.workspace import Workspace, find_root
from ropeway.storage import Store

if TYPE_CHECKING:
    from ropeway.registry import Registry

registry_app = typer.Typer(no_args_is_help=True, help="List, check, fetch, promote and withdraw published versions.")

Reference = Annotated[str, typer.Argument(help="NAME@ALIAS, NAME@v3 or NAME@DIGEST (8 digits or more)")]
Url = Annotated[
    str | None,
    typer.Option("--registry", help="file:///path or s3://bucket/prefix; default: ROPEWAY_REGISTRY, else ./registry"),
]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
By = Annotated[str | None, typer.Option(help="Who does it; default: the user name.")]
Reason = Annotated[str, typer.Option(help="Why, in words; kept for ever.")]
_LONG_BYTES = 64 << 20  # about a second on a fast network


def open_registry(url: str | None) -> "Registry":
    """Return the registry of `--registry`, else the workspace's."""
    from ropeway.registry import Registry

    return Registry.open(url or Workspace(find_root(), "").registry_url)


def user_name() -> str:
    """Return who runs this; raise ConfigError when the system does not know."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name; OSError from Python 3.13 on
        raise ConfigError("this user has no name here; say who does it with --by") from None


def print_json(value: object) -> None:
    """Print a value for programs."""
    typer.echo(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False))


def draw(table: Any) -> None:  # noqa: ANN401 - whatever rich can draw
    """Print a table for people."""
    from rich.console import Console

    Console().print(table)


@contextmanager
def progress_bar(store: Store, what: str, total_bytes: int) -> Iterator[None]:
    """Show on a terminal's stderr how far a long transfer is; elsewhere, and for short ones, say nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if total_bytes < _LONG_BYTES or not console.is_terminal:
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what, total=total_bytes)
        store.on_bytes = lambda count: bar.advance(task, count)
        try:
            yield
        finally:
            del store.on_bytes
