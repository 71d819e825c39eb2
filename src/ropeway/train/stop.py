"""When a run must end itself: pure rules over its log. Nothing here touches an engine or a file."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from ropeway.params import StopRules

Line = dict[str, Any]


def why_stop(log: Sequence[Line], rules: StopRules, *, fp16: bool, floor: float | None) -> str | None:
    """Return why training must not go on after the last line of `log`; None when it may.

    Args:
        log: Every line so far; a resumed run's begins at step 1 too, so a count goes on across a resume.
        rules: The `stop` section of params.yaml.
        fp16: Whether an overflow is part of training: a dynamic loss scale makes some.
        floor: The lowest loss scale; None where the scale is not dynamic.
    """
    line = log[-1]
    step = line["step"]
    if not math.isfinite(line["loss"]):
        return f"step {step}: the loss is {line['loss']}. Lower learning_rate, or look at the rows of this step"
    if not line["applied"]:
        return _why_stop_skipping(log, rules, fp16=fp16, floor=floor)
    if line["grad_norm"] is not None and not math.isfinite(line["grad_norm"]):
        return f"step {step}: the gradient norm is {line['grad_norm']}. Lower learning_rate or max_grad_norm"
    spikes = count_spikes(log, rules)
    if spikes >= rules.max_spikes_in_row:
        calm = median(_calm(_applied(log, rules)[:-spikes], rules))
        return (
            f"steps {step - spikes + 1} to {step}: {spikes} losses in a row lie above stop.spike_ratio "
            f"{rules.spike_ratio:g} x {calm:.4f}, the median before them; the last is {line['loss']:.4f}. Lower "
            "learning_rate, look at the rows of these steps, or raise the rule"
        )
    return None


def _why_stop_skipping(log: Sequence[Line], rules: StopRules, *, fp16: bool, floor: float | None) -> str | None:
    line, skipped = log[-1], count_skipped(log)
    if not fp16:
        return (
            f"step {line['step']}: a gradient is not finite, so the step was not applied. Lower learning_rate, or look "
            "at the rows of this step"
        )
    if floor is not None and line["loss_scale"] <= floor:
        return (
            f"step {line['step']}: overflow at the lowest loss scale, {floor:g}; gradients do not fit into fp16. Use "
            "dtype: bf16, or lower learning_rate"
        )
    if skipped >= rules.max_skipped_in_row:
        return (
            f"step {line['step']}: {skipped} steps in a row were skipped for overflow (stop.max_skipped_in_row), the "
            f"loss scale is {line['loss_scale']:g}. Lower initial_scale_power in the DeepSpeed JSON or learning_rate"
        )
    return None


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
