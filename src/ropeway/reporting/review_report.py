"""The review's report in markdown: one page from which a person can say yes or no. Pure: from a `Case` to text."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from ropeway.data.lineage import describe_base, describe_source
from ropeway.reporting.evidence import Case, VersionEvidence
from ropeway.reporting.ledger_steps import ledger_rows
from ropeway.reporting.loss_curves import COLOURS, data_uri, draw_curves, loss_curves
from ropeway.reporting.markdown import code, fence, plain, table
from ropeway.reporting.review_tasks import draw_tasks

_PARAMS, _DATA = (
    "run.json: params.",
    ("run.json: sources.", "run.json: base.", "run.json: digests.", "run.json: ledger."),
)
_MOST_CHANGES = 60
_SHORT = 12
# What a reviewer compares, which way is better, and how it is written.
_METRICS = (
    ("loss", "down", "loss, nats/token"),
    ("nats_per_byte", "down", "nats/byte"),
    ("accuracy", "up", "accuracy"),
)


def draw_report(case: Case, *, with_pictures: bool = True) -> str:
    """Return the whole report; without pictures for a terminal."""
    parts = [
        draw_summary(case),
        "## Losses against production",
        _losses(case),
        "## Gate",
        _gate(case.new),
        draw_tasks(case),
        "## How the training went",
        *_training(case, with_pictures=with_pictures),
        "## Sample answers, side by side (greedy)",
        _samples(case) or "No samples in this package.",
        "## Parameters, old → new",
        _changes(case, (_PARAMS,), "No parameter differs."),
        "## Data, old → new",
        _changes(case, _DATA, "The same data, token for token."),
        "## Ledger: where every record and token went",
        table([{head: plain(cell) for head, cell in row.items()} for row in ledger_rows(case.new.ledger)])
        or "Not recorded in this package.",
        "## Size and files",
        _files(case.new),
        "## Lineage",
        _lineage(case),
        *_earlier(case),
    ]
    return "\n\n".join(part for part in parts if part)


def draw_summary(case: Case, *, heading: str = "#") -> str:
    """Return what a reviewer must have read: the question, what speaks against a yes, the figures, how to get it."""
    new, asked = case.new, f"{heading} {case.new.label}: may it become production?"
    rivals = f"Production is {case.old.label} now." if case.old else _without_rival(case)
    facts = [
        ("digest", code(f"{case.digest[:_SHORT]}…")),
        ("mean loss over sources", _mean(case)),
        ("gate", "passed" if _passed(new) else "**not passed**" if _passed(new) is False else "not asked"),
        ("made by", plain(_revision(case))),
        ("published", plain(new.facts["published_at"])),
        ("size", f"{new.facts['bytes']:,} bytes in {len(new.facts['files'])} files"),
    ]
    rows = [{"": name, " ": words} for name, words in facts]
    pull = f"ropeway registry pull {case.name}@{case.digest} --registry {case.url}"
    return "\n\n".join([asked, rivals, *_objections(case), table(rows), fence(pull)])


def _without_rival(case: Case) -> str:
    if case.expect == case.digest:
        return "It **is** production already."
    return "There is **no production** yet; it is compared with its own base model."


def _objections(case: Case) -> Iterator[str]:
    """Yield what forbids or speaks against an approval."""
    if case.dirt:
        yield f"> **An approval will be refused:** it was made with {plain(case.dirt)}. Commit and run `ropeway run`."
    if _passed(case.new) is False:
        yield "> **The gate did not let it pass.** Its reasons are below."
    if case.old and not _same_rows(case):
        yield "> Production was measured on other validation rows: its losses and these say little about each other."


def _losses(case: Case) -> str:
    """Return metrics by source: base, production, this, and the change to production (or to the base)."""
    rival = _rival_metrics(case)
    rows = []
    for source, found in case.new.metrics.get("sources", {}).items():
        for metric, better, words in _METRICS:
            ours = _get(found, "tuned", metric)
            if ours is None:
                continue
            base, theirs = _get(found, "base", metric), _get(rival, "sources", source, "tuned", metric)
            row = {"source": plain(source), "metric": words, "base": _figure(base)}
            if case.old:
                row[f"production ({plain(case.old.label)})"] = _figure(theirs)
            row[f"**{plain(case.new.label)}**"] = f"**{_figure(ours)}**"
            row["change"] = _change(ours, theirs if case.old else base, better)
            rows.append(row)
    return table(rows) or "No metrics are kept with this version."


def _mean(case: Case) -> str:
    ours, base = (_get(case.new.metrics, "mean", model) for model in ("tuned", "base"))
    theirs = _get(_rival_metrics(case), "mean", "tuned") if case.old else base
    whose = "production" if case.old else "base"
    return f"{_figure(ours)} nats/token, {whose} {_figure(theirs)}: {_change(ours, theirs, 'down')}"


def _gate(new: VersionEvidence) -> str:
    verdict = new.facts["provenance"].get("verdict")
    if not verdict:
        return "It was published without asking the gate."
    lines = [f"- {plain(line)}" for line in verdict["lines"]]
    return "\n".join([f"**{'Passed' if verdict['passed'] else 'Not passed'}**", "", *lines])


def _training(case: Case, *, with_pictures: bool) -> Iterator[str]:
    curves = loss_curves(case.new.steps, f"v{case.new.facts['number']}", colour=COLOURS[0])
    if case.old:
        curves += loss_curves(case.old.steps, f"production, v{case.old.facts['number']}", colour=COLOURS[1])[:1]
    svg = draw_curves(curves)
    made = [step for step in case.new.steps if not step.get("left_out")]
    if with_pictures and svg:
        yield f"![loss by step]({data_uri(svg)})"
    elif case.new.steps:
        first, last = (made or case.new.steps)[0], (made or case.new.steps)[-1]
        yield f"{len(case.new.steps):,} steps, loss {first.get('loss', '?')} → {last.get('loss', '?')}."
    else:
        yield "No steps are kept in this package."
    if left := len(case.new.steps) - len(made):
        yield f"{left:,} steps were passed over with their rows: the numbers went wrong there and training went back."
    if record := case.new.history.get("continued_from"):
        changed = ", ".join(f"{key} {values}" for key, values in record["changed"].items()) or "nothing"
        yield plain(
            f"It went on from step {record['step']} of the run {record['fingerprint']}; changed since: {changed}."
        )
    yield _history(case.new)


def _history(new: VersionEvidence) -> str:
    """Return one row per start of the training: a run that was resumed has several."""
    rows = [
        {
            "start": str(number),
            "began (UTC)": _moment(attempt.get("began")),
            "from step": plain(attempt.get("resumed_from_step", "?")),
            "ranks": plain(attempt.get("ranks", "?")),
            "seconds": _figure(attempt.get("seconds"), 0),
            "tokens/s": _figure(attempt.get("tokens_per_second"), 0),
            "ended": plain(attempt.get("ended", "?")),
        }
        for number, attempt in enumerate(new.history.get("attempts", ()), 1)
    ]
    if not rows:
        return "How often it was resumed is not recorded."
    how = "Never resumed" if len(rows) == 1 else f"Resumed: {len(rows)} starts"
    return f"{how}.\n\n{table(rows)}"


def _changes(case: Case, prefixes: Sequence[str], none: str) -> str:
    if not case.old:
        return "Nothing to compare with."
    rows = [
        {"": code(key.removeprefix("run.json: ").removeprefix("params.")), "old": plain(old), "new": plain(new)}
        for key, (old, new) in case.changes.items()
        if key.startswith(tuple(prefixes))
    ]
    left = len(rows) - _MOST_CHANGES
    more = f"\n\n… and {left:,} more: `ropeway registry diff {case.old.label} {case.new.label}`" if left > 0 else ""
    return table(rows[:_MOST_CHANGES]) + more if rows else none


def _samples(case: Case) -> str:
    theirs = _answers(case.old, "tuned") if case.old else {}
    ours, base = _answers(case.new, "tuned"), _answers(case.new, "base")
    rows = []
    for prompt, answer in ours.items():
        row = {"prompt": plain(prompt)}
        row |= {"production": plain(theirs.get(prompt, "(not asked)"))} if case.old else {}
        row |= {"base": plain(base[prompt])} if not case.old and prompt in base else {}
        rows.append({**row, "**this**": plain(answer)})
    return table(rows)


def _answers(version: VersionEvidence, model: str) -> dict[str, str]:
    """Return prompt -> greedy answer."""
    found = {}
    for one in version.samples.get("prompts", ()):
        outputs = {result.get("sampling_config"): result.get("outputs") for result in one.get("results", ())}
        if answers := outputs.get(f"{model}/greedy"):
            found[str(one["prompt"])] = str(answers[0]).strip() or "(nothing: it ends at once)"
    return found


def _files(new: VersionEvidence) -> str:
    rows = [
        {"file": code(path), "bytes": f"{entry['bytes']:,}", "sha256": code(entry["sha256"][:_SHORT])}
        for path, entry in sorted(new.facts["files"].items(), key=lambda item: -item[1]["bytes"])
    ]
    return table(rows)


def _lineage(case: Case) -> str:
    facts = case.new.facts["facts"]
    rows = [
        ("version", case.digest),
        ("git", _revision(case)),
        ("training fingerprint", facts.get("fingerprint", "not recorded")),
    ]
    rows += list(_origins(case.new.run))
    rows += [(f"{name} digest", digest) for name, digest in facts.get("digests", {}).items()]
    rows += [(f"beside it: {name}", entry["sha256"]) for name, entry in case.new.facts["attachments"].items()]
    return table([{"": plain(name), " ": code(words)} for name, words in rows])


def _origins(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what the base was opened from, and each source read from; nothing for versions that did not record it."""
    if base := run.get("base"):
        yield "base", str(describe_base(base))
    for name, identity in run.get("sources", {}).items():
        yield f"source {name}", "; ".join(str(one) for one in describe_source(identity))


