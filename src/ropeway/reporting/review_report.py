"""The review report in Markdown, from a `ReviewCase`: what a reviewer needs to approve or reject a version."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from ropeway.config.sections import DriftLimits
from ropeway.data.drift import DriftReference, compare_profiles
from ropeway.data.lineage import describe_base, describe_source
from ropeway.data.task_scores import name_metrics, show_score
from ropeway.registry.aliases import name_author
from ropeway.registry.signing_keys import load_trusted
from ropeway.reporting import colors
from ropeway.reporting.drift_tables import as_json, describe_limits, drift_matrix, list_uncompared, summarize
from ropeway.reporting.evidence import ReviewCase, VersionEvidence, named_damage
from ropeway.reporting.ledger_steps import ledger_rows
from ropeway.reporting.loss_curves import Curve, loss_curves
from ropeway.reporting.markdown import code, plain
from ropeway.reporting.render import collapse, render
from ropeway.reporting.shown_parts import greedy_answers
from ropeway.reporting.verdict import split_verdict
from ropeway.runtime.manifest import Json
from ropeway.runtime.terminal import format_count, format_moment

_PARAMS, _DATA = (
    "run.json: params.",
    ("run.json: sources.", "run.json: base.", "run.json: digests.", "run.json: ledger."),
)
_MOST_CHANGES = 60
_REVIEW_COLUMNS = ("at", "decision", "by", "comment")
_SHORT = 12
# Key in eval.json, the better direction, and the name shown.
_METRICS = (
    ("loss", "down", "loss, nats/token"),
    ("nats_per_byte", "down", "nats/byte"),
    ("accuracy", "up", "accuracy"),
)


def render_review(case: ReviewCase, *, with_pictures: bool = True) -> str:
    """Return the report; `with_pictures` is False for a terminal.

    Raises:
        DataError: The record of the version or of production is damaged, e.g. its verdict.
    """
    with named_damage(f"{case.url}: {case.new.label} or what it is compared with"):
        return _render_review(case, with_pictures=with_pictures)


def _render_review(case: ReviewCase, *, with_pictures: bool) -> str:
    curves = _plan_curves(case) if with_pictures else []
    made = [step for step in case.new.steps if not step.get("left_out")]
    params, data = (_changes(case, prefixes) for prefixes in ((_PARAMS,), _DATA))
    verdict = case.new.facts["provenance"].get("verdict")
    notes, checks = split_verdict(verdict) if verdict else ([], [])
    return _render(
        case,
        only_summary=False,
        heading="#",
        losses=_losses(case),
        verdict=verdict,
        gate_notes=notes,
        gate_checks=checks,
        tasks=_tasks(case),
        picture=_draw_curves(curves),
        curves=_curve_rows(curves),
        made=made or case.new.steps,
        first_loss=_step_loss(made[:1]),
        last_loss=_step_loss(made[-1:]),
        left_out=len(case.new.steps) - len(made),
        attempts=_attempts(case.new),
        drift_note=summarize(_drift(case)),
        drift=drift_matrix(_drift(case)),
        uncompared=list_uncompared(_drift(case)),
        drift_limits=describe_limits(_drift(case)),
        samples=_samples(case),
        changed_params=params,
        changed_data=data,
        most_changes=_MOST_CHANGES,
        ledger=[{head: plain(cell) for head, cell in row.items()} for row in ledger_rows(case.new.ledger)],
        files=_files(case.new),
        lineage=_lineage(case),
        earlier=[
            {key: plain(name_author(review) if key == "by" else review[key]) for key in _REVIEW_COLUMNS}
            for review in case.reviews
        ],
    )


def render_summary(case: ReviewCase, *, heading: str = "#") -> str:
    """Return the summary that a reviewer must read: question, warnings, main figures and how to pull the version.

    Raises:
        DataError: The record of the version or of production is damaged, e.g. its verdict.
    """
    with named_damage(f"{case.url}: {case.new.label} or what it is compared with"):
        return _render(case, only_summary=True, heading=heading)


def _render(case: ReviewCase, **values: object) -> str:
    new, verdict = case.new, case.new.facts["provenance"].get("verdict")
    passed = bool(verdict["passed"]) if verdict else None
    facts = [
        ("digest", code(f"{case.digest[:_SHORT]}…")),
        ("mean loss over sources", _mean_loss(case)),
        ("gate", "passed" if passed else "**not passed**" if passed is False else "not evaluated"),
        ("data drift", plain(summarize(_drift(case)))),
        ("made by", plain(_revision(case, digits=_SHORT))),  # in full under Lineage
        ("published", plain(format_moment(new.facts["published_at"]))),
        ("signed by", _signers(new)),
        ("size", _size(new)),
    ]
    text = render(
        "review.md.jinja",
        case=case,
        new=new,
        passed=passed,
        needs_person=list((verdict or {}).get("needs_person", ())),
        same_rows=not case.old or _production_metrics(case).get("validation") == new.metrics.get("validation"),
        facts=[{"field": name, "value": words} for name, words in facts],
        pull=f"ropeway registry pull {case.name}@{case.digest} --registry {case.url}",
        **values,
    )
    return collapse(text)


def _signers(new: VersionEvidence) -> str:
    """Return the ids of the keys whose signatures are stored, and which of them the policy trusts.

    A case is only opened if the policy accepts the version, and an invalid signature of a trusted key is an error.
    """
    keys = new.facts["signed_by"]
    if not keys:
        return "no key"
    trust = load_trusted()
    if trust is None:
        return f"{', '.join(map(code, keys))} (not checked: `ROPEWAY_TRUSTED_KEYS` is not set)"
    trusted = [f"{code(key)} (trusted)" for key in keys if key in trust.keys]
    others = [f"{code(key)} (not checked)" for key in keys if key not in trust.keys]
    return ", ".join([*(trusted or ["a trusted certificate"]), *others])


def _size(new: VersionEvidence) -> str:
    files = format_count(len(new.facts["files"]), "file")
    more = new.facts["attachments"]
    attached = f", and {format_count(len(more), 'attachment')}" if more else ""
    return f"{new.facts['bytes'] / 1e6:,.1f} MB in {files}{attached}"


def _losses(case: ReviewCase) -> list[dict[str, str]]:
    """Return metrics by source: base, production, this version, and the change from production (or from the base)."""
    rival = _production_metrics(case)
    rows = []
    for source, found in case.new.metrics.get("sources", {}).items():
        for metric, better, words in _METRICS:
            ours = _find_number(found, "tuned", metric)
            if ours is None:
                continue
            base, theirs = _find_number(found, "base", metric), _find_number(rival, "sources", source, "tuned", metric)
            row = {"source": plain(source), "metric": words, "base": _format_number(base)}
            if case.old:
                row[f"production ({plain(case.old.label)})"] = _format_number(theirs)
            row[f"**{plain(case.new.label)}**"] = f"**{_format_number(ours)}**"
            row["change"] = _format_change(ours, theirs if case.old else base, better)
            rows.append(row)
    return rows


def _mean_loss(case: ReviewCase) -> str:
    ours, base = (_find_number(case.new.metrics, "mean", model) for model in ("tuned", "base"))
    theirs = _find_number(_production_metrics(case), "mean", "tuned") if case.old else base
    reference = "production" if case.old else "base"
    change = _format_change(ours, theirs, "down")
    return f"{_format_number(ours)} nats/token, {reference} {_format_number(theirs)}: {change}"


def _tasks(case: ReviewCase) -> list[dict[str, str]]:
    """Return the scores of base, production and the new version in each task of lm-evaluation-harness."""
    tasks: Json = case.new.metrics.get("tasks") or {}
    rows = []
    for name, task in tasks.items():
        for metric in name_metrics(task["tuned"]):
            row = {"task": plain(name), "metric": plain(metric), "base": _format_score(task["base"], metric)}
            if case.old:
                theirs = _comparable_scores(_production_metrics(case), name, task)
                row[f"production ({plain(case.old.label)})"] = _format_score(theirs, metric)
            rows.append({**row, f"**{plain(case.new.label)}**": f"**{_format_score(task['tuned'], metric)}**"})
    return rows


def _comparable_scores(metrics: Json, name: str, task: Json) -> Json:
    """Return production's scores if it ran the same version of the task with equal shots and questions."""
    theirs: Json = (metrics.get("tasks") or {}).get(name) or {}
    same = all(theirs.get(key) == task[key] for key in ("version", "shots", "n"))
    return theirs.get("tuned", {}) if same else {}


