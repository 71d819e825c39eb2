"""`ropeway registry …`: the acts of the flows, with no Prefect. Importing this pays for typer alone."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ropeway.cli import registry_care as care_commands
from ropeway.cli.registry_options import (
    By,
    Json,
    Reason,
    Reference,
    Url,
    draw,
    open_registry,
    print_json,
    progress_bar,
    registry_app,
    user_name,
)
from ropeway.runtime.errors import ConfigError

if TYPE_CHECKING:
    from ropeway.registry import Anything, Registry

__all__ = ["care_commands", "registry_app"]  # its commands register themselves

Alias = Annotated[str, typer.Argument(help="The pointer to move, e.g. production")]
Expect = Annotated[str, typer.Option(help="Where the alias must point now: v3, a digest, an alias, `none` or `any`.")]


@registry_app.command("list")
def list_command(
    name: Annotated[str | None, typer.Argument(help="Show this model's versions.")] = None,
    *,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """List the models, or one model's versions."""
    from ropeway.registry import tables

    opened = open_registry(registry)
    found = opened.artifact(name).describe_versions() if name else opened.describe()
    if as_json:
        print_json(found)
    elif not found:
        typer.echo(f"{opened.url}: nothing {f'named {name} ' if name else ''}published yet")
    else:
        draw(tables.draw_versions(name, found) if name else tables.draw_models(found))


@registry_app.command()
def show(reference: Reference, *, registry: Url = None, as_json: Json = False) -> None:
    """Show a version: facts, files, lineage, aliases."""
    from ropeway.registry import tables

    version = open_registry(registry).version(reference).describe()
    print_json(version) if as_json else draw(tables.draw_version(version))


@registry_app.command()
def history(
    reference: Annotated[str, typer.Argument(help="NAME@ALIAS")], *, registry: Url = None, as_json: Json = False
) -> None:
    """Show where an alias has pointed, by whom and why."""
    from ropeway.registry import tables
    from ropeway.registry.layout import read_reference

    wanted = read_reference(reference if "@" in reference else f"{reference}@production")
    if not wanted.alias or "@" not in reference:
        raise ConfigError(f"{reference}: expected NAME@ALIAS, e.g. {wanted.name}@production")
    opened = open_registry(registry)
    opened.check()
    events = opened.artifact(wanted.name).describe_history(wanted.alias)
    print_json(events) if as_json else draw(tables.draw_history(wanted.name, wanted.alias, events))


@registry_app.command()
def verify(
    reference: Reference,
    *,
    folder: Annotated[Path | None, typer.Option(help="Check this pulled folder instead of the store's blobs.")] = None,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """Re-hash every byte of a version."""
    version = open_registry(registry).version(reference)
    if folder:
        done = version.verify_folder(folder)
    else:
        with progress_bar(version.store, f"verify {reference}", version.core.total_bytes):
            done = version.verify()
    if as_json:
        print_json(asdict(done))
    else:
        typer.echo(f"{reference}: {done.files} files, {done.bytes:,} bytes, all as published ({done.digest})")


@registry_app.command()
def pull(
    reference: Reference,
    *,
    to: Annotated[Path | None, typer.Option(help="Folder to make; default: NAME-DIGEST here.")] = None,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """Fetch a version, every byte verified; the folder appears whole or not at all."""
    version = open_registry(registry).version(reference)
    with progress_bar(version.store, f"pull {reference}", version.core.total_bytes):
        done = version.pull(to or Path(f"{version.name}-{version.digest[:12]}"))
    if as_json:
        print_json({**asdict(done), "folder": str(done.folder)})
    else:
        typer.echo(f"{reference} is {done.digest}\n{'pulled to' if done.created else 'already whole in'} {done.folder}")


@registry_app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A package: runs/PROFILE/package")],
    *,
    name: Annotated[str, typer.Option(help="The model, by custom the profile's name.")],
    provenance: Annotated[Path | None, typer.Option(help="A JSON file with facts to keep beside the version.")] = None,
    attach: Annotated[list[Path] | None, typer.Option(help="A file to keep beside it, e.g. dvc.lock.")] = None,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """Publish a package and the pages beside it (card, samples, plots); no alias moves. Equal bytes are one version."""
    facts = _read_facts(provenance) if provenance else {}
    attachments = {path.name: path for path in attach or []}
    artifact = open_registry(registry).artifact(name)
    pages = folder.resolve().with_name("pages")  # as report_package leaves them; of another package they are refused
    if not pages.is_dir():
        typer.echo(f"no {pages}: the version has no README.md. `dvc repro report_package` makes it", err=True)
    files = [*folder.rglob("*"), *pages.rglob("*"), *attachments.values()]
    with progress_bar(
        artifact.store, f"publish {folder}", sum(path.stat().st_size for path in files if path.is_file())
    ):
        done = artifact.publish(
            folder, provenance=facts, attachments=attachments, pages=pages if pages.is_dir() else None
        )
    if as_json:
        print_json(asdict(done))
    else:
        typer.echo(f"{done} {'published' if done.created else 'was published before'}: {done.digest}")


@registry_app.command()
def promote(  # noqa: PLR0913 - a command's options
    reference: Reference,
    alias: Alias,
    *,
    reason: Reason,
    expect: Expect = "any",
    by: By = None,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """Point an alias at a version, if it is where you expect it to be."""
    opened = open_registry(registry)
    version = opened.version(reference)
    expected = _read_expect(opened, version.name, expect)
    done = version.promote(alias, expect=expected, by=by or user_name(), reason=reason)
    _report_promotion(asdict(done), as_json=as_json)


@registry_app.command()
def rollback(
    reference: Annotated[str, typer.Argument(help="NAME@ALIAS")],
    *,
    reason: Reason,
    expect: Expect = "any",
    by: By = None,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """Point an alias back at the version before its current one."""
    from ropeway.registry.layout import read_reference

    opened, wanted = open_registry(registry), read_reference(reference)
    expected = _read_expect(opened, wanted.name, expect)
    artifact = opened.artifact(wanted.name)
    done = artifact.rollback(wanted.alias or "", by=by or user_name(), reason=reason, expect=expected)
    _report_promotion(asdict(done), as_json=as_json)


def _read_expect(registry: "Registry", name: str, expect: str) -> "str | Anything | None":
    from ropeway.registry import ANY

    return (
        {"any": ANY, "none": None}[expect] if expect in ("any", "none") else registry.version(f"{name}@{expect}").digest
    )


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a JSON file ({error})") from None
    if not isinstance(facts, dict):
        raise ConfigError(f"{path}: expected a JSON mapping, found a {type(facts).__name__}")
    return facts


def _report_promotion(done: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(done)
        return
    moved = "now points" if done["moved"] else "pointed already"
    typer.echo(f"{done['name']}@{done['alias']} {moved} to {done['digest']}")
    if done["moved"] and done["prev"]:
        typer.echo(f"before: {done['prev']}")
