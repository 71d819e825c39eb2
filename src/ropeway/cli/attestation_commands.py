"""`ropeway registry attestations`: the files by which other tools check a version."""

from pathlib import Path
from typing import Annotated

import typer

from ropeway.cli.registry_commands import Json, Reference, Url, open_registry, print_json, print_words, registry_app
from ropeway.runtime.errors import ConfigError


@registry_app.command()
def attestations(
    reference: Reference,
    *,
    to: Annotated[Path, typer.Option(help="New or empty folder for the files.")],
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """Write a version's signatures, SLSA provenance and ML-BOM, for tools other than Ropeway.

    `model_signing verify key FOLDER --public_key KEY.pub --signature FILE` then verifies a pulled FOLDER.
    """
    from ropeway.runtime.manifest import write_atomic

    version = open_registry(registry).version(reference)
    found = version.attestations()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to}: expected a new or empty folder. Choose another one")
    for name, data in found.items():
        write_atomic(to / name, data)
    if as_json:
        print_json({"name": version.name, "digest": version.digest, "files": sorted(found)})
        return
    for name in sorted(found):
        print_words(str(to / name))
    if not any(name.endswith(".sigstore.json") for name in found):
        print_words(f"{version} has no signature in the standard format; `ropeway registry sign {version}` adds one")
