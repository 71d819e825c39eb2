"""The gate: may this model become `candidate`? A pure function of two eval.json and the profile's limits.

Losses are nats per supervised token on the validation rows, lower is better; where the two tokenizers differ, nats per
byte of the supervised text. What users notice beyond the loss (accuracy, loss at long range, passkeys, tasks) has a
limit each, in params.yaml: docs/decisions/0019. eval.json rounds to 6 digits, far below any limit, and so does the
comparison: a change of exactly the limit passes.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ropeway.config.sections import Gate
from ropeway.data.task_scores import name_metrics, standard_error

Metrics = Mapping[str, object]  # eval.json
Scores = Mapping[str, float | None]  # name of a score, as the verdict shows it -> value; None: not a finite number
_DIGITS = 6  # of eval.json
_TASK_FACTS = ("version", "shots", "n")  # scores of a task are comparable if these are equal


@dataclass(frozen=True, slots=True)
class GateCheck:
    """One comparison. The parts of `words` are also apart, as they are shown in a table."""

    passed: bool
    words: str  # one sentence with all of it
    name: str = ""  # what is compared; empty: there are no two values
    ours: str = ""
    theirs: str = ""
    against: str = ""  # whose value `theirs` is
    change: str = ""
    allowed: str = ""


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """Whether the gate passed, and every comparison it made."""

    passed: bool
    checks: tuple[GateCheck, ...]
    needs_person: tuple[str, ...] = ()  # reasons for a person to look at it although it passed, e.g. data drift

    @property
    def lines(self) -> tuple[str, ...]:
        """A sentence for every comparison."""
        return tuple(check.words for check in self.checks)

    @property
    def failed(self) -> tuple[str, ...]:
        """A sentence for every comparison that did not pass."""
        return tuple(check.words for check in self.checks if not check.passed)

    def __str__(self) -> str:
        """Return the verdict as text, a comparison per line."""
        lines = (f"  {'passed' if check.passed else 'FAILED'}  {check.words}" for check in self.checks)
        asks = (f"  PERSON  {reason}" for reason in self.needs_person)
        return "\n".join([f"gate: {'passed' if self.passed else 'not passed'}", *lines, *asks])


@dataclass(frozen=True, slots=True)
class _Pair:
    """This model and its champion; the first version of a model has none."""

    ours: Metrics
    champion: Metrics | None
    champion_name: str
    max_length: int

    @property
    def same_rows(self) -> bool:
        rows = self.ours.get("validation")
        return bool(rows) and self.champion is not None and rows == self.champion.get("validation")

    @property
    def same_tokenizer(self) -> bool:
        # Versions from before this digest existed do not record their tokenizer; their token rows were equal.
        return len(set(filter(None, (side.get("tokenizer") for side in (self.ours, self.champion or {}))))) <= 1


@dataclass(frozen=True, slots=True)
class _Skill:
    """A section of eval.json whose scores are compared one by one.

    Attributes:
        read: From (eval.json, `base` or `tuned`, max_length) to the scores.
        limit: The key of params.yaml that limits it.
    """

    section: str
    title: str
    read: Callable[[Metrics, str, int], Scores]
    limit: str
    better: Literal["lower", "higher"]
    unit: str = ""
    of_tokens: bool = False  # a value per token: not comparable across tokenizers


def gate(
    metrics: Metrics,
    champion: Metrics | None,
    limits: Gate,
    *,
    max_length: int,
    champion_name: str = "the champion",
) -> GateVerdict:
    """Return whether a model may take the champion's place.

    `metrics` and `champion` are two eval.json, of the same rows; the first model of a name has no champion. Skills at
    lengths beyond `max_length` are not compared.

    Returns:
        Passed only if every comparison could be made and passed. A value that is not finite, or that only one of the
        two has, fails.
    """
    pair = _Pair(metrics, champion, champion_name, max_length)
    checks = [
        _compare_with_base(metrics, limits.min_gain_over_base_nats),
        *_check_losses(pair, limits.max_loss_increase_nats),
        *_check_accuracy(pair, limits.max_accuracy_decrease),
        *(check for skill in _SKILLS for check in _check_skill(pair, skill, getattr(limits, skill.limit))),
        *_check_passkey_minimum(pair, limits.min_passkey_accuracy),
        *_check_tasks(pair, limits.max_task_decrease_errors),
    ]
    return GateVerdict(all(check.passed for check in checks), tuple(checks))


def sections_to_measure(metrics: Metrics, champion: Metrics, limits: Gate) -> dict[str, str]:
    """Return the sections of eval.json that the champion must be evaluated on again, each with what identifies it.

    A section is needed if a limit compares it and the champion's recorded one is of other rows, other questions or
    other versions of a task, or if the champion, an older version, has none.
    """
    pair = _Pair(metrics, champion, "", 0)
    needed = {}
    if isinstance(rows := metrics.get("validation"), str) and not pair.same_rows:
        needed["losses"] = rows
    for skill in _SKILLS:
        own = _identity(metrics, skill.section)
        is_compared = getattr(limits, skill.limit) is not None and (pair.same_tokenizer or not skill.of_tokens)
        if own and is_compared and own != _identity(champion, skill.section):
            needed[skill.section] = own
    if limits.max_task_decrease_errors is not None:
        facts = {name: _task_facts(metrics, name) for name in _mapping(metrics, "tasks")}
        own = _identity(metrics, "tasks")
        is_same = _is_same_section(pair, "tasks") and all(_task_facts(champion, one) == facts[one] for one in facts)
        if facts and own and not is_same:
            needed["tasks"] = json.dumps([own, facts], sort_keys=True)
    return needed


def describe_change(metrics: Metrics, champion: Metrics | None, who: str) -> str:
    """Return one sentence: whether a model's mean validation loss is better than the champion's.

    Args:
        metrics: The model's eval.json.
        champion: The champion's eval.json; None if there is none.
        who: What the champion is, e.g. `production (laptop@v1)`.
    """
    if champion is None:
        return f"not compared: there is no {who}"
    pair = _Pair(metrics, champion, who, 0)
    if not pair.same_rows:
        return f"not comparable with {who}, which was evaluated on other validation rows"
    if not pair.same_tokenizer:
        return f"compared with {who} by source in nats/byte, because the tokenizers differ: see the gate"
    ours, theirs = (_number(side, "mean", "tuned") for side in (metrics, champion))
    if ours is None or theirs is None:
        return f"not comparable with {who}: a mean loss is missing"
    change = round(ours - theirs, 3)
    verdict = "the same as" if not change else "better than" if change < 0 else "WORSE than"
    return f"{verdict} {who}: mean loss {ours:.3f}, was {theirs:.3f} ({_signed(change)} nats/token)"


def _compare_with_base(metrics: Metrics, required: float) -> GateCheck:
    base, tuned = _number(metrics, "mean", "base"), _number(metrics, "mean", "tuned")
    name = "mean loss over sources"
    if base is None or tuned is None:
        words = f"{name}: base {_shown(base)}, tuned {_shown(tuned)}"
        return _unknown(words, name, (_shown(tuned), _shown(base)), "the base")
    gain = base - tuned
    words = f"{name}: base {base:.3f}, tuned {tuned:.3f}: gain {_signed(gain)} nats/token, required {required:.3f}"
    passed = round(required - gain, _DIGITS) <= 0
    change, allowed = f"{_signed(-gain)} nats/token", _signed(-required)
    return GateCheck(passed, words, name, _shown(tuned), _shown(base), "the base", change, allowed)


def _check_losses(pair: _Pair, allowed: float) -> Iterator[GateCheck]:
    if pair.champion is None:
        yield _note("no champion to compare with: this is the first version of this model")
        return
    if not pair.same_rows:
        ours, theirs = (str(side.get("validation"))[:12] for side in (pair.ours, pair.champion))
        yield _fault(
            f"{pair.champion_name} was evaluated on other validation rows ({theirs}…) than this model ({ours}…); "
            "losses on different rows cannot be compared"
        )
        return
    compare = _compare_source if pair.same_tokenizer else _compare_bytes
    names = list(dict.fromkeys([*_mapping(pair.ours, "sources"), *_mapping(pair.champion, "sources")]))
    yield from (compare(name, pair, allowed) for name in names)
    if not names:
        yield _fault("no source was evaluated")


def _compare_source(name: str, pair: _Pair, allowed: float) -> GateCheck:
    ours, theirs = (_number(side, "sources", name, "tuned", "loss") for side in (pair.ours, pair.champion))
    return _compare(name, ours, theirs, allowed, against=pair.champion_name, better="lower", unit="nats/token")


def _compare_bytes(name: str, pair: _Pair, allowed: float) -> GateCheck:
    """Compare across tokenizers; the allowance in nats/token is divided by this model's bytes/token."""
    ours, theirs = (_number(side, "sources", name, "tuned", "nats_per_byte") for side in (pair.ours, pair.champion))
    tokens, size = (_number(pair.ours, "sources", name, "tuned", key) for key in ("tokens", "bytes"))
    shown, against = (_shown(ours, 4), _shown(theirs, 4)), pair.champion_name
    if ours is None or theirs is None or not tokens or not size:
        return _unknown(f"{name}: {shown[0]}, {against} {shown[1]} nats/byte", name, shown, against)
    change, per_byte = ours - theirs, allowed * tokens / size
    words = f"{name}: {shown[0]}, {against} {shown[1]} nats/byte (its tokenizer differs): "
    words += (
        f"{_signed(change, 4)}, allowed +{per_byte:.4f} ({allowed:.3f} nats/token at {size / tokens:.2f} bytes/token)"
    )
    parts = (f"{_signed(change, 4)} nats/byte", f"+{per_byte:.4f}")
    return GateCheck(round(change - per_byte, _DIGITS) <= 0, words, name, *shown, against, *parts)


