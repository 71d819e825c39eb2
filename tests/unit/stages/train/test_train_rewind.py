"""When a run may rewind, and what it prints."""

import pytest

from ropeway.runtime.errors import ConfigError
from ropeway.stages.train.rewind import can_rewind, check_allowed, describe, describe_rewinds_left
from ropeway.stages.train.stop import Fault
from ropeway.stages.train.training_run import Rewind

ONE = Rewind(6, 7, "step 6: the loss is nan", 4, 8, {"talk": [1, 2, 3], "text": [5, 7, 8, 9, 11, 12]})
NUMBERS, SCALE = Fault("nan", range(6, 8)), Fault("overflow", range(0))


def can(fault=NUMBERS, made=(), allowed=1, saved_step=4):
    return can_rewind(fault, made, allowed=allowed, saved_step=saved_step)


def test_a_run_rewinds_as_often_as_params_allow():
    assert can()
    assert not can(allowed=0)
    assert not can(made=(ONE,))
    assert can(made=(ONE,), allowed=2)


def test_a_rewind_needs_faulty_rows_and_a_checkpoint_before_them():
    assert not can(SCALE)
    assert not can(saved_step=None)
    assert can(saved_step=5)
    assert not can(saved_step=6)


def test_more_rewinds_than_params_allow_now_are_refused(tmp_path):
    check_allowed((ONE,), allowed=1, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"has 1 rewinds, stop\.rewinds allows 0\. Set stop\.rewinds to 1"):
        check_allowed((ONE,), allowed=0, folder=tmp_path)


def test_a_rewind_is_printed_with_steps_rows_and_the_first_sequences():
    assert describe(ONE) == (
        "resuming after step 4; the 8 rows of steps 6 to 7 are left out (talk 1, talk 2, talk 3, text 5, text 7, "
        "text 8, text 9, text 11 and 1 more)"
    )


def test_the_final_error_states_rewinds_used_unless_no_row_is_at_fault():
    assert describe_rewinds_left(NUMBERS, (ONE,), allowed=1) == (
        "Rewinds used: 1, allowed by stop.rewinds: 1; one more would leave out the rows of steps 6 to 7.\n"
    )
    assert describe_rewinds_left(SCALE, (), allowed=1) == ""
