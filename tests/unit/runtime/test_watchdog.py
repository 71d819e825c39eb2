"""A rank that hangs prints its stacks and exits with 75; a working rank is not affected."""

import subprocess
import sys
import textwrap

import pytest

from ropeway.runtime.watchdog import LEAST_SECONDS, Watchdog


def run(text):
    command = [sys.executable, "-c", textwrap.dedent(text)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_a_hanging_rank_prints_its_stacks_and_exits_with_75():
    done = run("""
        import threading
        from ropeway.runtime.watchdog import Watchdog
        def wait_for_missing_rank():
            threading.Event().wait()
        dog = Watchdog(limit_seconds=600)
        dog.heartbeat()
        dog._fixed_limit = 0.2
        dog.heartbeat()
        wait_for_missing_rank()
    """)
    assert done.returncode == 75
    assert "in wait_for_missing_rank" in done.stderr
    assert "the same command resumes from the last checkpoint" in done.stderr


def test_after_stop_the_process_is_not_ended_or_delayed():
    done = run("""
        from ropeway.runtime.watchdog import Watchdog
        dog = Watchdog(limit_seconds=0.2)
        dog.stop()
        import time; time.sleep(0.5)
        print("continued")
    """)
    assert (done.returncode, done.stdout) == (0, "continued\n")


@pytest.mark.parametrize(("interval_seconds", "limit"), [(1.0, LEAST_SECONDS), (60.0, 1200.0)])
def test_the_limit_follows_the_median_heartbeat_interval(interval_seconds, limit):
    dog = Watchdog(limit_seconds=None)
    try:
        dog._intervals.extend([interval_seconds] * 9)
        assert dog._base_limit() == limit
        with dog.extended_deadline(200 * 10**9):  # 200 GB at 20 MB/s are 10,000 s
            assert dog._limit == limit + 10_000
        assert dog._limit == limit
    finally:
        dog.stop()