def _earlier(case: Case) -> Iterator[str]:
    if case.reviews:
        yield "## Earlier answers"
        yield table(
            [{key: plain(review[key]) for key in ("at", "decision", "by", "comment")} for review in case.reviews]
        )


def _revision(case: Case) -> str:
    facts = case.new.facts["provenance"]
    git = facts.get("git") or "no git commit recorded"
    if again := case.new.facts["made_again_by"]:
        return f"{again}, clean (published from a tree that was not; this commit made the same bytes again)"
    return f"{git}, {'dirty' if facts.get('dirty') else 'clean'}" if facts.get("git") else str(git)


def _passed(new: VersionEvidence) -> bool | None:
    verdict = new.facts["provenance"].get("verdict")
    return bool(verdict["passed"]) if verdict else None


def _rival_metrics(case: Case) -> Mapping[str, Any]:
    """Return production's metrics, on this version's rows if the run measured them there."""
    if not case.old:
        return {}
    facts = case.new.facts["provenance"]
    measured = facts.get("opponent") or {}
    rows = case.new.metrics.get("validation")
    against = (facts.get("verdict") or {}).get("against")
    return measured if against == case.old.label and measured.get("validation") == rows else case.old.metrics


def _same_rows(case: Case) -> bool:
    return bool(_rival_metrics(case).get("validation") == case.new.metrics.get("validation"))


def _get(tree: Any, *keys: str) -> float | None:  # noqa: ANN401 - JSON
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return float(tree) if isinstance(tree, int | float) and not isinstance(tree, bool) else None


def _figure(value: Any, digits: int = 3) -> str:  # noqa: ANN401 - JSON
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else "unknown"


def _change(ours: float | None, theirs: float | None, better: str) -> str:
    if ours is None or theirs is None:
        return "not comparable"
    change = ours - theirs
    if round(change, 3) == 0:
        return "same"
    return f"{change:+.3f} ({'better' if (change < 0) == (better == 'down') else '**worse**'})"


def _moment(seconds: Any) -> str:  # noqa: ANN401 - JSON
    if not isinstance(seconds, int | float):
        return "?"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
