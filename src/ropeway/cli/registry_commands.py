"""`ropeway registry …`: what the flows do, without Prefect, and what keeps a registry in order.

Importing this loads typer and nothing heavier.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ropeway.cli.completion import complete_alias, complete_model, complete_version
from ropeway.config.suggestion import unknown_name
from ropeway.runtime.errors import ConfigError, NotFoundError, RegistryError
from ropeway.runtime.login import identity_of
from ropeway.runtime.workspace import Workspace, find_root

if TYPE_CHECKING:
    from ropeway.registry import AnyDigest, Promotion, PullResult, Registry, Version
    from ropeway.storage import Store

registry_app = typer.Typer(no_args_is_help=True, help="List, verify, pull, promote and withdraw published versions.")

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
_LONG_BYTES = 64 << 20  # about a second on a fast network
Alias = Annotated[str, typer.Argument(help="The alias to move, e.g. production.")]
Expect = Annotated[
    str, typer.Option(help="Refuse unless the alias points to this now: v3, a digest, an alias, `none` or `any`.")
]


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
    """Print a value for programs."""
    typer.echo(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False))


def print_words(*lines: str) -> None:
    """Print lines for a person, wrapped to the terminal."""
    from ropeway.runtime.terminal import show

    show(*lines)


@contextmanager
def progress_bar(store: "Store", what: str, total_bytes: int) -> Iterator[None]:
    """Show on a terminal's stderr how far a long transfer is; elsewhere, and for short ones, say nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from ropeway.runtime.progress import is_live_terminal

    console = Console(stderr=True)
    if total_bytes < _LONG_BYTES or not is_live_terminal(sys.stderr):
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