def _check_accuracy(pair: _Pair, allowed: float | None) -> Iterator[GateCheck]:
    """Yield the token accuracy of every source; where losses are not comparable, that check has failed already."""
    if allowed is None or pair.champion is None or not pair.same_rows:
        return
    if not pair.same_tokenizer:
        yield _note(f"accuracy: not compared, because the tokenizer of {pair.champion_name} differs; nats/byte are")
        return
    for name in dict.fromkeys([*_mapping(pair.ours, "sources"), *_mapping(pair.champion, "sources")]):
        ours, theirs = (_number(side, "sources", name, "tuned", "accuracy") for side in (pair.ours, pair.champion))
        yield _compare(f"{name}, accuracy", ours, theirs, allowed, against=pair.champion_name, better="higher")


def _check_skill(pair: _Pair, skill: _Skill, allowed: float | None) -> Iterator[GateCheck]:
    """Yield each score of a section, compared with the champion's, or with the base's where there is no champion."""
    if allowed is None:
        return
    side, model, against = pair.ours, "base", "the base"
    if pair.champion is not None and (pair.same_tokenizer or not skill.of_tokens):
        side, model, against = pair.champion, "tuned", pair.champion_name
    ours, theirs = skill.read(pair.ours, "tuned", pair.max_length), skill.read(side, model, pair.max_length)
    if not ours and not theirs:
        yield _note(f"{skill.title}: neither evaluation has any, so gate.{skill.limit} compares nothing")
    elif side is pair.champion and not _is_same_section(pair, skill.section):
        yield _fault(_remedy(pair, skill))
    else:
        for name in dict.fromkeys([*ours, *theirs]):
            values = (ours.get(name), theirs.get(name))
            yield _compare(name, *values, allowed, against=against, better=skill.better, unit=skill.unit)


