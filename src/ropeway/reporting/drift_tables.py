"""Data drift as tables, from the evidence that a version's publication recorded (`DriftEvidence.to_json`)."""

from collections.abc import Sequence
from typing import Any

from ropeway.data.drift import DriftEvidence, DriftReference
from ropeway.reporting.markdown import plain
from ropeway.runtime.manifest import Json

NOT_RECORDED = "not recorded: this version was published before versions recorded a data profile"
DRIFT_HEADS = ("data", "old → new", "PSI", "JS, bits", "result")


def as_json(evidence: DriftEvidence | DriftReference) -> Json:
    """Return evidence, or one reference, as a publication records it."""
    if isinstance(evidence, DriftReference):
        found: Json = DriftEvidence(None, (evidence,)).to_json()["references"][0]
        return found
    return evidence.to_json()


def list_flagged(drift: Json | None) -> list[str]:
    """Return the name of every quantity that is above a limit in some comparison, once."""
    measures = (one for reference in (drift or {}).get("references", ()) for one in reference["measures"])
    return list(dict.fromkeys(one["name"] for one in measures if one["exceeds"]))


def summarize(drift: Json | None) -> str:
    """Return one line: against which versions the data was compared, and what is above a limit.

    >>> summarize({"note": "there is no earlier version", "references": [], "limits": None})
    'not compared: there is no earlier version'
    """
    if drift is None:
        return NOT_RECORDED
    compared = [one for one in drift["references"] if not one["note"]]
    if not compared:
        notes = [drift["note"], *(one["note"] for one in drift["references"])]
        return f"not compared: {'; '.join(filter(None, notes))}"
    names = ", ".join(one["version"] for one in compared)
    flagged = list_flagged(drift)
    if not flagged:
        return f"{'within the limits' if drift['limits'] else 'measured, without limits'}, compared with {names}"
    return f"ABOVE A LIMIT: {', '.join(flagged)}; compared with {names}"


def name_reference(reference: Json) -> str:
    """Return e.g. `laptop@v3 (the version before, production)`."""
    return f"{reference['version']} ({', '.join(reference['why'])})" if reference["why"] else str(reference["version"])


def drift_rows(reference: Json) -> list[tuple[str, ...]]:
    """Return the rows of one comparison under `DRIFT_HEADS`, those above a limit first; what is empty is left out."""
    shown = [one for one in reference["measures"] if _is_shown(one)]
    return [_row(one) for one in sorted(shown, key=lambda one: not one["exceeds"])]


def drift_matrix(drift: Json | None) -> list[dict[str, str]]:
    """Return the comparisons with all earlier versions as one Markdown table, rows above a limit first and bold."""
    compared = [one for one in (drift or {}).get("references", ()) if not one["note"]]
    names = [one["name"] for one in compared[0]["measures"]] if compared else []
    found: list[tuple[bool, dict[str, str]]] = []
    for at, name in enumerate(names):
        measures = [one["measures"][at] for one in compared]
        if not any(map(_is_shown, measures)):
            continue
        row = {"data": plain(name)}
        for reference, measure in zip(compared, measures, strict=True):
            cell = plain(_cell(measure))
            row[f"from {plain(name_reference(reference))}"] = f"**{cell}**" if measure["exceeds"] else cell
        found.append((any(measure["exceeds"] for measure in measures), row))
    return [row for _, row in sorted(found, key=lambda one: not one[0])]


def list_uncompared(drift: Json | None) -> list[str]:
    """Return why an earlier version could not be compared, one sentence each."""
    return [f"{name_reference(one)}: {one['note']}" for one in (drift or {}).get("references", ()) if one["note"]]


def describe_limits(drift: Json | None) -> str:
    """Return the limits in one line; empty if there were none."""
    stated = (drift or {}).get("limits") or {}
    words = {
        "max_psi": "PSI {:g}",
        "max_js_divergence": "JS {:g} bits",
        "max_share_change": "change of a share {:.0%}",
        "max_size_ratio": "ratio of sizes {:g}",
        "min_seen_share": "texts seen before at least {:.0%}",
    }
    return ", ".join(text.format(stated[key]) for key, text in words.items() if stated.get(key) is not None)


def _cell(measure: Json) -> str:
    if measure["js"] is None:
        return _values(measure)
    parts = f": {_largest(measure['largest'][:1])}" if measure["exceeds"] and measure["largest"] else ""
    psi = "" if measure["psi"] is None else f"PSI {measure['psi']:.3f}, "
    return f"{psi}JS {measure['js']:.3f}{parts}"


def _is_shown(measure: Json) -> bool:
    return bool(measure["exceeds"] or measure["js"] is not None or measure["old"] or measure["new"])


def _row(measure: Json) -> tuple[str, ...]:
    has_values = any(measure[key] is not None for key in ("js", "old", "new"))
    result = "; ".join(measure["exceeds"]) if measure["exceeds"] else "ok" if has_values else ""
    return (measure["name"], _values(measure), _number(measure["psi"]), _number(measure["js"]), result)


def _values(measure: Json) -> str:
    if measure["kind"] == "distribution":
        return measure["note"] or _largest(measure["largest"])
    if measure["kind"] == "seen":
        note = f" ({measure['note']})" if measure["note"] else ""
        return measure["note"] if measure["new"] is None else f"{measure['new']:.1%}{note}"
    if measure["kind"] == "size":
        ratio = f" (x{measure['new'] / measure['old']:.2f})" if measure["old"] else ""
        return f"{measure['old']:,.0f} → {measure['new']:,.0f}{ratio}"
    return f"{_percent(measure['old'])} → {_percent(measure['new'])}"


def _largest(parts: Sequence[Sequence[Any]]) -> str:
    """Return the parts that moved most; those below a tenth of a percent are left out."""
    least = 0.001
    return ", ".join(f"{name}: {old:.1%} → {new:.1%}" for name, old, new in parts if abs(new - old) >= least)


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
