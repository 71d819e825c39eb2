"""`ropeway registry diff|withdraw|gc|sign|keygen`: what keeps a registry in order."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from ropeway.cli.registry_options import (
    By,
    Json,
    Reason,
    Reference,
    Url,
    draw,
    open_registry,
    print_json,
    registry_app,
    user_name,
)
from ropeway.runtime.errors import ConfigError


@registry_app.command()
def diff(
    old: Reference,
    new: Reference,
    *,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """Show how two versions differ: parameters, metrics, ledger, files."""
    from ropeway.registry import tables

    versions = open_registry(registry)
    found = versions.version(old).compare(versions.version(new))
    print_json(found) if as_json else draw(tables.draw_comparison(found))


@registry_app.command()
def withdraw(
    reference: Reference, *, reason: Reason, by: By = None, registry: Url = None, as_json: Json = False
) -> None:
    """Say for ever that a version must not be used; refused while an alias points to it."""
    version = open_registry(registry).version(reference)
    created = version.withdraw(by=by or user_name(), reason=reason)
    if as_json:
        print_json({"name": version.name, "digest": version.digest, "created": created})
    else:
        typer.echo(f"{version.name} {version.digest} {'is withdrawn' if created else 'was withdrawn before'}")


@registry_app.command()
def gc(
    *,
    apply: Annotated[bool, typer.Option("--apply", help="Remove it; without this nothing is removed.")] = False,
    grace_hours: Annotated[float, typer.Option(min=0, help="What is younger stays.")] = 24,
    withdrawn: Annotated[bool, typer.Option("--withdrawn", help="Also files only withdrawn versions need.")] = False,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """Find what no version needs and no publish under way counts on; remove it with --apply."""
    opened = open_registry(registry)
    act = opened.collect if apply else opened.find_garbage
    found = act(grace=timedelta(hours=grace_hours), withdrawn=withdrawn)
    if as_json:
        keys = [entry.key for entry in found.entries]
        strays = [stray.name for stray in found.strays]
        print_json({"applied": apply, "bytes": found.bytes, "keys": keys, "strays": strays, "young": found.young})
        return
    for entry in found.entries:
        typer.echo(f"{entry.key}  {entry.bytes:,} bytes  {entry.modified_at:%Y-%m-%d %H:%M}")
    for stray in found.strays:
        typer.echo(f"{stray.name}  unfinished  {stray.started_at:%Y-%m-%d %H:%M}")
    verb = "removed" if apply else "would be removed (--apply does it)"
    typer.echo(
        f"{len(found.entries)} objects of {found.bytes:,} bytes and {len(found.strays)} unfinished writes {verb}; "
        f"{found.young} more are younger than {grace_hours:g} hours"
    )


@registry_app.command()
def sign(reference: Reference, *, registry: Url = None, as_json: Json = False) -> None:
    """Sign a version with ROPEWAY_SIGNING_KEY, beside the signatures it has."""
    from ropeway.registry.signing import load_signer

    opened, signer = open_registry(registry), load_signer()
    if signer is None:
        raise ConfigError("ROPEWAY_SIGNING_KEY: not set; expected a private key's file. `ropeway registry keygen`")
    version = opened.version(reference)
    created = version.sign(signer)
    if as_json:
        facts = {"name": version.name, "digest": version.digest}
        print_json({**facts, "keyid": signer.keyid, "created": created})
    else:
        typer.echo(
            f"{version.name} {version.digest[:12]} {'signed' if created else 'was signed before'} by {signer.keyid}"
        )


@registry_app.command()
def keygen(path: Annotated[Path, typer.Argument(help="The private key to write; .pub goes beside it.")]) -> None:
    """Make an Ed25519 key pair for signing versions."""
    from ropeway.registry.signing import make_keys

    typer.echo(f"{make_keys(path)}: {path} (private: ROPEWAY_SIGNING_KEY) and {path}.pub (for ROPEWAY_TRUSTED_KEYS)")
