"""The result of a run: the last lines in the terminal and the report in the Prefect UI."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ropeway.data.drift import DriftEvidence
from ropeway.orchestration.cleanup import format_sizes
from ropeway.orchestration.gate import GateVerdict
from ropeway.orchestration.publish import Publication
from ropeway.registry import Registry
from ropeway.reporting.drift_tables import drift_matrix, list_uncompared, summarize
from ropeway.reporting.ledger_steps import ledger_rows
from ropeway.reporting.markdown import plain, table
from ropeway.reporting.shown_parts import greedy_answers
from ropeway.reporting.verdict import split_verdict
from ropeway.runtime.errors import RopewayError
from ropeway.runtime.manifest import Json, json_mapping, write_atomic
from ropeway.runtime.terminal import SHORT_DIGITS, AlignedTable, Paragraph, format_count, render, show
from ropeway.runtime.workspace import Workspace

_SHOWN_PROMPTS = 2
HISTORY_VERSIONS = 30  # of the page that a run writes
_LONGEST_WORD = 40  # characters; a longer one is of a model that repeats itself
_SHOWN_CHARACTERS = 150  # of a question or an answer


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a run.

    Attributes:
        stages: Each stage of dvc.yaml and how it ended: Completed, Restored or Unchanged.
        review: URL of the page where its review is answered; None if no review was started.
        edited: Keys of its block in params.yaml that were edited during the run, which used the values from its start.
    """

    workspace: Workspace
    stages: dict[str, str]
    publication: Publication
    seconds: float
    review: str | None = None
    edited: tuple[str, ...] = ()


def print_result(result: Result, page: str | None) -> None:
    """Print a run's last lines: what it produced, whether that is better than production, and the next command.

    `page` says where the run is shown.
    """
    published = result.publication
    facts = [("steps", _count_steps(result.workspace))]
    facts += [("validation loss" if not number else "", line) for number, line in enumerate(_losses(result.workspace))]
    facts += _answers(result.workspace)
    facts += [
        ("version", f"{published.version} ({published.digest[:SHORT_DIGITS]}): {published.words}"),
        ("compared", published.comparison),
        *_describe_verdict(published.verdict),
        *_describe_drift(published.drift),
        ("package", str(result.workspace.package)),
        ("history", str(result.workspace.history) if result.workspace.history.is_file() else ""),
        ("details", f"ropeway registry show {published.version}"),
        ("run page", page or "none: this run did not use Prefect"),
        ("note", _note_edits(result)),
        ("on disk", f"{format_sizes(result.workspace.root)}; `ropeway clean` shows what can go"),
        ("next", _next_action(result)),
    ]
    width = max(len(name) for name, _ in facts)
    lines = [Paragraph(f"  {name:<{width}}  {words}", indent=width + 2) for name, words in facts if words]
    show("", f"{result.workspace.profile}: {published.state} in {result.seconds:.0f} s", *lines)


def result_json(result: Result, page: str | None) -> Json:
    """Return a run's result for programs; `page` says where the run is shown."""
    published, metrics = result.publication, _read(result.workspace.evaluation)
    verdict = published.verdict
    return {
        "profile": result.workspace.profile,
        "state": published.state,
        "seconds": result.seconds,
        "stages": result.stages,
        "version": published.version,
        "digest": published.digest,
        "words": published.words,
        "compared": published.comparison,
        "gate": None
        if verdict is None
        else {"passed": verdict.passed, "failed": list(verdict.failed), "needs_person": list(verdict.needs_person)},
        "drift": published.drift.to_json() if published.drift else None,
        "steps": _read(result.workspace.train_metrics).get("steps"),
        "losses": {
            name: {model: found[model]["loss"] for model in ("base", "tuned")}
            for name, found in metrics.get("sources", {}).items()
        },
        "package": str(result.workspace.package),
        "page": page,
        "review": result.review,
        "edited": list(result.edited),
        "next": _next_action(result),
    }


def _describe_verdict(verdict: GateVerdict | None) -> list[tuple[str, str]]:
    """Return the gate's result, and each comparison that failed, as (fact, words)."""
    if verdict is None:
        return []
    failed, count = verdict.failed, format_count(len(verdict.checks), "comparison")
    words = "passed" if verdict.passed else f"NOT PASSED, {len(failed)} of {count} failed"
    return [("gate", words), *(("", line) for line in failed)]


def _describe_drift(drift: DriftEvidence | None) -> list[tuple[str, str]]:
    """Return what the data was compared with, and each measure above a limit, as (fact, words)."""
    if drift is None:
        return []
    lines = drift.reasons or (summarize(drift.to_json()),)
    return [("" if number else "data drift", line) for number, line in enumerate(lines)]


def _next_action(result: Result) -> str:
    """Return the next command: a review, or a chat with the model."""
    published = result.publication
    if result.review:
        return f"answer the review at {result.review}"
    if published.reviewable or published.state == "Rejected":
        return f"ropeway review {published.digest[:SHORT_DIGITS]}"
    return f"ropeway chat {published.version}"


