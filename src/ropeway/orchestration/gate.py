"""The gate: may this model become `candidate`? A pure function of two eval.json and the profile's limits.

Losses are nats per supervised token on the validation rows, lower is better; where the two tokenizers differ, nats per
byte of the supervised text. Rounding in eval.json (6 digits) is far below any limit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ropeway.config.params import Gate


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """Whether the gate lets a model through, and every comparison it made, in words."""

    passed: bool
    lines: tuple[str, ...]

    def __str__(self) -> str:
        """Return the verdict as a person reads it."""
        return "\n".join([f"gate: {'passed' if self.passed else 'not passed'}", *(f"  {line}" for line in self.lines)])


@dataclass(frozen=True, slots=True)
class _Finding:
    holds: bool
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
        Passed only if every comparison could be made and holds: a loss that is missing or not finite fails.
    """
    findings = [_compare_with_base(metrics, limits.min_gain_over_base_nats)]
    if champion is None:
        findings.append(_Finding(holds=True, words="no champion to compare with: the first model of this name"))
    elif metrics.get("validation") != champion.get("validation") or not metrics.get("validation"):
        ours, theirs = (str(side.get("validation"))[:12] for side in (metrics, champion))
        findings.append(
            _Finding(
                holds=False,
                words=f"{champion_name} was measured on other validation rows ({theirs}…) than this model ({ours}…); "
                "losses on different rows say nothing about each other",
            )
        )
    else:
        sources = list(dict.fromkeys([*_sources(metrics), *_sources(champion)]))
        allowed = limits.max_loss_increase_nats
        # Versions of before there was this digest do not say their tokenizer; they had equal token rows.
        tokenizers = set(filter(None, (side.get("tokenizer") for side in (metrics, champion))))
        compare = _compare_bytes if len(tokenizers) > 1 else _compare_source
        findings += [compare(name, metrics, champion, allowed, champion_name) for name in sources]
        if not sources:
            findings.append(_Finding(holds=False, words="no source was measured"))
    return GateVerdict(all(finding.holds for finding in findings), tuple(finding.words for finding in findings))


def _compare_with_base(metrics: Mapping[str, object], asked: float) -> _Finding:
    base, tuned = _number(metrics, "mean", "base"), _number(metrics, "mean", "tuned")
    if base is None or tuned is None:
        return _Finding(
            holds=False, words=f"mean loss over sources: base {_shown(base)}, tuned {_shown(tuned)}: not both known"
        )
    holds = base - tuned >= asked
    return _Finding(
        holds=holds,
        words=f"mean loss over sources: base {base:.3f}, tuned {tuned:.3f}: better by {base - tuned:.3f} nats, "
        f"at least {asked:.3f} {'asked' if holds else 'were asked'}",
    )


def _compare_source(
    name: str, metrics: Mapping[str, object], champion: Mapping[str, object], allowed: float, champion_name: str
) -> _Finding:
    ours, theirs = (_number(side, "sources", name, "tuned", "loss") for side in (metrics, champion))
    if ours is None or theirs is None:
        words = f"{name}: {_shown(ours)}, {champion_name} {_shown(theirs)}: not both known"
        return _Finding(holds=False, words=words)
    change = ours - theirs
    words = f"{name}: {ours:.3f}, {champion_name} {theirs:.3f}: "
    better = f"better by {abs(change):.3f} nats"
    words += better if change <= 0 else f"worse by {change:.3f} nats, {allowed:.3f} allowed"
    return _Finding(holds=change <= allowed, words=words)


def _compare_bytes(
    name: str, metrics: Mapping[str, object], champion: Mapping[str, object], allowed: float, champion_name: str
) -> _Finding:
    """Compare across tokenizers; what is allowed a token is spread over this model's bytes a token."""
    ours, theirs = (_number(side, "sources", name, "tuned", "nats_per_byte") for side in (metrics, champion))
    tokens, size = (_number(metrics, "sources", name, "tuned", key) for key in ("tokens", "bytes"))
    if ours is None or theirs is None or not tokens or not size:
        words = f"{name}: {_shown(ours, 4)}, {champion_name} {_shown(theirs, 4)} nats a byte: not both known"
        return _Finding(holds=False, words=words)
    change, per_byte = ours - theirs, allowed * tokens / size
    words = f"{name}: {ours:.4f}, {champion_name} {theirs:.4f} nats a byte, as its tokenizer is another: "
    if change <= 0:
        return _Finding(holds=True, words=f"{words}better by {-change:.4f}")
    sum_ = f"{per_byte:.4f} allowed ({allowed:.3f} a token of {size / tokens:.2f} bytes)"
    return _Finding(holds=change <= per_byte, words=f"{words}worse by {change:.4f}, {sum_}")


def _sources(metrics: Mapping[str, object]) -> Mapping[str, object]:
    found = metrics.get("sources")
    return found if isinstance(found, Mapping) else {}


def _number(metrics: Mapping[str, object], *keys: str) -> float | None:
    """Return the finite number under those keys, else None."""
    found: object = metrics
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def _shown(loss: float | None, digits: int = 3) -> str:
    return "unknown" if loss is None else f"{loss:.{digits}f}"
