"""`ropeway registry withdraw`, `retire`, `gc`, `sign`, `keygen`, `attestations`: what keeps a registry in order."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from ropeway.cli.completion import complete_model
from ropeway.cli.registry_options import (
    By,
    Json,
    Reason,
    Reference,
    Url,
    open_registry,
    print_json,
    print_words,
    user_name,
)
from ropeway.config.suggestion import unknown_name
from ropeway.runtime.errors import ConfigError, NotFoundError

upkeep_app = typer.Typer()


@upkeep_app.command()
def withdraw(
    reference: Reference, *, reason: Reason, by: By = None, registry: Url = None, as_json: Json = False
) -> None:
    """Record permanently that a version must not be used; refused while an alias points to it."""
    version = open_registry(registry).version(reference)
    created = version.withdraw(by=by or user_name(), reason=reason)
    if as_json:
        print_json({"name": version.name, "digest": version.digest, "created": created})
    else:
        print_words(f"{version.name} {version.digest} {'is withdrawn' if created else 'was withdrawn before'}")


@upkeep_app.command()
def retire(
    model: Annotated[str, typer.Argument(help="The model.", autocompletion=complete_model)],
    *,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest versions stay.")] = 50,
    apply: Annotated[bool, typer.Option("--apply", help="Withdraw them. Default: only list them.")] = False,
    by: By = None,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """Withdraw old versions that no alias points to and that were never production.

    `ropeway registry gc --withdrawn --apply` then removes their files; their records stay.
    """
    opened = open_registry(registry)
    names = [one.name for one in opened.artifacts()]
    if model not in names:
        raise NotFoundError(f"model '{model}' {unknown_name(model, names)}")
    found = opened.artifact(model).retirable(keep)
    if apply:
        for version in found:
            version.withdraw(by=by or user_name(), reason=f"retired: older than the newest {keep} versions")
    if as_json:
        print_json({"applied": apply, "keep": keep, "digests": [version.digest for version in found]})
        return
    for version in found:
        print_words(f"{version} {version.digest}")
    done = "withdrawn" if apply else "would be withdrawn; to do it: --apply"
    print_words(f"{len(found)} versions {done}")


@upkeep_app.command()
def gc(
    *,
    apply: Annotated[bool, typer.Option("--apply", help="Remove the files. Default: only list them.")] = False,
    grace_hours: Annotated[float, typer.Option(min=0, help="Keep files younger than this.")] = 24,
    withdrawn: Annotated[
        bool, typer.Option("--withdrawn", help="Also remove files that only withdrawn versions need.")
    ] = False,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """List files that no version and no running publish needs; --apply removes them."""
    from ropeway.runtime.terminal import format_count, show

    opened = open_registry(registry)
    act = opened.collect if apply else opened.find_garbage
    found = act(grace=timedelta(hours=grace_hours), withdrawn=withdrawn)
    if as_json:
        keys = [entry.key for entry in found.entries]
        uploads = [upload.name for upload in found.incomplete_uploads]
        print_json(
            {
                "applied": apply,
                "bytes": found.bytes,
                "keys": keys,
                "incomplete_uploads": uploads,
                "in_grace_period": found.in_grace_period,
            }
        )
        return
    for entry in found.entries:
        print_words(f"{entry.key}  {entry.bytes:,} bytes  {entry.modified_at:%Y-%m-%d %H:%M}")
    for upload in found.incomplete_uploads:
        print_words(f"{upload.name}  incomplete upload  {upload.started_at:%Y-%m-%d %H:%M}")
    verb = "removed" if apply else "would be removed (--apply removes them)"
    garbage = f"{format_count(len(found.entries), 'file')} ({found.bytes:,} bytes)"
    incomplete = format_count(len(found.incomplete_uploads), "incomplete upload")
    show(f"{garbage} and {incomplete} {verb}; {found.in_grace_period:,} more kept, younger than {grace_hours:g} hours")


@upkeep_app.command()
def sign(reference: Reference, *, registry: Url = None, as_json: Json = False) -> None:
    """Sign a version with the key in ROPEWAY_SIGNING_KEY; earlier signatures stay."""
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
        print_words(
            f"{version.name} {version.digest[:12]} {'signed' if created else 'was signed before'} by {signer.keyid}"
        )


@upkeep_app.command()
def keygen(
    path: Annotated[
        Path, typer.Argument(help="File of the private key to create; the public key is written to PATH.pub.")
    ],
    *,
    as_json: Json = False,
) -> None:
    """Create a key pair (ECDSA, P-256) for signing versions."""
    from ropeway.registry.signing_keys import make_keys

    keyid = make_keys(path)
    if as_json:
        print_json({"keyid": keyid, "private": str(path), "public": f"{path}.pub"})
        return
    print_words(
        f"key {keyid}\nprivate key, for ROPEWAY_SIGNING_KEY: {path}\npublic key, for ROPEWAY_TRUSTED_KEYS: {path}.pub"
    )


@upkeep_app.command()
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
