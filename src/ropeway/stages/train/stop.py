"""The rules that stop or rewind a run: pure functions over its log, without engine or files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ropeway.config.sections import StopRules

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """A rule's finding after a step."""

    reason: str  # what is wrong, at which steps, and the remedy
    steps: range  # steps whose rows may be the cause; empty where the loss scale is


def find_fault(log: Sequence[Line], rules: StopRules, *, fp16: bool, min_loss_scale: float | None) -> Fault | None:
    """Return the fault that the last line of `log` shows; None where training may continue.

    Args:
        log: Every step from 1 on, in a resumed run too, so counts continue across a resume.
        rules: The `stop` section of params.yaml.
        fp16: Whether gradient overflows are expected, as with a dynamic loss scale.
        min_loss_scale: The lowest loss scale; None where loss scaling is not dynamic.
    """
    line = log[-1]
    step = line["step"]
    this = range(step, step + 1)
    if not math.isfinite(line["loss"]):
        reason = f"step {step}: the loss is {line['loss']}. Lower learning_rate, or check the rows of this step"
        return Fault(reason, this)
    if not line["applied"] and not fp16:
        reason = (
            f"step {step}: a gradient is not finite, so the step was not applied. Lower learning_rate, or check the "
            "rows of this step"
        )
        return Fault(reason, this)
    if not line["applied"]:
        return _find_overflow(attempted_steps(log), rules, min_loss_scale=min_loss_scale)
    if line["grad_norm"] is not None and not math.isfinite(line["grad_norm"]):
        reason = f"step {step}: the gradient norm is {line['grad_norm']}. Lower learning_rate or max_grad_norm"
        return Fault(reason, this)
    spikes = count_spikes(log, rules)
    if spikes < rules.max_spikes_in_row:
        return None
    recent = _recent_applied(log, rules)
    begin, baseline = recent[-spikes]["step"], median(_window_losses(recent[:-spikes], rules))
    reason = (
        f"steps {begin} to {step}: {spikes} losses in a row are above stop.spike_ratio {rules.spike_ratio:g} x "
        f"{baseline:.4f}, the median before them; the last is {line['loss']:.4f}. Lower learning_rate, check the rows "
        "of these steps, or raise stop.spike_ratio"
    )
    return Fault(reason, range(begin, step + 1))


def _find_overflow(log: Sequence[Line], rules: StopRules, *, min_loss_scale: float | None) -> Fault | None:
    """Return a fault of the loss scale; rows are never its cause."""
    line, skipped = log[-1], count_skipped(log)
    if min_loss_scale is not None and line["loss_scale"] <= min_loss_scale:
        reason = (
            f"step {line['step']}: gradient overflow at the lowest loss scale, {min_loss_scale:g}; gradients do not "
            "fit into fp16. Set dtype: bf16, or lower learning_rate"
        )
        return Fault(reason, range(0))
    if skipped >= rules.max_skipped_in_row:
        reason = (
            f"step {line['step']}: {skipped} steps in a row were skipped for gradient overflow "
            f"(stop.max_skipped_in_row), the loss scale is {line['loss_scale']:g}. Lower initial_scale_power in the "
            "DeepSpeed JSON, or learning_rate"
        )
        return Fault(reason, range(0))
    return None


def attempted_steps(log: Sequence[Line]) -> list[Line]:
    """Return the steps that were attempted: all but those left out after a rewind."""
    return [line for line in log if not line.get("left_out")]


def count_skipped(log: Sequence[Line]) -> int:
    """Return how many steps in a row at the end of the log were skipped.

    >>> count_skipped([{"applied": 0}, {"applied": 1}, {"applied": 0}, {"applied": 0}])
    2
    """
    return next((back for back, line in enumerate(reversed(log)) if line["applied"]), len(log))


def count_spikes(log: Sequence[Line], rules: StopRules) -> int:
    """Return how many applied steps in a row at the end of the log are spikes; 0 until the window has been full.

    Spikes are compared with the median of the window before them, so a divergence cannot raise its own threshold.
    """
    recent = _recent_applied(log, rules)
    for spikes in range(min(rules.max_spikes_in_row, len(recent)), 0, -1):
        baseline = _window_losses(recent[:-spikes], rules)
        if baseline and min(line["loss"] for line in recent[-spikes:]) > rules.spike_ratio * median(baseline):
            return spikes
    return 0


def _recent_applied(log: Sequence[Line], rules: StopRules) -> list[Line]:
    """Return the last applied steps, at least as many as window and spikes need."""
    return [line for line in log[-4 * (rules.spike_window_steps + rules.max_spikes_in_row) :] if line["applied"]]


def _window_losses(applied: Sequence[Line], rules: StopRules) -> list[float]:
    """Return the losses of the window at the end; empty where it is not full."""
    losses = [line["loss"] for line in applied[-rules.spike_window_steps :]]
    return losses if len(losses) == rules.spike_window_steps else []
