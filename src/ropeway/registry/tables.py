"""Tables of the registry commands for the terminal. Digests are short; `--json` has the full digests."""

from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType

from ropeway.registry.aliases import name_author
from ropeway.registry.log import LogPage
from ropeway.registry.version_manifest import Facts
from ropeway.runtime.terminal import (
    SHORT_DIGITS,
    AlignedTable,
    Command,
    format_count,
    format_moment,
    format_number,
)

_MAX_VALUE_CHARACTERS = 100  # longer values are omitted
_SCORES = ("loss", "nats_per_byte", "accuracy")
# Parts of the provenance with lines of their own.
_DESCRIBED = ("evaluation", "verdict", "opponent", "drift", "git", "dirty", "dirty_files")


def draw_models(models: list[Facts]) -> RenderableType:
    """Return the table of `ropeway registry list`."""
    rows = [
        (
            model["name"],
            f"{model['versions']:,}",
            _short(model["latest"]),
            format_moment(model["published_at"]),
            ", ".join(f"{alias} {_short(digest)}" for alias, digest in model["aliases"].items()) or "none",
        )
        for model in models
    ]
    return AlignedTable(("model", "versions", "latest", "published", "aliases"), rows)


def draw_versions(name: str, versions: list[Facts]) -> RenderableType:
    """Return the table of `ropeway registry list NAME`."""
    rows = [
        (
            f"{name}@v{version['number']}",
            _short(version["digest"]),
            format_moment(version["published_at"]),
            ", ".join([*version["aliases"], *(["withdrawn"] if version["withdrawn"] else [])]),
        )
        for version in versions
    ]
    return AlignedTable(("version", "digest", "published", "aliases"), rows)


def draw_version(version: Facts) -> RenderableType:
    """Return the output of `ropeway registry show`: facts, scores, files and the pull command."""
    provenance = version["provenance"]
    others = {key: value for key, value in provenance.items() if key not in _DESCRIBED}
    lines = {
        "version": f"{version['name']}@v{version['number']}" + (", WITHDRAWN" if version["withdrawn"] else ""),
        "digest": _short(version["digest"]),
        "aliases": ", ".join(version["aliases"]) or "none",
        "signed by": ", ".join(version["signed_by"]) or "no key",
        "published": format_moment(version["published_at"]),
        "size": f"{version['bytes']:,} bytes in {format_count(len(version['files']), 'file')}, and "
        f"{format_count(len(version['attachments']), 'attachment')}",
        "made by": _describe_revision(provenance),
        **_describe_verdict(provenance.get("verdict")),
        **_describe_drift(provenance.get("drift")),
        **{
            f"review {number}": f"{review['decision']} by {name_author(review)}, {format_moment(review['at'])}"
            for number, review in enumerate(version.get("reviews", ()), 1)
        },
        **{key: format_number(value) for key, value in (_flatten(others) | _flatten(version["facts"])).items()},
    }
    attachments = {f"{name} (attachment)": entry for name, entry in version["attachments"].items()}
    files = [
        (path, f"{entry['bytes']:,}", _short(entry["sha256"]))
        for path, entry in {**version["files"], **attachments}.items()
    ]
    scores = list(_score_rows(provenance.get("evaluation")))
    parts: list[RenderableType] = [
        AlignedTable(("", ""), list(lines.items())),
        *([AlignedTable(("source", "metric", "base", "tuned"), scores)] if scores else []),
        AlignedTable(("file", "bytes", "sha256"), files),
        Command(f"ropeway registry pull {version['name']}@{_short(version['digest'])}"),
    ]
    return Group(*[one for part in parts for one in ("", part)][1:])


