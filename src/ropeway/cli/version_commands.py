"""`ropeway drift` and `ropeway history`: versions of a model compared with each other, from the registry alone."""

from pathlib import Path
from typing import Annotated

import typer

from ropeway.cli.completion import complete_model, complete_version
from ropeway.cli.options import JsonOption, RegistryOption
from ropeway.runtime.errors import ConfigError, DataError

version_app = typer.Typer()
_MAX_VERSIONS = 1000  # of a history: about two requests each, if each was promoted and reviewed


@version_app.command()
def drift(
    old: Annotated[
        str, typer.Argument(help="The earlier version: NAME@v3 or NAME@ALIAS.", autocompletion=complete_version)
    ],
    new: Annotated[str, typer.Argument(help="The later version.", autocompletion=complete_version)],
    *,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the data of two versions. Limits are those that the later version was published with."""
    from ropeway.cli.registry_options import open_registry, print_json
    from ropeway.config.sections import DriftLimits
    from ropeway.data.drift import DriftReference, compare_profiles
    from ropeway.orchestration.drift_evidence import read_data_profile
    from ropeway.reporting.drift_tables import DRIFT_HEADS, drift_rows
    from ropeway.reporting.drift_tables import as_json as to_json
    from ropeway.runtime.terminal import AlignedTable, show

    opened = open_registry(registry)
    before, after = opened.version(old), opened.version(new)
    stated = (after.record["provenance"].get("drift") or {}).get("limits")
    try:
        limits = DriftLimits.model_validate(stated) if stated else None  # a ValidationError is a ValueError
        measures = compare_profiles(read_data_profile(before), read_data_profile(after), limits)
    except ValueError as error:
        raise DataError(
            f"{before} and {after} cannot be compared: {error}. Another Ropeway published one of them"
        ) from None
    found = to_json(DriftReference(str(before), before.digest, (), tuple(measures)))
    above = sum(bool(one.exceeds) for one in measures)
    if as_json:
        ends = {
            "old": {"version": str(before), "digest": before.digest},
            "new": {"version": str(after), "digest": after.digest},
        }
        print_json({**ends, "limits": stated, "above_limit": above, "measures": found["measures"]})
        return
    words = f"{above} of {len(measures)} above a limit" if limits else f"no limits: {after} was published without any"
    show(AlignedTable(DRIFT_HEADS, drift_rows(found), title=f"data of {before} → {after}"), "", words)


@version_app.command()
def history(
    name: Annotated[str, typer.Argument(help="A model.", autocompletion=complete_model)],
    *,
    last: Annotated[int, typer.Option(min=1, max=_MAX_VERSIONS, help="Number of versions, the newest ones.")] = 30,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with charts to this file. Default: a table here.")
    ] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the versions of a model over time: scores, drift, gate, review, time, cost. Regressions are flagged."""
    from ropeway.cli.registry_options import open_registry, print_json, print_words
    from ropeway.reporting.history import read_history
    from ropeway.reporting.history_page import describe_last, describe_rule, history_table, render_history
    from ropeway.runtime.manifest import write_atomic
    from ropeway.runtime.terminal import AlignedTable, Paragraph, format_count, show

    found = read_history(open_registry(registry), name, last)
    if earlier := found.total - len(found.versions):
        most = min(found.total, _MAX_VERSIONS)
        typer.echo(f"{format_count(earlier, 'earlier version')} of {found.total:,} not shown: --last {most}", err=True)
    if html:
        try:
            write_atomic(html.absolute(), render_history(found).encode())
        except OSError as error:
            raise ConfigError(f"--html {html}: cannot be written ({error.strerror}). Name another file") from None
    if as_json:
        print_json(found.to_json())
        return
    if html:
        print_words(f"history of {len(found.versions)} versions: {html.absolute()}")
    else:
        heads, rows = history_table(found, found.versions)
        show(AlignedTable(heads, rows), "")
        if rule := describe_rule(found):
            show(Paragraph(rule), "")
    show(*(Paragraph(words, style="bold red" if is_bad else "") for is_bad, words in describe_last(found)))
