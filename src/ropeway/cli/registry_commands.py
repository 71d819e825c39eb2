"""`ropeway registry …`: what the flows do, without Prefect; what keeps a registry in order is in `upkeep_commands`.

Importing this loads typer and nothing heavier.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ropeway.cli.completion import complete_model
from ropeway.cli.registry_options import (
    AliasReference,
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
from ropeway.cli.upkeep_commands import upkeep_app
from ropeway.runtime.errors import ConfigError, DataError, NotFoundError, RegistryError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.login import identity_of
from ropeway.runtime.manifest import NAME as MANIFEST
from ropeway.runtime.manifest import describe_files, iterate_files, json_mapping, link_file, write_json

if TYPE_CHECKING:
    from ropeway.orchestration.serving_check import ServingCheck
    from ropeway.registry import AnyDigest, LogPage, Promotion, PullResult, Registry, Version
    from ropeway.storage import Store

registry_app = typer.Typer(no_args_is_help=True, help="List, verify, pull, promote and withdraw published versions.")
registry_app.add_typer(upkeep_app)

Limit = Annotated[
    int | None, typer.Option(min=1, help="How many of the newest to show. Default: 20; with --json: all.")
]
Before = Annotated[
    int | None, typer.Option(min=1, help="Show only those with a smaller number, e.g. the page before. Default: all.")
]
All = Annotated[bool, typer.Option("--all", help="Show all of them.")]
_PAGE = 20  # entries; about a screen
Alias = Annotated[str, typer.Argument(help="The alias to move, e.g. production.")]
Expect = Annotated[
    str, typer.Option(help="Refuse unless the alias points to this now: v3, a digest, an alias, `none` or `any`.")
]


_LONG_BYTES = 64 << 20  # about a second on a fast network


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
    limit: Limit = None,
    before: Before = None,
    everything: All = False,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """List the models, or the newest versions of one model."""
    from ropeway.registry import tables
    from ropeway.runtime.terminal import show

    opened = open_registry(registry)
    if name is None:
        if limit or before or everything:
            raise ConfigError("--limit, --before and --all: they select versions of a model; name it")
        models = opened.describe()
        if as_json:
            print_json(models)
        elif models:
            show(tables.draw_models(models))
        else:
            print_words(f"{opened.url}: no version was published there yet")
        return
    page = opened.artifact(name).describe_versions(_page_size(limit, everything=everything, as_json=as_json), before)
    if not page.total:
        from ropeway.config.suggestion import did_you_mean

        near = did_you_mean(name, [one.name for one in opened.artifacts()])
        raise NotFoundError(
            f"{opened.url}: no version of {name} was published there{near or '.'} `ropeway registry list` lists all"
        )
    if as_json:
        print_json(page.events)
    else:
        show(tables.draw_versions(name, page.events))
    _report_rest(page, "version")


@registry_app.command()
def show(reference: Reference, *, registry: Url = None, as_json: Json = False) -> None:
    """Show a version: aliases, gate, scores, lineage, files."""
    from ropeway.registry import tables
    from ropeway.runtime import terminal

    version = open_registry(registry).version(reference).describe()
    print_json(version) if as_json else terminal.show(tables.draw_version(version))


@registry_app.command()
def history(
    reference: AliasReference,
    *,
    limit: Limit = None,
    before: Before = None,
    everything: All = False,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """Show the newest moves of an alias: when, to which version, by whom and why."""
    from ropeway.registry import tables
    from ropeway.registry.layout import read_reference
    from ropeway.runtime import terminal

    wanted = read_reference(reference)
    if not wanted.alias:
        raise ConfigError(f"{reference}: expected NAME@ALIAS, e.g. {wanted.name}@production")
    opened = open_registry(registry)
    opened.check()
    artifact = opened.artifact(wanted.name)
    size = _page_size(limit, everything=everything, as_json=as_json)
    page = artifact.describe_history(wanted.alias, size, before)
    if not page.total:
        from ropeway.config.suggestion import unknown_name

        there = unknown_name(wanted.alias, artifact.aliases(), listed=f"aliases of {wanted.name}")
        raise NotFoundError(f"{reference}: the alias {there}. `ropeway registry list` shows the models")
    if as_json:
        print_json(page.events)
    else:
        terminal.show(tables.draw_history(wanted.name, wanted.alias, page))
    _report_rest(page, "move")


def _page_size(limit: int | None, *, everything: bool, as_json: bool) -> int | None:
    """Return how many entries a list shows; None for all: JSON is complete unless a limit is given."""
    if everything and limit:
        raise ConfigError("--all and --limit exclude each other; give one of them")
    return None if everything or (as_json and not limit) else limit or _PAGE


def _report_rest(page: "LogPage", what: str) -> None:
    """State on stderr how many earlier entries are not shown and which option shows them."""
    from ropeway.runtime.terminal import format_count

    if earlier := page.first - 1:
        words = (
            f"{format_count(earlier, f'earlier {what}')} of {page.total:,} not shown: --before {page.first}, or --all"
        )
        typer.echo(words, err=True)


@registry_app.command()
def verify(
    reference: Reference,
    *,
    folder: Annotated[
        Path | None, typer.Option(help="Verify this pulled folder. Default: the registry's copy.")
    ] = None,
    serve: Annotated[
        str | None,
        typer.Option(help="Also compare the answers of the server at this URL. Default: no server is asked."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With --serve: the server's name of the model. Default: its only one.")
    ] = None,
    registry: Url = None,
    as_json: Json = False,
) -> None:
    """Hash every file of a version and compare with its manifest; with --serve also what a serving engine answers."""
    from ropeway.registry.versions import STATEMENT

    if serve is not None and not serve.strip():
        raise ConfigError("--serve is empty; expected the URL of a server")
    if model and not serve:
        raise ConfigError("--model names the model of a server; give its URL with --serve")
    version = open_registry(registry).version(reference)
    if folder:
        done = version.verify_folder(folder)
    else:
        with progress_bar(version.store, f"verify {reference}", version.manifest.total_bytes):
            done = version.verify()
    checks = _check_serving(version, folder, serve, model) if serve else []
    if as_json:
        print_json(asdict(done) | ({"serving": [asdict(one) for one in checks]} if serve else {}))
    else:
        for one in checks:
            print_words(f"{one.outcome}  {one.name}{': ' if one.detail else ''}{one.detail}")
        print_words(f"{reference}: {done.files} files, {done.bytes:,} bytes, all as published ({done.digest[:12]})")
        if done.provenance == "not trusted":
            print_words(f"{STATEMENT}: no trusted key signed it, so do not rely on it; the files are as published")


def _check_serving(version: "Version", folder: Path | None, url: str, model: str | None) -> "list[ServingCheck]":
    """Return the comparisons with a server; raise DataError with those that failed."""
    from ropeway.orchestration.serving_check import check_server, reach_server

    reach_server(url)  # before the model is pulled and loaded
    from ropeway.stages.package.expected_answers import expected_answers  # torch

    print(f"{url} answers; loading {version} to compute what it must answer", file=sys.stderr, flush=True)
    checks = check_server(url, expected_answers(folder or pull_cached(version).folder), model=model)
    if failed := [f"  {one.name}: {one.detail}" for one in checks if one.outcome == "failed"]:
        raise DataError("\n".join([f"{url}: its answers are not those of {version}:", *failed]))
    return checks


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
    index = folder.resolve().with_name("records.index")  # as prepare leaves it
    attachments = {path.name: path for path in [*([index] if index.is_file() else []), *(attach or [])]}
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
        facts = parse_json(path.read_bytes())
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
    """What goes to the Hub: path -> bytes of the files; the Hub's commit, None after a dry run.

    `forgotten` is the number of digests of `forget` that were replaced by zeros.
    """

    repo: str
    version: str
    digest: str
    files: Mapping[str, int]
    commit: str | None
    forgotten: int


@contextmanager
def shared_folder(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the folder that is uploaded for a package, and how many digests of `forget` were replaced by zeros in it.

    A digest of a short text can be guessed, so those of records that somebody asked to forget stay in the registry.
    Without any, the folder is the package itself; else it has other text files and its own manifest.
    """
    run = folder / "run.json"
    params = json_mapping(run.read_bytes()).get("params") if run.is_file() else None
    digests = [str(one).encode() for one in params.get("forget", ())] if isinstance(params, dict) else []
    if not digests:
        yield folder, 0
        return
    with tempfile.TemporaryDirectory(prefix=".share-", dir=folder.parent) as name:
        copy = Path(name)
        for path in iterate_files(folder):
            target = copy / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            data = b"" if path.suffix == ".safetensors" else path.read_bytes()
            shared = data
            for digest in digests:
                shared = shared.replace(digest, b"0" * len(digest))
            link_file(path, target) if shared == data else target.write_bytes(shared)
        if (folder / MANIFEST).is_file():
            stated = parse_json((folder / MANIFEST).read_bytes())
            changed = [one for one in stated["files"] if not (copy / one).samefile(folder / one)]
            write_json(copy / MANIFEST, {**stated, "files": stated["files"] | describe_files(copy, changed)})
        yield copy, len(digests)


def upload_version(version: "Version", repo: str, *, private: bool, dry_run: bool) -> Uploaded:
    """Upload a version to a model repository of the Hub, which is created if it is not there.

    Weights of an earlier version are taken away in the same commit: transformers would load stale ones beside new.
    Digests of `forget` are not uploaded: see `shared_folder`.

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
    with shared_folder(pulled.folder) as (folder, forgotten):
        if not dry_run:
            commit = hub.upload_model(repo, folder, message=f"{label} ({pulled.digest})", private=private)
    return Uploaded(repo, label, pulled.digest, files, commit, forgotten)


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