def _remedy(pair: _Pair, skill: _Skill) -> str:
    """Return why a section cannot be compared with the champion's, and what to do."""
    if _identity(pair.ours, skill.section) is None:
        return (
            f"{skill.title}: this model's evaluation has none, or does not say of what. State them in `evaluation` and "
            f"run `dvc repro evaluate`, or set gate.{skill.limit}: null"
        )
    return (
        f"{skill.title}: {pair.champion_name} was not evaluated on these, and evaluating it now failed (the reason is "
        f"in the log of publish). Remove the reason, promote another version, or set gate.{skill.limit}: null"
    )


def _check_passkey_minimum(pair: _Pair, minimum: float | None) -> Iterator[GateCheck]:
    if minimum is None:
        return
    found = _read_passkeys(pair.ours, "tuned", pair.max_length)
    for name, share in found.items():
        words = f"{name}: {_shown(share)}, required {minimum:.3f}"
        passed = share is not None and round(minimum - share, _DIGITS) <= 0
        yield GateCheck(passed, words, name, _shown(share), allowed=f"at least {minimum:.3f}")
    if not found:
        yield _fault(
            f"passkeys: this evaluation has none up to {pair.max_length:,} tokens, required {minimum:.3f}. Add such a "
            "length to evaluation.passkey.lengths, or set gate.min_passkey_accuracy: null"
        )


def _check_tasks(pair: _Pair, errors: float | None) -> Iterator[GateCheck]:
    """Yield every metric of every task; a change within `errors` combined standard errors passes."""
    if errors is None or pair.champion is None:
        return
    names = list(dict.fromkeys([*_mapping(pair.ours, "tasks"), *_mapping(pair.champion, "tasks")]))
    if not names:
        yield _note("tasks: neither evaluation has any, so gate.max_task_decrease_errors compares nothing")
    for name in names:
        ours, theirs = (_task_facts(side, name) for side in (pair.ours, pair.champion))
        if ours is None:
            yield _fault(
                f"task {name}: unknown for this model, but {pair.champion_name} has it. Add it to evaluation.tasks, or "
                "promote a version without it by hand: `ropeway registry promote`"
            )
        elif ours != theirs or not _is_same_section(pair, "tasks"):
            yield _fault(
                f"task {name}: {pair.champion_name} was not evaluated on this version of it, and evaluating it now "
                "failed (the reason is in the log of publish). Remove the reason, promote another version, or set "
                "gate.max_task_decrease_errors: null"
            )
        else:
            yield from _compare_task(name, pair, errors)


