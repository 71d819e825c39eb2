"""Each rank knows whether it was asked to stop; rank 0 also reads the stop file and records what a stop needs."""

import os
import signal

import pytest

from ropeway.runtime.grace import StopFiles, StopTimes
from ropeway.stages.train.stop_request import StopRequest


@pytest.fixture(autouse=True)
def handlers():
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def files(tmp_path):
    return StopFiles(tmp_path, "train")


def request(files, *looks, stated=None, times=None, said=None):
    clock = iter(looks)
    warn = [].append if said is None else said.append
    times = StopTimes(0.0) if times is None else times
    return StopRequest(times, files, stated=stated, warn=warn, clock=lambda: next(clock))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_a_rank_to_stop(number):
    stop = request(None, 1.0, 2.0)
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop()


def test_rank_0_is_asked_through_the_file_too(files):
    stop = request(files, 1.0, 2.0, 3.0)
    assert not stop()
    assert files.request_stop()
    assert stop()
    files.remove()
    assert stop()  # once asked, always asked


def test_a_request_from_an_earlier_attempt_does_not_count(files):
    files.open()
    files.request_stop()
    assert not request(files, 1.0)()


def test_rank_0_records_the_seconds_that_a_stop_needs_as_they_grow(files):
    stop = request(files, 0.0, 92.0, 95.0, times=StopTimes(910.0, save_seconds=240.0))
    assert files.read_seconds() == 1.5 * 240 + 15
    stop()
    stop()
    assert files.read_seconds() == 1.5 * 332 + 15
    stop()
    assert files.read_seconds() == 1.5 * 332 + 15


def test_a_stated_grace_period_too_short_to_save_is_said_once_at_the_start(files):
    said = []
    stop = request(files, 0.0, 92.0, 300.0, stated=60.0, times=StopTimes(910.0), said=said)
    assert len(said) == 1
    assert "60 s" in said[0]
    assert "910 s" in said[0]
    for _ in range(3):
        stop()
    assert len(said) == 1
