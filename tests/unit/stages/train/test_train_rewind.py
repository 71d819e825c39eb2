"""When a run may go back, and when it must not."""

import pytest

from ropeway.runtime.errors import ConfigError
from ropeway.stages.train.rewind import can_rewind, check_allowed, count_used, describe
from ropeway.stages.train.running import Rewind
from ropeway.stages.train.stop import Fault

ONE = Rewind(6, 7, "step 6: the loss is nan", 4, 8, {"talk": [1, 2, 3], "text": [5, 7, 8, 9, 11, 12]})
NUMBERS, SCALE = Fault("nan", range(6, 8)), Fault("overflow", range(0))


def can(fault=NUMBERS, made=(), allowed=1, saved_step=4):
    return can_rewind(fault, made, allowed=allowed, saved_step=saved_step)


def test_a_run_goes_back_as_often_as_params_say():
    assert can()
    assert not can(allowed=0)
    assert not can(made=(ONE,))
    assert can(made=(ONE,), allowed=2)


def test_it_needs_rows_to_suspect_and_a_checkpoint_before_them():
    assert not can(SCALE)
    assert not can(saved_step=None)
    assert can(saved_step=5)
    assert not can(saved_step=6)


def test_what_was_left_out_must_still_be_allowed(tmp_path):
    check_allowed((ONE,), allowed=1, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"went back 1 times .* stop\.rewinds allows 0\. Set it to 1 at least"):
        check_allowed((ONE,), allowed=0, folder=tmp_path)


def test_a_rewind_is_told_with_the_first_of_the_sequences():
    assert describe(ONE) == (
        "back to step 4; the 8 rows of steps 6 to 7 are left out (talk 1, talk 2, talk 3, text 5, text 7, text 8, "
        "text 9, text 11 and 1 more)"
    )


def test_a_run_that_ends_says_how_often_it_went_back_and_nothing_where_no_row_is_at_fault():
    assert count_used(NUMBERS, (ONE,), allowed=1) == (
        "It went back 1 times, stop.rewinds allows 1; one more would leave out the rows of steps 6 to 7.\n"
    )
    assert count_used(SCALE, (), allowed=1) == ""
