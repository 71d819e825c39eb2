"""A registry with many synthetic versions: falling losses, drift, a failed gate, reviews, and a regression at the end.

`python -m tests.support.history_world FOLDER` writes one with 30 versions and its page, of which docs/history.png is a
picture.
"""

import random
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ropeway.registry import Registry
from ropeway.registry.layout import versions_log
from ropeway.registry.log import append_event
from ropeway.runtime.manifest import digest_of

LIMITS = {
    "max_psi": 0.25,
    "max_js_divergence": 0.1,
    "max_share_change": 0.1,
    "max_size_ratio": 3.0,
    "min_seen_share": None,
    "window": 5,
}
BEGIN = datetime(2026, 10, 1, 3, 40, tzinfo=UTC)
GATE_FAILS, SHIFT, NEW_ROWS = 12, (18, 24), 9


def add_versions(artifact, count=30, *, regression=True, gpus=8):
    """Append versions as publications record them, without packages: a history reads the logs alone."""
    drawn = random.Random(7)
    log = versions_log(artifact.name)
    losses, digests = [], []
    for number in range(1, count + 1):
        loss = 2.35 - 0.006 * number + drawn.gauss(0, 0.006)
        loss += 0.12 if number == GATE_FAILS else 0
        loss += 0.16 if regression and number == count else 0
        digest = digest_of(number)
        record = {
            "digest": digest,
            "published_at": (BEGIN + timedelta(days=number)).isoformat(timespec="seconds"),
            "provenance": describe(artifact.name, number, loss, losses, drawn, gpus),
            "attachments": {},
        }
        append_event(artifact.store, log, lambda _events, record=record: record)
        losses.append(loss)
        digests.append(digest)
    return digests


def describe(name, number, loss, losses, drawn, gpus):
    """The provenance of one version."""
    passed = number != GATE_FAILS
    against = f"{name}@v{number - 1}" if losses else None
    rows = "rows-1" if number < NEW_ROWS else "rows-2"
    speed = 41_000 + drawn.gauss(0, 500) - (9_000 if number == 27 else 0)
    return {
        "git": "a" * 40,
        "dirty": False,
        "evaluation": metrics(loss, rows),
        "opponent": metrics(losses[-1], rows) if losses else {},
        "verdict": {
            "passed": passed,
            "against": against,
            "lines": [],
            "needs_person": [],
            "checks": [{"passed": passed, "name": "docs", "words": f"docs: {loss:.3f}"}],
        },
        "drift": drift(name, number, drawn),
        "run": {
            "run_seconds": 9_000 + drawn.gauss(0, 200),
            "train_seconds": 7_200 + drawn.gauss(0, 150),
            "tokens_per_second": speed,
            "ranks": gpus or 2,
            "gpus": gpus,
            "device": "NVIDIA H100 80GB HBM3" if gpus else "a CPU",
            "wandb": f"https://wandb.ai/team/runs/{number}" if number % 2 else None,
        },
    }


def metrics(loss, rows):
    tuned = {"loss": loss, "accuracy": 0.72 - 0.1 * loss, "nats_per_byte": loss / 4}
    return {"mean": {"base": 3.1, "tuned": loss}, "sources": {"docs": {"tuned": tuned}}, "validation": rows}


def drift(name, number, drawn):
    """A slow shift from SHIFT[0] to SHIFT[1]: small from version to version, above the limit over the window."""
    if number == 1:
        return {"limits": LIMITS, "note": "there is no earlier version", "references": []}
    shifting = SHIFT[0] <= number <= SHIFT[1]
    before = abs(drawn.gauss(0.012, 0.004)) + (0.035 if shifting else 0)
    oldest = before + (0.03 * min(number - SHIFT[0] + 1, 5) if SHIFT[0] <= number <= SHIFT[1] + 3 else 0.006)
    references = [reference(f"{name}@v{number - 1}", "the version before", before)]
    if number > 2:
        references.append(reference(f"{name}@v{max(number - 5, 1)}", "oldest of the last 5", oldest))
    return {"limits": LIMITS, "note": "", "references": references}


def reference(version, why, js):
    exceeds = ["JS above 0.1 bits"] if js > LIMITS["max_js_divergence"] else []
    empty = {"old": None, "new": None, "psi": None, "js": None, "largest": [], "noise": 0.0, "note": "", "exceeds": []}
    measures = [
        {**empty, "name": "scripts of the text", "kind": "distribution", "psi": 4 * js, "js": js, "exceeds": exceeds},
        {**empty, "name": "record texts seen in the earlier version", "kind": "seen", "new": 0.93 - js},
    ]
    return {"version": version, "digest": digest_of(version), "note": "", "why": [why], "measures": measures}


def decide_some(artifact, digests):
    """Promote every fifth version to production, reject the one whose gate failed."""
    from ropeway.registry.aliases import ANY, plan_promotion
    from ropeway.registry.layout import alias_log, reviews_log

    for number, digest in enumerate(digests, 1):
        if (number % 5 or number == len(digests)) and number != GATE_FAILS:
            continue
        decision = "reject" if number == GATE_FAILS else "approve"
        at = (BEGIN + timedelta(days=number, hours=6)).isoformat(timespec="seconds")
        review = {"digest": digest, "decision": decision, "by": ("anna", "ben")[number % 2], "comment": "as expected"}
        review |= {"production": None, "via": "terminal", "at": at}
        append_event(artifact.store, reviews_log(artifact.name), lambda _events, review=review: review)
        if decision == "approve":
            move = {"digest": digest, "prev": None, "by": review["by"], "reason": "better", "review": review, "at": at}
            log = alias_log(artifact.name, "production")
            events = artifact.alias("production").events
            planned = plan_promotion(events, move, ANY, where="test")
            append_event(artifact.store, log, lambda _events, planned=planned: planned)


def make_history(folder, count=30, **options):
    """Return a model with `count` synthetic versions in a registry in `folder`."""
    artifact = Registry.open(folder.as_uri()).artifact("nightly")
    artifact.check_publishing()
    decide_some(artifact, add_versions(artifact, count, **options))
    return artifact


def main(folder):
    from ropeway.reporting.history import build_history
    from ropeway.reporting.history_page import render_history, render_history_markdown

    place = Path(folder).resolve()
    artifact = make_history(place / "registry")
    total, recent = artifact.describe_recent(30)
    history = build_history(artifact.name, "s3://models/ropeway", total, recent, price=2.5)
    (place / "history.html").write_text(render_history(history), encoding="utf-8")
    (place / "history.md").write_text(render_history_markdown(history), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