def _describe_verdict(verdict: object) -> dict[str, str]:
    """Return the verdict of the gate and its failed comparisons as facts; an empty mapping if there was no gate."""
    if not isinstance(verdict, Mapping):
        return {}
    against = verdict.get("against") or "its base model alone"
    checks = verdict.get("checks")  # versions of before the table of comparisons have none
    listed = [one for one in checks if isinstance(one, Mapping)] if isinstance(checks, list) else []
    failed = [str(one.get("words")) for one in listed if not one.get("passed")]
    return {
        "gate": f"{'passed' if verdict.get('passed') else 'not passed'}, compared with {against}",
        **{f"gate, failed {number}": words for number, words in enumerate(failed, 1)},
    }


def _describe_revision(provenance: Facts) -> str:
    """Return the commit, and whether files were changed since; e.g. of a version that no run published, "no commit"."""
    commit, changed = provenance.get("git"), provenance.get("dirty_files")
    if not commit:
        return "no commit"
    named = f" in {', '.join(map(str, changed))}" if isinstance(changed, list) and changed else ""
    return f"{_short(str(commit))}, {f'uncommitted changes{named}' if provenance.get('dirty') else 'clean'}"


def _describe_drift(drift: object) -> dict[str, str]:
    """Return in one fact what the data was compared with; an empty mapping if nothing was recorded."""
    if not isinstance(drift, Mapping):
        return {}
    listed = drift.get("references")
    references = [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []
    found = []
    for one in references:
        measures = [each for each in one.get("measures") or () if isinstance(each, Mapping)]
        above = [str(each.get("name")) for each in measures if each.get("exceeds")]
        result = f"above a limit: {', '.join(above)}" if above else "within the limits" if drift.get("limits") else ""
        found.append(f"{one.get('version')}: {one.get('note') or result or 'measured, without limits'}")
    return {"data drift": "; ".join(found) or f"not compared: {drift.get('note') or 'no earlier version'}"}


def _score_rows(evaluation: object) -> Iterator[tuple[str, ...]]:
    """Yield one row per source and metric that both the base and the tuned model have."""
    sources = evaluation.get("sources") if isinstance(evaluation, Mapping) else None
    for source, models in sources.items() if isinstance(sources, Mapping) else ():
        for metric in _SCORES:
            pair = [models.get(name, {}).get(metric) for name in ("base", "tuned")]
            if None not in pair:
                unit = {"loss": "loss, nats/token", "nats_per_byte": "nats/byte"}.get(metric, metric)
                yield source, unit, *(f"{value:.3f}" for value in pair)


def draw_history(name: str, alias: str, page: LogPage) -> RenderableType:
    """Return the table of `ropeway registry history`."""
    rows = [
        (
            str(number),
            format_moment(event["at"]),
            f"v{event['version']}" if event["version"] else "?",
            _short(event["digest"]),
            _short(event["prev"] or "none"),
            name_author(event),
            event["reason"],
        )
        for number, event in enumerate(page.events, page.first)
    ]
    return AlignedTable(("#", "moved", "to", "digest", "from", "by", "reason"), rows, title=f"{name}@{alias}")


def draw_comparison(found: Facts) -> RenderableType:
    """Return the output of `ropeway registry diff`."""
    ends = tuple(found[side]["reference"] for side in ("old", "new"))
    facts = [(key, *(_show_value(value) for value in pair)) for key, pair in found["facts"].items()]
    files = list(found["files"].items())
    parts: list[RenderableType] = [AlignedTable(("fact", *ends), facts)] if facts else []
    parts += [AlignedTable(("file", "change"), files)] if files else []
    return Group(*parts) if parts else f"{ends[0]} and {ends[1]}: no fact and no file differs"


def _short(digest: str) -> str:
    return digest[:SHORT_DIGITS]


def _show_value(value: object) -> str:
    """Return a value as text; floats with 6 significant digits, to show small differences."""
    return f"{value:.6g}" if isinstance(value, float) else format_number(value)


def _flatten(tree: Facts, prefix: str = "") -> Facts:
    """Return the short leaves of a tree under dotted keys; `--json` shows the long ones."""
    flat: Facts = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif len(str(value)) <= _MAX_VALUE_CHARACTERS:
            flat[prefix + key] = value
    return flat
