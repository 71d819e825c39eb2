"""Ten kills of `make chaos`."""

import pytest

from tests.kill_sweep import sweep


@pytest.mark.timeout(1800)
def test_killed_ten_times_at_random_moments_every_training_ends_with_the_same_bytes(tmp_path):
    found = sweep(tmp_path, 10)
    assert found["faults"] == []
    assert found["finished_with_the_same_sha256"] >= 1
    assert found["resumed"] >= 1