def _format_score(figures: Mapping[str, float], metric: str) -> str:
    return show_score(figures, metric) if metric in figures else "not evaluated"


def _plan_curves(case: ReviewCase) -> list[Curve]:
    """Return the version's losses by step, and production's training loss."""
    found = loss_curves(case.new.steps, f"v{case.new.facts['number']}", colors.VERSION)
    if case.old:
        label = f"production, v{case.old.facts['number']}"
        training = loss_curves(case.old.steps, label, colors.PRODUCTION)[:1]
        found += [replace(curve, is_dashed=True) for curve in training]
    return found


def _step_loss(steps: Sequence[Mapping[str, str]]) -> str:
    """Return the training loss of the first step, "unknown" where steps.csv has none."""
    try:
        return _format_number(float(steps[0]["loss"]))
    except (IndexError, KeyError, TypeError, ValueError):
        return "unknown"


def _draw_curves(curves: Sequence[Curve]) -> str:
    if sum(len(curve.points) for curve in curves) <= 1:  # one point is not a curve
        return ""
    from ropeway.reporting.pictures import draw_curves

    return draw_curves(curves)


def _curve_rows(curves: Sequence[Curve]) -> list[dict[str, str]]:
    return [
        {
            "curve (nats/token)": plain(curve.name),
            "first": _format_number(curve.points[0][1]),
            "last": _format_number(curve.points[-1][1]),
            "lowest": _format_number(min(loss for _, loss in curve.points)),
            "last step": f"{curve.points[-1][0]:,.0f}",
        }
        for curve in curves
    ]


