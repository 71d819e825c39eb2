"""A rank that hangs ends with 75 and says where; one that works is left alone."""

import subprocess
import sys
import textwrap

import pytest

from ropeway.runtime.watchdog import LEAST_SECONDS, Watchdog


def run(text):
    command = [sys.executable, "-c", textwrap.dedent(text)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_a_hanging_rank_says_where_and_ends_with_75():
    done = run("""
        import threading
        from ropeway.runtime.watchdog import Watchdog
        def wait_for_a_rank_that_never_comes():
            threading.Event().wait()
        dog = Watchdog(limit_seconds=600)
        dog.heartbeat()
        dog._stated = 0.2
        dog.heartbeat()
        wait_for_a_rank_that_never_comes()
    """)
    assert done.returncode == 75
    assert "in wait_for_a_rank_that_never_comes" in done.stderr
    assert "the same command resumes from the last checkpoint" in done.stderr


def test_a_rank_that_ends_is_not_held_up_and_not_ended():
    done = run("""
        from ropeway.runtime.watchdog import Watchdog
        dog = Watchdog(limit_seconds=0.2)
        dog.stop()
        import time; time.sleep(0.5)
        print("worked on")
    """)
    assert (done.returncode, done.stdout) == (0, "worked on\n")


@pytest.mark.parametrize(("beat_seconds", "limit"), [(1.0, LEAST_SECONDS), (60.0, 1200.0)])
def test_the_limit_follows_the_usual_beat(beat_seconds, limit):
    dog = Watchdog(limit_seconds=None)
    try:
        dog._beats.extend([beat_seconds] * 9)
        assert dog._plain_limit() == limit
        with dog.extended_deadline(200 * 10**9):  # 200 GB at 20 MB/s are 10,000 s
            assert dog._limit == limit + 10_000
        assert dog._limit == limit
    finally:
        dog.stop()
