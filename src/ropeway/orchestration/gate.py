"""The gate: may this model become `candidate`? A pure function of two eval.json and the profile's limits.

Losses are nats per supervised token on the validation rows, lower is better; where the two tokenizers differ, nats per
byte of the supervised text. The rounding in eval.json (6 digits) is far below any limit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ropeway.config.params import Gate


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """Whether the gate passed, and a sentence for every comparison it made."""

    passed: bool
    lines: tuple[str, ...]

    def __str__(self) -> str:
        """Return the verdict as text."""
        return "\n".join([f"gate: {'passed' if self.passed else 'not passed'}", *(f"  {line}" for line in self.lines)])


@dataclass(frozen=True, slots=True)
class _MetricCheck:
    passed: bool
    words: str


def gate(
    metrics: Mapping[str, object],
    champion: Mapping[str, object] | None,
    limits: Gate,
    *,
    champion_name: str = "the champion",
) -> GateVerdict:
    """Return whether a model may take the champion's place.

    `metrics` and `champion` are two eval.json, of the same rows; the first model of a name has no champion.

    Returns:
        Passed only if every comparison could be made and passed; a missing or non-finite loss fails.
    """
    checks = [_compare_with_base(metrics, limits.min_gain_over_base_nats)]
    if champion is None:
        checks.append(
            _MetricCheck(passed=True, words="no champion to compare with: this is the first version of this model")
        )
    elif metrics.get("validation") != champion.get("validation") or not metrics.get("validation"):
        ours, theirs = (str(side.get("validation"))[:12] for side in (metrics, champion))
        checks.append(
            _MetricCheck(
                passed=False,
                words=f"{champion_name} was evaluated on other validation rows ({theirs}…) than this model ({ours}…); "
                "losses on different rows cannot be compared",
            )
        )
    else:
        sources = list(dict.fromkeys([*_sources(metrics), *_sources(champion)]))
        allowed = limits.max_loss_increase_nats
        # Versions from before this digest existed do not record their tokenizer; their token rows were equal.
        tokenizers = set(filter(None, (side.get("tokenizer") for side in (metrics, champion))))
        compare = _compare_bytes if len(tokenizers) > 1 else _compare_source
        checks += [compare(name, metrics, champion, allowed, champion_name) for name in sources]
        if not sources:
            checks.append(_MetricCheck(passed=False, words="no source was evaluated"))
    return GateVerdict(all(check.passed for check in checks), tuple(check.words for check in checks))


def describe_change(metrics: Mapping[str, object], champion: Mapping[str, object] | None, who: str) -> str:
    """Return one sentence: whether a model's mean validation loss is better than the champion's.

    Args:
        metrics: The model's eval.json.
        champion: The champion's eval.json; None if there is none.
        who: What the champion is, e.g. `production (laptop@v1)`.
    """
    if champion is None:
        return f"not compared: there is no {who}"
    if not metrics.get("validation") or metrics["validation"] != champion.get("validation"):
        return f"not comparable with {who}, which was evaluated on other validation rows"
    if len(set(filter(None, (side.get("tokenizer") for side in (metrics, champion))))) > 1:
        return f"compared with {who} by source in nats/byte, because the tokenizers differ: see the gate"
    ours, theirs = (_number(side, "mean", "tuned") for side in (metrics, champion))
    if ours is None or theirs is None:
        return f"not comparable with {who}: a mean loss is missing"
    change = round(ours - theirs, 3)
    verdict = "the same as" if not change else "better than" if change < 0 else "WORSE than"
    return f"{verdict} {who}: mean loss {ours:.3f}, was {theirs:.3f} ({_signed(change)} nats/token)"


def _compare_with_base(metrics: Mapping[str, object], required: float) -> _MetricCheck:
    base, tuned = _number(metrics, "mean", "base"), _number(metrics, "mean", "tuned")
    if base is None or tuned is None:
        return _MetricCheck(
            passed=False, words=f"mean loss over sources: base {_shown(base)}, tuned {_shown(tuned)}: one is unknown"
        )
    gain = base - tuned
    return _MetricCheck(
        passed=gain >= required,
        words=f"mean loss over sources: base {base:.3f}, tuned {tuned:.3f}: gain {_signed(gain)} nats/token, "
        f"required {required:.3f}",
    )


def _compare_source(
    name: str, metrics: Mapping[str, object], champion: Mapping[str, object], allowed: float, champion_name: str
) -> _MetricCheck:
    ours, theirs = (_number(side, "sources", name, "tuned", "loss") for side in (metrics, champion))
    if ours is None or theirs is None:
        words = f"{name}: {_shown(ours)}, {champion_name} {_shown(theirs)}: one is unknown"
        return _MetricCheck(passed=False, words=words)
    change = ours - theirs
    words = f"{name}: {ours:.3f}, {champion_name} {theirs:.3f}: "
    words += f"{_signed(change)} nats/token, allowed +{allowed:.3f}"
    return _MetricCheck(passed=change <= allowed, words=words)


def _compare_bytes(
    name: str, metrics: Mapping[str, object], champion: Mapping[str, object], allowed: float, champion_name: str
) -> _MetricCheck:
    """Compare across tokenizers; the allowance in nats/token is divided by this model's bytes/token."""
    ours, theirs = (_number(side, "sources", name, "tuned", "nats_per_byte") for side in (metrics, champion))
    tokens, size = (_number(metrics, "sources", name, "tuned", key) for key in ("tokens", "bytes"))
    if ours is None or theirs is None or not tokens or not size:
        words = f"{name}: {_shown(ours, 4)}, {champion_name} {_shown(theirs, 4)} nats/byte: one is unknown"
        return _MetricCheck(passed=False, words=words)
    change, per_byte = ours - theirs, allowed * tokens / size
    words = f"{name}: {ours:.4f}, {champion_name} {theirs:.4f} nats/byte (its tokenizer differs): "
    words += (
        f"{_signed(change, 4)}, allowed +{per_byte:.4f} ({allowed:.3f} nats/token at {size / tokens:.2f} bytes/token)"
    )
    return _MetricCheck(passed=change <= per_byte, words=words)


def _sources(metrics: Mapping[str, object]) -> Mapping[str, object]:
    found = metrics.get("sources")
    return found if isinstance(found, Mapping) else {}


def _number(metrics: Mapping[str, object], *keys: str) -> float | None:
    """Return the finite number at a path of keys, or None."""
    found: object = metrics
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def _shown(loss: float | None, digits: int = 3) -> str:
    return "unknown" if loss is None else f"{loss:.{digits}f}"


def _signed(change: float, digits: int = 3) -> str:
    return f"{round(change, digits) + 0.0:+.{digits}f}"  # never -0.000
