"""What a registry holds, as plain values for `--json` and as tables for people."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ropeway.registry.aliases import alias_history, list_aliases, resolve
from ropeway.registry.core import load_core
from ropeway.registry.layout import check_name, check_registry, list_models, read_reference, versions_log
from ropeway.registry.log import read_event, read_events
from ropeway.registry.publishing import attached_files, find_number, is_withdrawn
from ropeway.registry.reviews import clean_commit
from ropeway.registry.signing import list_signatures
from ropeway.runtime.errors import RegistryError
from ropeway.storage import Store

Facts = dict[str, Any]
_SHORT = 12


def describe_models(store: Store) -> list[Facts]:
    """Return one mapping per model: name, versions, latest, published_at, aliases. None in an empty store."""
    found = []
    for name in list_models(store):
        check_registry(store)
        if events := read_events(store, versions_log(name)):
            found.append(
                {
                    "name": name,
                    "versions": len(events),
                    "latest": events[-1]["digest"],
                    "published_at": events[-1]["published_at"],
                    "aliases": list_aliases(store, name),
                }
            )
    return found


def describe_versions(store: Store, name: str) -> list[Facts]:
    """Return one mapping per version of a model, oldest first."""
    check_name(name)
    aliases = list_aliases(store, name)
    return [
        {
            "number": number,
            "digest": event["digest"],
            "published_at": event["published_at"],
            "aliases": sorted(alias for alias, digest in aliases.items() if digest == event["digest"]),
            "withdrawn": is_withdrawn(store, name, event["digest"]),
            "git": event["provenance"].get("git"),
        }
        for number, event in enumerate(read_events(store, versions_log(name)), 1)
    ]


def describe_version(store: Store, reference: str) -> Facts:
    """Return everything the registry says of one version."""
    name, digest = read_reference(reference).name, resolve(store, reference)
    core = load_core(store, name, digest)
    number = find_number(store, name, digest)
    if number is None:
        raise RegistryError(f"{reference}: points to {digest[:12]}…, which was never published to its end")
    record = read_event(store, versions_log(name), number)
    return {
        "name": name,
        "number": number,
        "digest": digest,
        "bytes": core.total_bytes,
        "aliases": sorted(alias for alias, there in list_aliases(store, name).items() if there == digest),
        "withdrawn": is_withdrawn(store, name, digest),
        "signed_by": list_signatures(store, name, digest),
        "files": {file.path: {"sha256": file.sha256, "bytes": file.bytes} for file in core.files},
        "facts": core.facts,
        "published_at": record["published_at"],
        "provenance": record["provenance"],
        "made_again_by": clean_commit(store, name, digest),
        "attachments": {file.path: {"sha256": file.sha256, "bytes": file.bytes} for file in attached_files(record)},
    }


def describe_history(store: Store, name: str, alias: str) -> list[Facts]:
    """Return an alias's events, oldest first, each with the number its version has."""
    check_registry(store)
    numbers = {digest: number for number, digest in enumerate(read_events(store, versions_log(name)).digests, 1)}
    return [{**event, "version": numbers.get(event["digest"])} for event in alias_history(store, name, alias)]


def draw_models(models: list[Facts]) -> Table:
    """Return the table of `ropeway registry list`."""
    rows = [
        (
            model["name"],
            str(model["versions"]),
            model["latest"][:_SHORT],
            model["published_at"],
            ", ".join(f"{alias} → {digest[:_SHORT]}" for alias, digest in model["aliases"].items()),
        )
        for model in models
    ]
    return draw_table(("model", "versions", "latest", "published", "aliases"), rows)


def draw_versions(name: str, versions: list[Facts]) -> Table:
    """Return the table of `ropeway registry list NAME`."""
    rows = [
        (
            f"{name}@v{version['number']}",
            version["digest"][:_SHORT],
            version["published_at"],
            ", ".join([*version["aliases"], *(["withdrawn"] if version["withdrawn"] else [])]),
        )
        for version in versions
    ]
    return draw_table(("version", "digest", "published", "aliases"), rows)


def draw_version(version: Facts) -> Group:
    """Return what `ropeway registry show` prints: facts, files, and how to fetch it."""
    label = f"{version['name']}@v{version['number']}"
    lines = {
        "version": label + (", WITHDRAWN" if version["withdrawn"] else ""),
        "digest": version["digest"],
        "aliases": ", ".join(version["aliases"]) or "none",
        "signed by": ", ".join(version["signed_by"]) or "nobody",
        "published": version["published_at"],
        **_flatten(version["provenance"]),
        **_flatten(version["facts"]),
    }
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in lines.items():
        facts.add_row(_plain(key, style="bold"), _plain(str(value)))
    files = [
        (path, f"{entry['bytes']:,}", entry["sha256"][:_SHORT])
        for path, entry in {**version["files"], **_beside(version["attachments"])}.items()
    ]
    fetch = Text(f"ropeway registry pull {version['name']}@{version['digest'][:_SHORT]}")
    return Group(facts, draw_table(("file", "bytes", "sha256"), files), fetch)


def draw_history(name: str, alias: str, events: list[Facts]) -> Table:
    """Return the table of `ropeway registry history`."""
    rows = [
        (
            str(number),
            event["at"],
            f"v{event['version']}" if event["version"] else "?",
            event["digest"][:_SHORT],
            (event["prev"] or "")[:_SHORT],
            event["by"],
            event["reason"],
        )
        for number, event in enumerate(events, 1)
    ]
    table = draw_table(("", "at", "version", "digest", "from", "by", "reason"), rows)
    table.title = f"{name}@{alias}"
    return table


def draw_table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    """Return a table of plain cells: what others wrote into a registry cannot steer the terminal."""
    table = Table(box=box.SIMPLE_HEAD)
    for head in heads:
        table.add_column(_plain(head), justify="right" if head in ("versions", "bytes") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_plain(cell) for cell in row))
    return table


def _plain(words: str, style: str = "") -> Text:
    """Return words as they are: anybody may have written them, so neither markup nor escape sequences act."""
    return Text("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in words), style, overflow="fold")


def _beside(attachments: Facts) -> Facts:
    return {f"{name} (beside it)": entry for name, entry in attachments.items()}


def _flatten(tree: Facts, prefix: str = "") -> Facts:
    """Return a tree's short leaves under dotted keys; long ones are for `--json`."""
    flat: Facts = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif len(str(value)) <= 100:  # noqa: PLR2004 - what fits a line
            flat[prefix + key] = value
    return flat
