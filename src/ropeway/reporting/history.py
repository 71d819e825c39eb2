"""The history of a model: every version with its metrics, drift, gate, review, time and cost, from the registry's logs.

A regression is a stated rule over the versions before: a value is flagged if it is worse than their median by more than
`SPREADS` times their spread (1.4826 times the median absolute deviation, which is the standard deviation of normal
values), and by more than the metric's smallest relative change. Losses on other validation rows are compared only where
too few versions have the same rows.
"""

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Literal

from ropeway.config.suggestion import did_you_mean
from ropeway.registry import Registry
from ropeway.reporting.drift_tables import list_flagged
from ropeway.runtime.errors import ConfigError, NotFoundError
from ropeway.runtime.manifest import Json

PRICE = "ROPEWAY_GPU_HOUR_PRICE"
WINDOW = 10  # versions before that a value is compared with
LEAST = 4  # of them, else nothing is flagged
SPREADS = 4.0
_MAD_TO_DEVIATION = 1.4826  # of normal values
_MAX_NUMBER = 1e15
_SECONDS_PER_HOUR = 3600
_BEFORE, _OLDEST = (
    "the version before",
    "oldest of",
)  # reasons of a comparison, as orchestration.drift_evidence has them


@dataclass(frozen=True, slots=True)
class HistoryMetric:
    """A number of each version that the rule of regressions looks at.

    Attributes:
        key: Attribute of `HistoryVersion`.
        least: Smallest relative change that counts.
        by_rows: Whether it depends on the validation rows.
    """

    key: str
    title: str
    unit: str
    better: Literal["lower", "higher"]
    least: float
    digits: int
    by_rows: bool = True


METRICS = (
    HistoryMetric("loss", "mean loss", "nats/token", "lower", 0.01, 3),
    HistoryMetric("nats_per_byte", "mean nats/byte", "nats/byte", "lower", 0.01, 4),
    HistoryMetric("accuracy", "mean accuracy", "", "higher", 0.01, 3),
    HistoryMetric("tokens_per_second", "training speed", "tokens/s", "higher", 0.1, 0, by_rows=False),
)


@dataclass(frozen=True, slots=True)
class Regression:
    """A value that is worse than those of the versions before.

    Attributes:
        count: Versions that it was compared with.
        same_rows: Whether all of them have the same validation rows; True for metrics without rows.
    """

    metric: str
    value: float
    median: float
    spread: float
    count: int
    same_rows: bool
    words: str

    @property
    def brief(self) -> str:
        """The metric and its relative change."""
        title = next(one.title for one in METRICS if one.key == self.metric)
        return f"{title} {(self.value - self.median) / self.median:+.1%}"


@dataclass(frozen=True, slots=True)
class HistoryVersion:
    """One version; what it does not state is None.

    Attributes:
        rows: Digest of its validation rows.
        against: The version that the gate compared it with.
        change: Mean loss minus the champion's on the same rows, in nats/token.
        gate: `passed`, `not passed`, or None without a gate.
        failed: Names of the gate's comparisons that failed.
        drift_before, drift_oldest: Largest Jensen-Shannon divergence from the version before, and from the oldest of
            the window, in bits.
        drift_limit: `gate.drift.max_js_divergence` of its publication.
        seen: Share of its record texts that the version before had.
        drifted: Quantities above a limit.
        decision, reviewer: Of its last review, or of its last promotion to production without a review.
        run_seconds: From the start of the run to the publication.
        train_seconds: Of all attempts, with evaluation and saving; of older versions the steps alone.
        gpu_hours: GPUs times training time; 0 on a CPU.
        cost: `gpu_hours` times the price of now.
        wandb: Link of its W&B run.
        compared: Keys of the metrics that enough versions before it have, so that the rule of regressions applies.
    """

    number: int
    version: str
    digest: str
    published_at: str
    aliases: tuple[str, ...]
    withdrawn: bool
    rows: str | None
    loss: float | None
    base_loss: float | None
    nats_per_byte: float | None
    accuracy: float | None
    against: str | None
    change: float | None
    gate: str | None
    failed: tuple[str, ...]
    drift_before: float | None
    drift_oldest: float | None
    drift_limit: float | None
    seen: float | None
    drifted: tuple[str, ...]
    decision: str | None
    reviewer: str | None
    run_seconds: float | None
    train_seconds: float | None
    tokens_per_second: float | None
    gpu_hours: float | None
    cost: float | None
    wandb: str | None
    regressions: tuple[Regression, ...] = ()
    compared: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class History:
    """The versions of a model, oldest first.

    Attributes:
        total: Versions in the registry; `versions` are the newest of them.
        price: Price of a GPU-hour; None if the environment states none.
    """

    name: str
    url: str
    total: int
    versions: tuple[HistoryVersion, ...]
    price: float | None

    @property
    def is_compared(self) -> bool:
        """Whether the rule of regressions applies to any of the versions."""
        return any(one.compared for one in self.versions)

    @property
    def last_regressions(self) -> tuple[Regression, ...]:
        """The regressions of the newest version."""
        return self.versions[-1].regressions if self.versions else ()

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        rule = {"window": WINDOW, "least_versions": LEAST, "spreads": SPREADS}
        return {**asdict(self), "rule": rule | {"least_change": {one.key: one.least for one in METRICS}}}


