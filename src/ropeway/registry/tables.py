"""What a registry holds, as tables for people."""

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ropeway.registry.version_manifest import Facts

_SHORT = 12
_LINE_CHARACTERS = 100  # of a value; longer ones are left out


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
    beside = {f"{name} (beside it)": entry for name, entry in version["attachments"].items()}
    files = [
        (path, f"{entry['bytes']:,}", entry["sha256"][:_SHORT])
        for path, entry in {**version["files"], **beside}.items()
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


def draw_comparison(found: Facts) -> Group:
    """Return what `ropeway registry diff` prints."""
    heads = ("", found["old"]["reference"], found["new"]["reference"])
    rows = [(key, str(old), str(new)) for key, (old, new) in found["facts"].items()]
    return Group(draw_table(heads, rows), draw_table(("file", ""), list(found["files"].items())))


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


def _flatten(tree: Facts, prefix: str = "") -> Facts:
    """Return a tree's short leaves under dotted keys; long ones are for `--json`."""
    flat: Facts = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif len(str(value)) <= _LINE_CHARACTERS:
            flat[prefix + key] = value
    return flat
