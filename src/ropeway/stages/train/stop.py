"""When a run must end itself or go back: pure rules over its log. Nothing here touches an engine or a file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ropeway.config.params import StopRules

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """What a rule found wrong after a step."""

    why: str  # what is wrong, at which steps, and what a person can do
    steps: range  # the steps whose rows may be at fault; empty where the loss scale is


def find_fault(log: Sequence[Line], rules: StopRules, *, fp16: bool, floor: float | None) -> Fault | None:
    """Return why training must not go on after the last line of `log`; None when it may.

    Args:
        log: Every line so far; a resumed run's begins at step 1 too, so a count goes on across a resume.
        rules: The `stop` section of params.yaml.
        fp16: Whether an overflow is part of training: a dynamic loss scale makes some.
        floor: The lowest loss scale; None where the scale is not dynamic.
    """
    line = log[-1]
    step = line["step"]
    this = range(step, step + 1)
    if not math.isfinite(line["loss"]):
        why = f"step {step}: the loss is {line['loss']}. Lower learning_rate, or look at the rows of this step"
        return Fault(why, this)
    if not line["applied"] and not fp16:
        why = (
            f"step {step}: a gradient is not finite, so the step was not applied. Lower learning_rate, or look at the "
            "rows of this step"
        )
        return Fault(why, this)
    if not line["applied"]:
        return _find_overflow(made(log), rules, floor=floor)
    if line["grad_norm"] is not None and not math.isfinite(line["grad_norm"]):
        why = f"step {step}: the gradient norm is {line['grad_norm']}. Lower learning_rate or max_grad_norm"
        return Fault(why, this)
    spikes = count_spikes(log, rules)
    if spikes < rules.max_spikes_in_row:
        return None
    recent = _applied(log, rules)
    begin, calm = recent[-spikes]["step"], median(_calm(recent[:-spikes], rules))
    why = (
        f"steps {begin} to {step}: {spikes} losses in a row lie above stop.spike_ratio {rules.spike_ratio:g} x "
        f"{calm:.4f}, the median before them; the last is {line['loss']:.4f}. Lower learning_rate, look at the rows "
        "of these steps, or raise the rule"
    )
    return Fault(why, range(begin, step + 1))


def _find_overflow(log: Sequence[Line], rules: StopRules, *, floor: float | None) -> Fault | None:
    """Return what is wrong with the loss scale; no row is at fault for it."""
    line, skipped = log[-1], count_skipped(log)
    if floor is not None and line["loss_scale"] <= floor:
        why = (
            f"step {line['step']}: overflow at the lowest loss scale, {floor:g}; gradients do not fit into fp16. Use "
            "dtype: bf16, or lower learning_rate"
        )
        return Fault(why, range(0))
    if skipped >= rules.max_skipped_in_row:
        why = (
            f"step {line['step']}: {skipped} steps in a row were skipped for overflow (stop.max_skipped_in_row), the "
            f"loss scale is {line['loss_scale']:g}. Lower initial_scale_power in the DeepSpeed JSON or learning_rate"
        )
        return Fault(why, range(0))
    return None


def made(log: Sequence[Line]) -> list[Line]:
    """Return the lines of steps that were made, not passed over after a rewind."""
    return [line for line in log if not line.get("left_out")]


def count_skipped(log: Sequence[Line]) -> int:
    """Return how many steps at the end of the log were skipped.

    >>> count_skipped([{"applied": 0}, {"applied": 1}, {"applied": 0}, {"applied": 0}])
    2
    """
    return next((back for back, line in enumerate(reversed(log)) if line["applied"]), len(log))


def count_spikes(log: Sequence[Line], rules: StopRules) -> int:
    """Return how many applied steps at the end of the log lie above the rule; 0 until the window was full once.

    The spikes are measured against the calm losses before them, so a divergence cannot lift its own limit.
    """
    recent = _applied(log, rules)
    for spikes in range(min(rules.max_spikes_in_row, len(recent)), 0, -1):
        calm = _calm(recent[:-spikes], rules)
        if calm and min(line["loss"] for line in recent[-spikes:]) > rules.spike_ratio * median(calm):
            return spikes
    return 0


def _applied(log: Sequence[Line], rules: StopRules) -> list[Line]:
    """Return the applied steps among as many of the last as a window can need."""
    return [line for line in log[-4 * (rules.spike_window_steps + rules.max_spikes_in_row) :] if line["applied"]]


def _calm(applied: Sequence[Line], rules: StopRules) -> list[float]:
    """Return the losses of the window; empty where it is not full."""
    losses = [line["loss"] for line in applied[-rules.spike_window_steps :]]
    return losses if len(losses) == rules.spike_window_steps else []