def read_price(environment: Mapping[str, str]) -> float | None:
    """Return the price of a GPU-hour, None if the environment states none.

    It is not recorded with a version: the registry keeps GPU-hours, which do not depend on who pays what.

    Raises:
        ConfigError: It is not a number of 0 or more.
    """
    stated = environment.get(PRICE, "").strip()
    if not stated:
        return None
    try:
        price = float(stated)
    except ValueError:
        price = -1.0
    if not 0 <= price < float("inf"):
        raise ConfigError(f"{PRICE}: expected a number of 0 or more, e.g. 2.5, found {stated!r}")
    return price


def read_history(registry: Registry, name: str, last: int) -> History:
    """Return the history of a model's newest versions.

    Raises:
        NotFoundError: The model has no version.
        ConfigError: The price of a GPU-hour in the environment is not a number.
    """
    price = read_price(os.environ)
    total, recent = registry.artifact(name).describe_recent(last + WINDOW)
    if not recent:
        near = did_you_mean(name, [one.name for one in registry.artifacts()])
        raise NotFoundError(
            f"{registry.url}: no version of {name} was published there{near or '.'} `ropeway registry list` lists all"
        )
    return build_history(name, registry.url, total, recent, price=price, shown=last)


def build_history(
    name: str, url: str, total: int, recent: Sequence[Json], *, price: float | None, shown: int | None = None
) -> History:
    """Return the history of a model from `Artifact.describe_recent`, with the regressions of each version.

    `shown` is the number of newest versions in it; the `WINDOW` versions before them are read for comparison only.
    """
    found: list[HistoryVersion] = []
    for facts in recent:
        one = _read_version(name, facts, price)
        compared = [metric for metric in METRICS if _is_comparable(metric, one, found)]
        worse = [regression for metric in compared if (regression := _find_regression(metric, one, found))]
        if any(regression.metric == "loss" for regression in worse):  # the same, by the byte
            worse = [regression for regression in worse if regression.metric != "nats_per_byte"]
        found.append(replace(one, regressions=tuple(worse), compared=tuple(metric.key for metric in compared)))
    return History(name, url, total, tuple(found[-shown:] if shown else found), price)


def _is_comparable(metric: HistoryMetric, one: HistoryVersion, before: Sequence[HistoryVersion]) -> bool:
    return getattr(one, metric.key) is not None and len(_newest_values(before, metric.key, LEAST)) >= LEAST


def _newest_values(
    before: Sequence[HistoryVersion], key: str, most: int, *, like: HistoryVersion | None = None
) -> list[float]:
    """Return the newest values of a metric, at most `most`; with `like`, of versions with its validation rows."""
    alike = (other for other in reversed(before) if like is None or other.rows == like.rows)
    return list(islice((value for other in alike if (value := getattr(other, key)) is not None), most))


def _find_regression(metric: HistoryMetric, one: HistoryVersion, before: Sequence[HistoryVersion]) -> Regression | None:
    """Return how a comparable value is worse than those before; None if it is not."""
    value = getattr(one, metric.key)
    alike = _newest_values(before, metric.key, WINDOW, like=one) if metric.by_rows else []
    same_rows = not metric.by_rows or len(alike) >= LEAST
    chosen = alike if metric.by_rows and same_rows else _newest_values(before, metric.key, WINDOW)
    median = statistics.median(chosen)
    spread = _MAD_TO_DEVIATION * statistics.median(abs(other - median) for other in chosen)
    worse = value - median if metric.better == "lower" else median - value
    if worse <= max(SPREADS * spread, metric.least * abs(median)):
        return None
    rows = "" if same_rows else ", on other validation rows"
    words = (
        f"{metric.title} {value:,.{metric.digits}f} {metric.unit}".rstrip()
        + f", median of the {len(chosen)} before{rows} {median:,.{metric.digits}f}"
        + (f" ({(value - median) / median:+.1%})" if median else "")
    )
    return Regression(metric.key, value, median, spread, len(chosen), same_rows, words)


