"""The stop rules find non-finite losses, spikes and overflows, and nothing else."""

import math

import pytest

from ropeway.config.sections import StopRules
from ropeway.stages.train.stop import count_spikes, find_fault

RULES = StopRules(
    max_skipped_in_row=3, spike_window_steps=4, spike_ratio=2.0, max_spikes_in_row=2, rewinds=0, hang_seconds=None
)


def lines(*losses, applied=None, scale=1.0, norm=1.0):
    applied = applied or [1] * len(losses)
    return [
        {"step": n, "loss": loss, "applied": one, "grad_norm": norm if one else None, "loss_scale": scale}
        for n, (loss, one) in enumerate(zip(losses, applied, strict=True), start=1)
    ]


def fault(log, *, fp16=False, min_loss_scale=None):
    return find_fault(log, RULES, fp16=fp16, min_loss_scale=min_loss_scale)


def why(log, **options):
    found = fault(log, **options)
    return found and found.reason


def test_falling_noisy_losses_and_one_spike_are_no_fault():
    losses = [8.0, 7.0, 7.5, 6.0, 12.5, 6.0, 5.0, 5.5, 4.0]
    for length in range(1, len(losses) + 1):
        assert why(lines(*losses[:length])) is None


def test_spikes_in_a_row_are_a_fault_that_names_their_steps():
    assert why(lines(8, 7, 6, 5, 13.5)) is None
    said = why(lines(8, 7, 6, 5, 13.5, 14))
    assert said.startswith("steps 5 to 6: 2 losses in a row are above stop.spike_ratio 2 x 6.5000")


def test_a_divergence_does_not_raise_its_own_threshold():
    rules = RULES.model_copy(update={"max_spikes_in_row": 5})
    log = lines(6, 6, 6, 6, 13, 40, 100, 300)
    assert count_spikes(log, rules) == 4
    assert count_spikes([*log, lines(6)[0]], rules) == 0


def test_skipped_steps_between_spikes_and_in_the_window_do_not_hide_them():
    log = lines(6, 9, 6, 6, 6, 13, 99, 14, applied=[1, 0, 1, 1, 1, 1, 0, 1], scale=4.0)
    assert "2 losses in a row" in why(log, fp16=True)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("applied", [0, 1])
def test_a_loss_that_is_not_finite_ends_the_run_also_where_the_step_was_skipped(loss, applied):
    assert "step 2: the loss is" in why(lines(6.0, loss, applied=[1, applied]), fp16=True)


def test_a_gradient_norm_that_is_not_finite_ends_the_run():
    assert "step 1: the gradient norm is nan" in why(lines(6.0, norm=math.nan))


def test_without_fp16_a_step_that_was_not_applied_ends_the_run():
    assert "step 1: a gradient is not finite" in why(lines(6.0, applied=[0]))


def test_fp16_overflows_are_a_fault_only_when_too_many_in_a_row():
    assert why(lines(6, 6, 6, 6, 6, applied=[0, 0, 1, 0, 0], scale=1024.0), fp16=True, min_loss_scale=1.0) is None
    said = why(lines(6, 6, 6, 6, applied=[1, 0, 0, 0], scale=1024.0), fp16=True, min_loss_scale=1.0)
    assert said.startswith("step 4: 3 steps in a row were skipped")


def test_an_overflow_at_the_lowest_scale_ends_the_run_and_reaching_it_without_one_does_not():
    assert "lowest loss scale, 1" in why(lines(6, applied=[0], scale=1.0), fp16=True, min_loss_scale=1.0)
    assert why(lines(6, applied=[1], scale=1.0), fp16=True, min_loss_scale=1.0) is None


def test_rows_may_be_the_cause_of_losses_and_never_of_a_loss_scale():
    assert fault(lines(6.0, math.nan)).steps == range(2, 3)
    assert fault(lines(6.0, norm=math.nan)).steps == range(1, 2)
    assert fault(lines(6.0, applied=[0])).steps == range(1, 2)
    assert len(fault(lines(6, applied=[0], scale=1.0), fp16=True, min_loss_scale=1.0).steps) == 0
    assert len(fault(lines(6, 6, 6, applied=[0, 0, 0], scale=8.0), fp16=True, min_loss_scale=1.0).steps) == 0


def test_a_fault_has_the_steps_of_the_spikes_and_of_overflows_between_them():
    log = lines(6, 6, 6, 6, 6, 13, 99, 14, applied=[1, 1, 1, 1, 1, 1, 0, 1], scale=4.0)
    found = fault(log, fp16=True)
    assert found.steps == range(6, 9)
    assert found.reason.startswith("steps 6 to 8: 2 losses in a row")


def test_steps_left_out_after_a_rewind_are_not_counted():
    left = {"loss": None, "applied": 0, "grad_norm": None, "loss_scale": 4.0, "left_out": 128}
    log = lines(6, 6, 6, 6, 6, 6, 13, applied=[1, 1, 1, 1, 1, 0, 1], scale=4.0)
    log.insert(6, {"step": 7, **left})
    assert fault(log, fp16=True) is None
    skipped = [lines(6, applied=[0], scale=4.0)[0]] * 2
    assert fault([skipped[0], {"step": 2, **left}, skipped[1]], fp16=True, min_loss_scale=1.0) is None
    assert fault([*skipped, {"step": 3, **left}, skipped[1]], fp16=True, min_loss_scale=1.0).reason.startswith(
        "step 1: 3 steps"
    )