def _compare_task(task: str, pair: _Pair, errors: float) -> Iterator[GateCheck]:
    ours, theirs = (_mapping(side, "tasks", task, "tuned") for side in (pair.ours, pair.champion or {}))
    lower = _mapping(pair.ours, "tasks", task).get("lower_is_better")
    for metric in name_metrics(dict.fromkeys([*ours, *theirs])):
        spread = [_number(side, standard_error(metric)) for side in (ours, theirs)]
        combined = math.hypot(*(error or 0.0 for error in spread))
        is_lower = isinstance(lower, list) and metric.partition(",")[0] in lower
        yield _compare(
            f"{task}, {metric}",
            _number(ours, metric),
            _number(theirs, metric),
            errors * combined,
            against=pair.champion_name,
            better="lower" if is_lower else "higher",
            note="no standard error" if None in spread else f"{errors:g} standard errors of {combined:.3f}",
        )


def _compare(  # noqa: PLR0913 - two values and how they are compared
    name: str,
    ours: float | None,
    theirs: float | None,
    allowed: float,
    *,
    against: str,
    better: Literal["lower", "higher"],
    unit: str = "",
    note: str = "",
) -> GateCheck:
    """Compare two values: a change for the worse of at most `allowed` passes."""
    shown = (_shown(ours), _shown(theirs))
    words = f"{name}: {shown[0]}, {against} {shown[1]}"
    if ours is None or theirs is None:
        return _unknown(words, name, shown, against)
    change, sign = ours - theirs, 1 if better == "lower" else -1
    moved = " ".join(filter(None, (_signed(change), unit)))
    limit = f"{'+' if sign > 0 else '-'}{allowed:.3f}" + (f" ({note})" if note else "")
    passed = round(sign * change - allowed, _DIGITS) <= 0
    return GateCheck(passed, f"{words}: {moved}, allowed {limit}", name, *shown, against, moved, limit)


def _unknown(words: str, name: str, shown: tuple[str, str], against: str) -> GateCheck:
    return GateCheck(
        passed=False, words=f"{words}: one is unknown", name=name, ours=shown[0], theirs=shown[1], against=against
    )


def _note(words: str) -> GateCheck:
    return GateCheck(passed=True, words=words)


def _fault(words: str) -> GateCheck:
    return GateCheck(passed=False, words=words)


def _read_positions(metrics: Metrics, model: str, _max_length: int) -> Scores:
    found = _mapping(metrics, "positions", "beyond")
    return {"loss beyond max_length": _number(found, model)} if model in found else {}


def _read_passkeys(metrics: Metrics, model: str, max_length: int) -> Scores:
    found = _mapping(metrics, "passkey", model, "by_length")
    return {
        f"passkeys at {int(length):,} tokens": _number(found, length)
        for length in found
        if length.isdigit() and int(length) <= max_length
    }


def _read_long_context(metrics: Metrics, model: str, max_length: int) -> Scores:
    kinds = _mapping(metrics, "long_context", model, "by_kind")
    return {
        f"{kind} at {int(length):,} tokens": _number(kinds, kind, length)
        for kind in kinds
        for length in _mapping(kinds, kind)
        if length.isdigit() and int(length) <= max_length
    }


_SKILLS = (
    _Skill(
        "positions",
        "loss beyond max_length",
        _read_positions,
        "max_position_loss_increase_nats",
        better="lower",
        unit="nats/token",
        of_tokens=True,
    ),
    _Skill("passkey", "passkeys", _read_passkeys, "max_passkey_decrease", better="higher"),
    _Skill("long_context", "long context", _read_long_context, "max_long_context_decrease", better="higher"),
)


def _is_same_section(pair: _Pair, section: str) -> bool:
    own = _identity(pair.ours, section)
    return own is not None and own == _identity(pair.champion or {}, section)


def _identity(metrics: Metrics, section: str) -> str | None:
    """Return the digest of what a section of eval.json measured; None where an older evaluation does not state it."""
    found = _mapping(metrics, "identities").get(section)
    return found if isinstance(found, str) else None


def _task_facts(metrics: Metrics, task: str) -> dict[str, object] | None:
    found = _mapping(metrics, "tasks").get(task)
    return {key: found.get(key) for key in _TASK_FACTS} if isinstance(found, Mapping) else None


def _mapping(metrics: Metrics, *keys: str) -> Mapping[str, object]:
    """Return the mapping at a path of keys, or an empty one."""
    found: object = metrics
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _number(metrics: Metrics | None, *keys: str) -> float | None:
    """Return the finite number at a path of keys, or None."""
    found: object = metrics
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def _shown(value: float | None, digits: int = 3) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"


def _signed(change: float, digits: int = 3) -> str:
    return f"{round(change, digits) + 0.0:+.{digits}f}"  # never -0.000