def _read_version(name: str, facts: Json, price: float | None) -> HistoryVersion:
    """Return a version's row; one whose record cannot be read, which Ropeway did not write, is shown without values."""
    try:
        return _read_provenance(name, {**facts, "provenance": _without_infinities(facts["provenance"])}, price)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        empty = _read_provenance(name, {**facts, "provenance": {}}, price)
        return replace(empty, gate="not known", failed=(f"its record is damaged ({type(error).__name__})",))


def _without_infinities(value: object) -> Any:  # noqa: ANN401 - JSON
    """Return JSON without numbers that cannot be drawn: NaN, infinities and those above 1e15 in magnitude are None."""
    if isinstance(value, dict):  # of JSON; an abstract class costs five times as much
        return {key: _without_infinities(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_infinities(one) for one in value]
    return None if isinstance(value, int | float) and not abs(value) <= _MAX_NUMBER else value


def _read_provenance(name: str, facts: Json, price: float | None) -> HistoryVersion:
    provenance = facts["provenance"]
    metrics, verdict = provenance.get("evaluation") or {}, provenance.get("verdict")
    drift, run = provenance.get("drift"), provenance.get("run") or {}
    opponent = provenance.get("opponent") or {}
    gpu_hours = run["train_seconds"] * run["gpus"] / _SECONDS_PER_HOUR if _has(run, "train_seconds", "gpus") else None
    decision, reviewer = _decide(facts)
    loss = _number(metrics, "mean", "tuned")
    return HistoryVersion(
        number=facts["number"],
        version=f"{name}@v{facts['number']}",
        digest=facts["digest"],
        published_at=facts["published_at"],
        aliases=tuple(facts["aliases"]),
        withdrawn=facts["withdrawn"],
        rows=metrics.get("validation"),
        loss=loss,
        base_loss=_number(metrics, "mean", "base"),
        nats_per_byte=_mean(metrics, "nats_per_byte"),
        accuracy=_mean(metrics, "accuracy"),
        against=(verdict or {}).get("against"),
        change=_change(metrics, opponent, loss),
        gate=None if verdict is None else "passed" if verdict["passed"] else "not passed",
        failed=tuple(
            check["name"] or check["words"] for check in (verdict or {}).get("checks", ()) if not check["passed"]
        ),
        drift_before=_largest_divergence(drift, _BEFORE),
        drift_oldest=_largest_divergence(drift, _OLDEST),
        drift_limit=((drift or {}).get("limits") or {}).get("max_js_divergence"),
        seen=_seen(drift),
        drifted=tuple(list_flagged(drift)),
        decision=decision,
        reviewer=reviewer,
        run_seconds=_number(run, "run_seconds"),
        train_seconds=_number(run, "train_seconds"),
        tokens_per_second=_number(run, "tokens_per_second"),
        gpu_hours=gpu_hours,
        cost=None if price is None or not gpu_hours else price * gpu_hours,
        wandb=link if isinstance(link := run.get("wandb"), str) and link.startswith(("https://", "http://")) else None,
    )


def _decide(facts: Json) -> tuple[str | None, str | None]:
    """Return (decision, who) of the last review, else of the last promotion to production."""
    if facts["reviews"]:
        last = facts["reviews"][-1]
        return {"approve": "approved", "reject": "rejected"}.get(last["decision"], last["decision"]), last["by"]
    return ("promoted", facts["promotions"][-1]["by"]) if facts["promotions"] else (None, None)


def _change(metrics: Json, opponent: Json, loss: float | None) -> float | None:
    theirs = _number(opponent, "mean", "tuned")
    comparable = metrics.get("validation") == opponent.get("validation") and metrics.get("tokenizer") == opponent.get(
        "tokenizer"
    )
    return loss - theirs if loss is not None and theirs is not None and comparable else None


def _largest_divergence(drift: Json | None, why: str) -> float | None:
    found = [
        measure["js"]
        for reference in (drift or {}).get("references", ())
        for measure in reference["measures"]
        if any(one.startswith(why) for one in reference["why"]) and measure["js"] is not None
    ]
    return max(found, default=None)


def _seen(drift: Json | None) -> float | None:
    return next(
        (
            measure["new"]
            for reference in (drift or {}).get("references", ())
            if _BEFORE in reference["why"]
            for measure in reference["measures"]
            if measure["kind"] == "seen"
        ),
        None,
    )


def _mean(metrics: Json, key: str) -> float | None:
    """Return the mean over sources of a score of the tuned model."""
    values = [_number(source, "tuned", key) for source in (metrics.get("sources") or {}).values()]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _number(tree: object, *keys: str) -> float | None:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return float(tree) if isinstance(tree, int | float) and not isinstance(tree, bool) else None


def _has(facts: Json, *keys: str) -> bool:
    return all(isinstance(facts.get(key), int | float) for key in keys)