@registry_app.command("list")
def list_command(
    name: Annotated[
        str | None, typer.Argument(help="A model. Default: list the models.", autocompletion=complete_model)
    ] = None,
    *,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """List the models, or the versions of one model."""
    from ropeway.registry import tables
    from ropeway.runtime.terminal import show

    opened = open_registry(registry)
    found = opened.artifact(name).describe_versions() if name else opened.describe()
    if name and not found:
        from ropeway.config.suggestion import did_you_mean

        near = did_you_mean(name, [one.name for one in opened.artifacts()])
        raise NotFoundError(
            f"{opened.url}: no version of {name} was published there{near or '.'} `ropeway registry list` lists all"
        )
    if as_json:
        print_json(found)
    elif not found:
        print_words(f"{opened.url}: no version was published there yet")
    else:
        show(tables.draw_versions(name, found) if name else tables.draw_models(found))


@registry_app.command()
def show(reference: Reference, *, registry: Url = None, as_json: Json = False) -> None:
    """Show a version: aliases, gate, scores, lineage, files."""
    from ropeway.registry import tables
    from ropeway.runtime import terminal

    version = open_registry(registry).version(reference).describe()
    print_json(version) if as_json else terminal.show(tables.draw_version(version))


@registry_app.command()
def history(reference: AliasReference, *, registry: Url = None, as_json: Json = False) -> None:
    """Show every move of an alias: when, to which version, by whom and why."""
    from ropeway.registry import tables
    from ropeway.registry.layout import read_reference
    from ropeway.runtime import terminal

    wanted = read_reference(reference)
    if not wanted.alias:
        raise ConfigError(f"{reference}: expected NAME@ALIAS, e.g. {wanted.name}@production")
    opened = open_registry(registry)
    opened.check()
    artifact = opened.artifact(wanted.name)
    events = artifact.describe_history(wanted.alias)
    if not events:
        from ropeway.config.suggestion import unknown_name

        there = unknown_name(wanted.alias, artifact.aliases(), listed=f"aliases of {wanted.name}")
        raise NotFoundError(f"{reference}: the alias {there}. `ropeway registry list` shows the models")
    print_json(events) if as_json else terminal.show(tables.draw_history(wanted.name, wanted.alias, events))


@registry_app.command()
def verify(
    reference: Reference,
    *,
    folder: Annotated[
        Path | None, typer.Option(help="Verify this pulled folder. Default: the registry's copy.")
    ] = None,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """Hash every file of a version and compare with its manifest."""
    version = open_registry(registry).version(reference)
    if folder:
        done = version.verify_folder(folder)
    else:
        with progress_bar(version.store, f"verify {reference}", version.manifest.total_bytes):
            done = version.verify()
    if as_json:
        print_json(asdict(done))
    else:
        print_words(f"{reference}: {done.files} files, {done.bytes:,} bytes, all as published ({done.digest[:12]})")


@registry_app.command()
def pull(
    reference: Reference,
    *,
    to: Annotated[Path | None, typer.Option(help="Folder to create. Default: ./NAME-DIGEST.")] = None,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """Pull a version and verify every byte. The folder appears complete or not at all."""
    version = open_registry(registry).version(reference)
    with progress_bar(version.store, f"pull {reference}", version.manifest.total_bytes):
        done = version.pull(to or Path(f"{version.name}-{version.digest[:12]}"))
    if as_json:
        print_json({**asdict(done), "folder": str(done.folder)})
    else:
        print_words(
            f"{reference} is {done.digest}\n{'pulled to' if done.created else 'already complete in'} {done.folder}"
        )


@registry_app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A package, e.g. runs/PROFILE/package.")],
    *,
    name: Annotated[str, typer.Option(help="Name of the model, usually that of the profile.")],
    provenance: Annotated[
        Path | None, typer.Option(help="JSON file of facts to record with the version. Default: none.")
    ] = None,
    attach: Annotated[
        list[Path] | None, typer.Option(help="File to attach, e.g. dvc.lock; may be repeated. Default: none.")
    ] = None,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """Publish a package and its pages as a version. No alias moves; equal bytes are one version."""
    from ropeway.runtime.terminal import format_count

    facts = _read_facts(provenance) if provenance else {}
    attachments = {path.name: path for path in attach or []}
    artifact = open_registry(registry).artifact(name)
    pages = folder.resolve().with_name("pages")  # as report_package leaves them; of another package they are refused
    if not pages.is_dir() and not (folder / "README.md").is_file():  # a pulled copy has its pages inside
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
        missing = "" if done.created or not done.blobs else f"; {format_count(done.blobs, 'missing blob')} stored again"
        print_words(f"{done} {'published' if done.created else 'was published before'}: {done.digest}{missing}")


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
    """Move an alias to a version, if it points to what --expect says."""
    opened = open_registry(registry)
    version = opened.version(reference)
    expected = _read_expect(opened, version.name, expect)
    who = by or user_name()
    done = version.promote(alias, expect=expected, by=who, identity=identity_of(who), reason=reason)
    _report_promotion(done, as_json=as_json)


@registry_app.command()
def rollback(
    reference: AliasReference,
    *,
    reason: Reason,
    expect: Expect = "any",
    by: By = None,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """Move an alias back to the version before its current one."""
    from ropeway.registry.layout import read_reference

    opened, wanted = open_registry(registry), read_reference(reference)
    if not wanted.alias:
        raise ConfigError(f"{reference}: expected NAME@ALIAS, e.g. {wanted.name}@production")
    expected = _read_expect(opened, wanted.name, expect)
    artifact = opened.artifact(wanted.name)
    who = by or user_name()
    done = artifact.rollback(wanted.alias, by=who, identity=identity_of(who), reason=reason, expect=expected)
    _report_promotion(done, as_json=as_json)


def _read_expect(registry: "Registry", name: str, expect: str) -> "str | AnyDigest | None":
    from ropeway.registry import ANY

    if expect in ("any", "none"):
        return {"any": ANY, "none": None}[expect]
    try:
        return registry.version(f"{name}@{expect}").digest
    except RegistryError as error:
        raise type(error)(f"--expect {expect}: {error}") from None


def _read_facts(path: Path) -> dict[str, object]:
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a JSON file ({error})") from None
    if not isinstance(facts, dict):
        raise ConfigError(f"{path}: expected a JSON mapping, found a {type(facts).__name__}")
    return facts


def _report_promotion(done: "Promotion", *, as_json: bool) -> None:
    if as_json:
        print_json(asdict(done))
        return
    print_words(f"{done.name}@{done.alias} {'now points' if done.moved else 'already points'} to {done.digest}")
    if done.moved and done.prev:
        print_words(f"before: {done.prev}")


def cache_folder() -> Path:
    """Return where pulled versions stay: `ROPEWAY_CACHE`, else `ropeway` in the user's cache folder."""
    if stated := os.environ.get("ROPEWAY_CACHE"):
        return Path(stated).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "ropeway"


def pull_cached(version: "Version") -> "PullResult":
    """Return a version's folder in the cache, pulled if it is not there; its bytes are hashed either way.

    Raises:
        RegistryError: It is withdrawn.
        DataError: The registry's bytes, or the cache's, are not the version's.
    """
    target = cache_folder() / "versions" / version.name / version.digest
    with progress_bar(version.store, f"pulling {version.reference}", version.manifest.total_bytes):
        return version.pull(target)


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What goes to the Hub: path -> bytes of the files; the Hub's commit, None after a dry run."""

    repo: str
    version: str
    digest: str
    files: Mapping[str, int]
    commit: str | None


def upload_version(version: "Version", repo: str, *, private: bool, dry_run: bool) -> Uploaded:
    """Upload a version to a model repository of the Hub, which is created if it is not there.

    Weights of an earlier version are taken away in the same commit: transformers would load stale ones beside new.

    Raises:
        RegistryError: It is withdrawn.
        DataError: Its bytes are not what was published.
        ConfigError: The Hub refuses: name, token, rights.
        TemporaryError: The Hub does not answer.
    """
    from ropeway.storage import hub

    hub.check_repo(repo)
    pulled, label = pull_cached(version), str(version)
    paths = sorted(path for path in pulled.folder.rglob("*") if path.is_file())
    files = {path.relative_to(pulled.folder).as_posix(): path.stat().st_size for path in paths}
    commit = None
    if not dry_run:
        commit = hub.upload_model(repo, pulled.folder, message=f"{label} ({pulled.digest})", private=private)
    return Uploaded(repo, label, pulled.digest, files, commit)


@registry_app.command()
def diff(
    old: Reference,
    new: Reference,
    *,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """Compare two versions: parameters, metrics, ledger, files."""
    from ropeway.registry import tables
    from ropeway.runtime import terminal

    versions = open_registry(registry)
    found = versions.version(old).compare(versions.version(new))
    print_json(found) if as_json else terminal.show(tables.draw_comparison(found))


@registry_app.command()
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


@registry_app.command()
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


@registry_app.command()
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


@registry_app.command()
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


@registry_app.command()
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
