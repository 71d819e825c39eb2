"""Records a reviewer's answer and moves `production`: used by the Prefect form and by `ropeway review`."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from ropeway.orchestration.gate_check import check_verdict
from ropeway.registry import ANY, PRODUCTION, AnyDigest, Decision, Registry
from ropeway.registry.aliases import check_text
from ropeway.reporting.evidence import ReviewCase, named_damage, open_case
from ropeway.reporting.review_report import render_review
from ropeway.runtime.errors import ConfigError, RegistryError
from ropeway.runtime.login import Identity, identity_of
from ropeway.runtime.manifest import Json
from ropeway.runtime.workspace import Workspace


@dataclass(frozen=True, slots=True)
class ReviewAnswer:
    """A reviewer's answer; every part is required.

    Attributes:
        via: Where it was given: a flow run or one command in a terminal. Each place's answer is recorded once.
        identity: Whether `by` was authenticated. Prefect 3.9.1 knows no users (docs/decisions/0025), so a name in its
            form is claimed.
    """

    decision: Decision
    by: str
    comment: str
    via: str
    identity: Identity = "claimed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a review: `Promoted` or `Rejected`, and one sentence."""

    state: str
    words: str


def decide(registry: Registry, case: ReviewCase, answer: ReviewAnswer) -> Outcome:
    """Record an answer; if it approves and production is still what the report compared with, move production.

    It may be repeated.

    Raises:
        ConfigError: A part of the answer is empty; nothing is recorded.
        RegistryError: Production moved after the report was made, or the version is from a dirty tree or incomplete.
            The answer is recorded all the same.
    """
    check_text("reviewer", answer.by)
    check_text("comment", answer.comment)
    version = registry.version(f"{case.name}@{case.digest}")
    kept = version.review(
        answer.decision,
        {
            "by": answer.by,
            "identity": answer.identity,
            "comment": answer.comment,
            "production": case.expect,
            "via": answer.via,
        },
    )
    alias = registry.artifact(case.name).alias(PRODUCTION)
    if answer.decision == "reject":
        words = f"{case.new.label} was rejected by {answer.by}; no alias moved"
        if alias.digest == case.digest:
            words += (
                f". It is still production; `ropeway registry rollback {case.name}@{PRODUCTION}` moves the alias back"
            )
        return Outcome("Rejected", words)
    try:
        done = version.promote(
            PRODUCTION,
            expect=case.expect,
            by=answer.by,
            identity=answer.identity,
            reason=answer.comment,
            review=kept,
        )
    except RegistryError as error:
        if alias.digest == case.digest:
            words = f"{case.new.label} is already {case.name}@{PRODUCTION}; the approval is recorded and no alias moved"
            return Outcome("Promoted", words)
        raise RegistryError(
            f"{case.new.label} was approved by {answer.by} but is NOT production: {error}. The approval is recorded. "
            f"Run `ropeway review {case.digest[:12]}` to compare it with the current production"
        ) from None
    was = f"; before it was {case.old.label}" if case.old else ""
    words = f"{case.new.label} is {case.name}@{PRODUCTION}{was}"
    return Outcome("Promoted", words if done.moved else f"{words} (unchanged)")


def open_review(registry: Registry, wanted: str, *, expect: str | AnyDigest | None = ANY) -> ReviewCase:
    """Return a version with everything that the decision needs; `expect` and errors as in `open_case`."""
    case = open_case(registry, wanted, expect=expect)
    with named_damage(f"{registry.url}: {case.new.label} or what it is compared with"):
        version = registry.version(f"{case.name}@{case.digest}")
        production = case.old.label if case.old else None
        return replace(case, gate_warning=check_verdict(registry, version, production))


def review_here(
    root: Path, wanted: str, *, answer: ReviewAnswer | None, expect: str | None, as_json: bool = False
) -> None:
    """Print the report of a version; with an answer, act on it; without one, print the commands that answer.

    `expect` is where production must be: `v3`, a digest or `none`; default: where it is now.
    """
    from ropeway.runtime.terminal import Command, TerminalMarkdown, shorten_digests, show

    registry = Registry.open(Workspace(root, "").registry_url)
    case = open_review(registry, wanted, expect=read_expect(registry, wanted, expect))
    outcome = decide(registry, case, answer) if answer else None
    if as_json:
        facts = {"state": outcome.state, "words": outcome.words} if outcome else describe_case(case)
        print(json.dumps({"version": case.new.label, "digest": case.digest, **facts}, indent=1, sort_keys=True))
        return
    if outcome:
        show(outcome.words)
        return
    show(
        TerminalMarkdown(shorten_digests(render_review(case, with_pictures=False))),
        Command(answer_command(case, "approve"), label="Approve:"),
        Command(answer_command(case, "reject"), label="Reject: "),
        "With --expect, an approval moves production only if production has not moved since this report.",
    )


def describe_case(case: ReviewCase) -> Json:
    """Return what a review shows, for programs: both versions' metrics, the gate's verdict, changes, commands."""
    provenance = case.new.facts["provenance"]
    return {
        "production": {"version": case.old.label, "digest": case.expect} if case.old else None,
        "is_production": case.expect == case.digest,
        "refused_because": case.dirty_reason,
        "gate": provenance.get("verdict"),
        "gate_warning": case.gate_warning or None,
        "drift": provenance.get("drift"),
        "metrics": case.new.metrics,
        "production_metrics": case.old.metrics if case.old else None,
        "steps": len(case.new.steps),
        "changes": dict(case.changes),
        "reviews": list(case.reviews),
        "published_at": case.new.facts["published_at"],
        "git": provenance.get("git"),
        "files": case.new.facts["files"],
        "commands": {decision: answer_command(case, decision) for decision in ("approve", "reject")},
    }


def answer_command(case: ReviewCase, decision: Decision) -> str:
    """Return the command that answers a case."""
    expect = case.expect[:12] if case.expect else "none"
    return f"ropeway review {case.digest[:12]} --{decision} --reviewer NAME --comment WHY --expect {expect}"


def read_answer(*, approve: bool, reject: bool, reviewer: str | None, comment: str | None) -> ReviewAnswer | None:
    """Return a command line's answer, None without one; raise ConfigError for yes and no, or without who and why."""
    if approve and reject:
        raise ConfigError("--approve and --reject: choose one")
    if not (approve or reject):
        if reviewer or comment:
            raise ConfigError("--reviewer and --comment go with --approve or --reject")
        return None
    if not (reviewer and reviewer.strip() and comment and comment.strip()):
        raise ConfigError("an answer needs --reviewer NAME and --comment REASON; both are recorded permanently")
    decision: Decision = "approve" if approve else "reject"
    who = reviewer.strip()
    return ReviewAnswer(decision, who, comment.strip(), f"terminal {uuid4().hex[:8]}", identity_of(who))


def read_expect(registry: Registry, wanted: str, expect: str | None) -> str | AnyDigest | None:
    """Return what `--expect` means for the model that `wanted` is a version of."""
    if expect is None:
        return ANY
    return None if expect == "none" else registry.version(f"{registry.find(wanted).name}@{expect}").digest
