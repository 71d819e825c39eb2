"""Limits of the gate for tests: every limit besides the two of the loss is off unless a test states it."""

from ropeway.config.sections import Gate


def make_limits(**stated):
    """Return the limits; `stated` are those a test is about."""
    off = dict.fromkeys(Gate.model_fields)
    return Gate.model_validate({**off, "max_loss_increase_nats": 0.01, "min_gain_over_base_nats": 1.0, **stated})
