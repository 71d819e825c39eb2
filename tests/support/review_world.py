"""A registry with versions as the flow publishes them: run.json, steps.csv, samples and ledger in each package."""

import json

from ropeway.data.ledger import (
    EpochTotals,
    FindingCounts,
    Findings,
    Ledger,
    RecordTotals,
    SourceEpoch,
    SourceLedger,
    SplitTotals,
)
from ropeway.orchestration.publish import publish_package
from ropeway.orchestration.revision import Revision
from ropeway.runtime.manifest import digest_of, write_json, write_manifest
from tests.support.gate_limits import make_limits

COMMIT = Revision("a" * 40, ())
DIRTY = Revision("b" * 40, ("src/ropeway/models/rope.py",))
PROMPT = "What is a list? | <b>bold</b>"


class Profile:
    gate = make_limits()
    max_length = 512


def make_version(  # noqa: PLR0913 - what versions differ by
    workspace, loss, *, revision=COMMIT, rate=0.002, rows="rows", records=8, also=None, with_metrics=False
):
    """Make a package whose figures follow from `loss`, and publish it; return its digest.

    `with_metrics` puts eval.json into the package, as the stage does.
    """
    package = workspace.package
    package.mkdir(parents=True, exist_ok=True)
    metrics = _metrics(loss, rows) | (also or {}).get("metrics", {})
    ledger = _ledger(records)
    write_json(package / "weights.json", {"loss": loss, "rate": rate})
    if with_metrics:
        write_json(package / "eval.json", metrics)
    write_json(package / "ledger.json", ledger)
    write_json(package / "samples.json", _samples(loss))
    write_json(package / "run.json", {"params": {"learning_rate": rate, "seed": 1}, "ledger": ledger, "digests": {}})
    losses = [f"{step},{9 - (9 - loss) * step / 40},{loss + 0.1 if step % 20 == 0 else ''}" for step in range(1, 41)]
    (package / "steps.csv").write_text("\n".join(["step,loss,validation_docs", *losses]))
    write_manifest(package, {"fingerprint": "f" * 64, "digests": {"data": digest_of(records)}})
    write_json(workspace.evaluation, metrics)
    attempts = [_attempt(0, "stopped"), _attempt(20, "finished")]
    write_json(workspace.timings, {"attempts": attempts, **(also or {}).get("history", {})})
    return publish_package(workspace, Profile(), revision, lambda *_: None).digest


def _metrics(loss, rows):
    tuned = {"loss": loss, "perplexity": 2.0**loss, "accuracy": 1 / loss, "nats_per_byte": loss / 4}
    base = {"loss": 8.0, "perplexity": 256.0, "accuracy": 0.1, "nats_per_byte": 2.0}
    return {
        "sources": {"docs": {"base": base, "tuned": tuned}},
        "mean": {"base": 8.0, "tuned": loss},
        "validation": rows,
    }


def _ledger(records):
    epoch = SourceEpoch(0, 1, 4, 40, 0, 0, 1, 6, 48, 14, 34, 30)
    parts, none = (SplitTotals(7, 5, 1, 1, 0, 0), SplitTotals(70, 50, 10, 10, 0, 0)), FindingCounts("off", 0, 0, 0)
    counts = RecordTotals(records, {"no text": records - 7}, {}, 7, 0, {}, 0)
    account = SourceLedger("docs", "conversation", counts, *parts, Findings(none, none, none, 0), (epoch,))
    return json.loads(json.dumps(Ledger((account,), (EpochTotals(0, 4, 4, 4, 1, 0),)).to_json()))


def _samples(loss):
    results = [
        {"sampling_config": f"{model}/greedy", "sampling_params": {}, "outputs": [answer]}
        for model, answer in (("base", "the the"), ("tuned", f"An answer at {loss}.\n\n| with a table |"))
    ]
    return {"model_name": "laptop-40", "prompts": [{"prompt": PROMPT, "results": results}]}


def _attempt(step, ended):
    return {"began": 1.79e9 + step, "resumed_from_step": step, "ranks": 2, "seconds": 12.0, "ended": ended}
