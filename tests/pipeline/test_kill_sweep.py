"""Ten kills each of `make chaos`; in every run of the tests test_main_job and test_train_ends kill some."""

import hashlib

import pytest

from tests.support.kill_sweep import save_in_background, sweep

KILLS = 10


@pytest.mark.timeout(3600)
@pytest.mark.slow
@pytest.mark.parametrize("async_save", [False, True])
def test_killed_at_random_moments_every_training_ends_with_the_same_bytes(main_jobs, tmp_path, async_save):
    job = main_jobs.prepared.copy(tmp_path / "workspace")
    if async_save:
        save_in_background(job)
    found = sweep(job, KILLS)
    assert found["faults"] == []
    assert found["kills"] >= KILLS
    assert found["finished_with_the_same_sha256"] >= 1
    assert found["sha256"] == hashlib.sha256(main_jobs.finished.weights()).hexdigest()