def _note_edits(result: Result) -> str:
    if not result.edited:
        return ""
    return (
        f"params.yaml was edited during the run ({', '.join(result.edited)}); it used the values of its start. Run "
        "again for the new ones"
    )


def draw_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows of equal keys as an aligned text table, as wide as the terminal."""
    return render(AlignedTable(tuple(rows[0]), [tuple(row.values()) for row in rows])) if rows else ""


def read_ledger(workspace: Workspace) -> list[dict[str, str]]:
    """Return a run's ledger as `ledger_rows`; none where there is no ledger yet."""
    return ledger_rows(_read(workspace.ledger))


def draw_report(result: Result) -> str:
    """Return the run's report in markdown."""
    published, name = result.publication, result.workspace.profile
    notes, checks = split_verdict(asdict(published.verdict)) if published.verdict else ([], [])
    verdict = "\n\n".join(filter(None, ["\n".join(f"- {note}" for note in notes), table(checks)]))
    stages = [{"stage": plain(stage), "state": state} for stage, state in result.stages.items()]
    parts = [
        f"# {published.version}: {published.state}",
        published.words,
        *([plain(_note_edits(result))] if result.edited else []),
        *(["## Gate", verdict] if verdict else []),
        *_draw_drift(published.drift),
        "## Validation",
        table(_evaluation_rows(result.workspace)) or "No metrics.",
        "## Training",
        _count_steps(result.workspace) or "No metrics.",
        "## Stages",
        table(stages),
        "## Version",
        f"`{published.digest}`",
        f"```\nropeway registry pull {name}@{published.digest[:12]}\n```",
    ]
    return "\n\n".join(parts)


def _draw_drift(drift: DriftEvidence | None) -> list[str]:
    if drift is None:
        return []
    found = drift.to_json()
    notes = [f"- not compared with {plain(words)}" for words in list_uncompared(found)]
    return list(
        filter(None, ["## Data drift", f"{plain(summarize(found))}.", table(drift_matrix(found)), "\n".join(notes)])
    )


def write_history(workspace: Workspace) -> str:
    """Write the history of the model to runs/<profile>/history.html; return a short one in markdown.

    An error of the registry is printed and the text is empty: the run has published what it made.
    """
    from ropeway.reporting.history import read_history
    from ropeway.reporting.history_page import render_history, render_history_markdown

    try:
        found = read_history(Registry.open(workspace.registry_url), workspace.profile, HISTORY_VERSIONS)
    except RopewayError as error:
        print(f"history: not written, {error}", flush=True)
        return ""
    write_atomic(workspace.history, render_history(found).encode())
    return render_history_markdown(found)


def _count_steps(workspace: Workspace) -> str:
    metrics = _read(workspace.train_metrics)
    steps, applied = metrics.get("steps"), metrics.get("applied_steps")
    if steps is None:
        return ""
    return f"{steps:,}" + (f", {applied:,} of them applied" if applied not in (None, steps) else "")


def _losses(workspace: Workspace) -> list[str]:
    """Return one line per source: loss of base and tuned in nats per supervised token."""
    metrics = _read(workspace.evaluation)
    pairs = [
        (name, found["base"]["loss"], found["tuned"]["loss"]) for name, found in metrics.get("sources", {}).items()
    ]
    if mean := metrics.get("mean"):
        pairs.append(("mean", mean["base"], mean["tuned"]))
    width = max((len(name) for name, *_ in pairs), default=0)
    return [f"{name:<{width}}  {base:.3f} -> {tuned:.3f} nats/token" for name, base, tuned in pairs]


def _answers(workspace: Workspace) -> list[tuple[str, str]]:
    """Return the first prompts with the greedy answers of base and tuned, cut to a line or two."""
    samples = _read(workspace.samples)
    base, tuned = (greedy_answers(samples, model) for model in ("base", "tuned"))
    found = []
    for prompt in list(tuned)[:_SHOWN_PROMPTS]:
        answers = {"  base": base.get(prompt, ""), "  tuned": tuned[prompt]}
        found += [("asked", _in_a_line(prompt))]
        found += [(model, _in_a_line(answer) or "(no text)") for model, answer in answers.items()]
    return found


def _in_a_line(text: str) -> str:
    line = " ".join(word if len(word) <= _LONGEST_WORD else f"{word[:_LONGEST_WORD]}…" for word in text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}…"


def _evaluation_rows(workspace: Workspace) -> list[dict[str, str]]:
    rows = []
    for name, found in _read(workspace.evaluation).get("sources", {}).items():
        row = {"source": plain(name)}
        for metric in ("loss", "perplexity", "accuracy"):
            pair = [found[model].get(metric) for model in ("base", "tuned")]
            if None not in pair:
                row[f"{metric}, base → tuned"] = f"{pair[0]:.3f} → {pair[1]:.3f}"
        rows.append(row)
    return rows


def _read(path: Path) -> Json:
    """Return a file of metrics, empty where there is none: a report shows what there is."""
    try:
        return json_mapping(path.read_bytes())
    except OSError:
        return {}