def _drift(case: ReviewCase) -> Json | None:
    """Return the recorded comparisons of the data; that with production is made here, from the files of both versions.

    Nothing signs what an event records.
    """
    recorded: Json | None = case.new.facts["provenance"].get("drift")
    if not (case.old and case.old.data_profile and case.new.data_profile):
        return recorded
    references = list((recorded or {}).get("references", ()))
    at = next((at for at, one in enumerate(references) if one["digest"] == case.expect), None)
    why = ("production now",) if at is None else tuple(references.pop(at)["why"])
    limits = (recorded or {}).get("limits")
    stated = DriftLimits.model_validate(limits) if limits else None
    reference = DriftReference(case.old.label, str(case.expect), why)
    try:
        measures = compare_profiles(case.old.data_profile, case.new.data_profile, stated)
        reference = replace(reference, measures=tuple(measures))
    except ValueError as error:
        reference = replace(reference, note=str(error))
    references.insert(at or 0, as_json(reference))
    return {"limits": limits, "note": "", "references": references}


def _attempts(new: VersionEvidence) -> list[dict[str, str]]:
    """Return one row per start of the training; a resumed run has several."""
    return [
        {
            "start": str(number),
            "started (UTC)": _format_time(attempt.get("began")),
            "from step": plain(attempt.get("resumed_from_step", "?")),
            "ranks": plain(attempt.get("ranks", "?")),
            "seconds": _format_number(attempt.get("wall_seconds", attempt.get("seconds")), 0),
            "of them steps": _format_number(attempt.get("seconds"), 0),
            "tokens/s": _format_number(attempt.get("tokens_per_second"), 0),
            "ended": plain(attempt.get("ended", "?")),
        }
        for number, attempt in enumerate(new.history.get("attempts", ()), 1)
    ]


