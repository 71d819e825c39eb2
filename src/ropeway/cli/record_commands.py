"""`ropeway contains` and `ropeway forget`: whose text is in which version, and what no later run may read."""

from typing import TYPE_CHECKING, Annotated

import typer

from ropeway.cli.completion import complete_model
from ropeway.cli.options import JsonOption, ProfileOption, RegistryOption
from ropeway.runtime.errors import ConfigError

if TYPE_CHECKING:
    from ropeway.config.params import Profile

record_app = typer.Typer()

RecordArgument = Annotated[
    str,
    typer.Argument(help="A record as JSON, the digest of one, or a file of records or digests."),
]


@record_app.command()
def contains(
    record: RecordArgument,
    *,
    name: Annotated[
        str | None, typer.Option(help="Only versions of this model. Default: all.", autocompletion=complete_model)
    ] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which versions were trained on a record, only validated on it, or dropped it and why."""
    from ropeway.cli.record_output import describe_answer
    from ropeway.cli.registry_options import open_registry, print_json
    from ropeway.orchestration.record_search import search_records
    from ropeway.runtime.terminal import show

    answer = search_records(open_registry(registry), record, name=name)
    if as_json:
        print_json(answer.to_json())
    else:
        show(*describe_answer(answer))


@record_app.command()
def forget(
    record: Annotated[
        str | None,
        typer.Argument(
            help="A record as JSON, the digest of one, or a file of records or digests. Without it: --list."
        ),
    ] = None,
    *,
    show_list: Annotated[
        bool, typer.Option("--list", help="List what the profile forgets, and the versions that hold it.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Comment beside the digest in params.yaml. Default: none.")] = "",
    profile: ProfileOption = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add records to `forget` in params.yaml, so that no later run reads them; list the versions that hold them."""
    from ropeway.cli.options import open_profile
    from ropeway.cli.record_output import describe_forgotten, forgotten_json
    from ropeway.cli.registry_options import open_registry, print_json
    from ropeway.config.edit import add_forgotten
    from ropeway.orchestration.record_search import find_holders, full_digests, read_layouts, read_sought
    from ropeway.runtime.terminal import show

    if (record is None) != show_list:
        raise ConfigError("ropeway forget: expected a record, a digest or a file; or --list alone")
    workspace, chosen = open_profile(profile)
    digests, new, unreadable = chosen.forget, list[str](), {}
    if record is not None:
        sought = read_sought(record, read_layouts(_as_run(chosen)), prefer=True)
        digests, unreadable = full_digests(sought), dict(sought.unreadable)
        _, new = add_forgotten(workspace.root, workspace.profile, digests, reason)
    holders = find_holders(open_registry(registry), [bytes.fromhex(digest) for digest in digests])
    if as_json:
        print_json(forgotten_json(workspace.profile, digests, new, unreadable, holders))
    else:
        show(*describe_forgotten(workspace.profile, digests, new, unreadable, holders, was_added=record is not None))


def _as_run(profile: "Profile") -> dict[str, object]:
    """Return the sources of a profile in the shape of a version's run.json."""
    return {"params": {"sources": {name: source.model_dump() for name, source in profile.sources.items()}}}
