"""`ropeway drift` and `ropeway history`: versions of a model compared with each other, from the registry alone."""

from typing import Annotated

import typer

from ropeway.cli.completion import complete_version
from ropeway.cli.options import JsonOption, RegistryOption
from ropeway.runtime.errors import DataError

version_app = typer.Typer()


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
    from ropeway.cli.registry_commands import open_registry, print_json
    from ropeway.config.sections import DriftLimits
    from ropeway.data.drift import DriftReference, compare_profiles
    from ropeway.orchestration.drift_evidence import read_data_profile
    from ropeway.reporting.drift_tables import DRIFT_HEADS, drift_rows
    from ropeway.reporting.drift_tables import as_json as to_json
    from ropeway.runtime.terminal import AlignedTable, show

    opened = open_registry(registry)
    before, after = opened.version(old), opened.version(new)
    stated = (after.record["provenance"].get("drift") or {}).get("limits")
    limits = DriftLimits.model_validate(stated) if stated else None
    try:
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