def _changes(case: ReviewCase, prefixes: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"key": code(key.removeprefix("run.json: ").removeprefix("params.")), "old": plain(old), "new": plain(new)}
        for key, (old, new) in case.changes.items()
        if key.startswith(tuple(prefixes))
    ]


def _samples(case: ReviewCase) -> list[dict[str, str]]:
    theirs = greedy_answers(case.old.samples, "tuned") if case.old else {}
    ours, base = greedy_answers(case.new.samples, "tuned"), greedy_answers(case.new.samples, "base")
    rows = []
    for prompt, answer in ours.items():
        row = {"prompt": plain(prompt)}
        row |= {"production": plain(theirs.get(prompt, "(not evaluated)"))} if case.old else {}
        row |= {"base": plain(base[prompt])} if not case.old and prompt in base else {}
        rows.append({**row, "**this version**": plain(answer)})
    return rows


def _files(new: VersionEvidence) -> list[dict[str, str]]:
    return [
        {"file": code(path), "bytes": f"{entry['bytes']:,}", "sha256": code(entry["sha256"][:_SHORT])}
        for path, entry in sorted(new.facts["files"].items(), key=lambda item: -item[1]["bytes"])
    ]


def _lineage(case: ReviewCase) -> list[dict[str, str]]:
    facts = case.new.facts["facts"]
    rows = [
        ("version", case.digest),
        ("git", _revision(case)),
        ("training fingerprint", facts.get("fingerprint", "not recorded")),
    ]
    rows += list(_origins(case.new.run))
    rows += [(f"{name} digest", digest) for name, digest in facts.get("digests", {}).items()]
    rows += [(f"attachment {name}", entry["sha256"]) for name, entry in case.new.facts["attachments"].items()]
    return [{"field": plain(name), "value": code(words)} for name, words in rows]


def _origins(run: Json) -> Iterator[tuple[str, str]]:
    """Yield the origin of the base and of each source, as far as the version recorded them."""
    if base := run.get("base"):
        yield "base", str(describe_base(base))
    for name, identity in run.get("sources", {}).items():
        yield f"source {name}", "; ".join(str(one) for one in describe_source(identity))


def _revision(case: ReviewCase, digits: int | None = None) -> str:
    """Return the git commit, its first `digits` only, and whether its tree was clean."""
    facts = case.new.facts["provenance"]
    git = facts.get("git") or "no git commit recorded"
    if again := case.new.facts["clean_commit"]:
        return f"{again[:digits]}, clean (first published from a dirty tree; this commit reproduced the same bytes)"
    return f"{git[:digits]}, {'dirty' if facts.get('dirty') else 'clean'}" if facts.get("git") else str(git)


def _production_metrics(case: ReviewCase) -> Json:
    """Return production's metrics, measured on this version's validation rows if the run did so."""
    if not case.old:
        return {}
    facts = case.new.facts["provenance"]
    measured = facts.get("opponent") or {}
    rows = case.new.metrics.get("validation")
    against = (facts.get("verdict") or {}).get("against")
    return measured if against == case.old.label and measured.get("validation") == rows else case.old.metrics


def _find_number(tree: object, *keys: str) -> float | None:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return float(tree) if isinstance(tree, int | float) and not isinstance(tree, bool) else None


def _format_number(value: object, digits: int = 3) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else "unknown"


def _format_change(ours: float | None, theirs: float | None, better: str) -> str:
    if ours is None or theirs is None:
        return "not comparable"
    change = ours - theirs
    if round(change, 3) == 0:
        return "same"
    return f"{change:+.3f} ({'better' if (change < 0) == (better == 'down') else '**worse**'})"


def _format_time(seconds: object) -> str:
    if not isinstance(seconds, int | float):
        return "?"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
