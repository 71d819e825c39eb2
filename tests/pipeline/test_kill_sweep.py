"""Some kills of `make chaos` in every run of the tests, ten with `-m slow`."""

import pytest

from tests.support.kill_sweep import sweep


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_every_training_ends_with_the_same_bytes(tmp_path, kills):
    found = sweep(tmp_path, kills)
    assert found["faults"] == []
    assert found["kills"] >= kills
    assert found["finished_with_the_same_sha256"] >= 1
