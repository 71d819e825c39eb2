"""A stop waits as long as steps and checkpoints of this attempt need, and asks remote ranks through a file."""

import json

import pytest

from ropeway.runtime.errors import ConfigError
from ropeway.runtime.grace import StopFiles, StopTimes, grace_seconds, stated_seconds


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.delenv("ROPEWAY_GRACE_SECONDS", raising=False)
    return StopFiles(tmp_path / ".work", "train")


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        (StopTimes(0.1), 60),
        (StopTimes(0.1, check_seconds=2.0, save_seconds=1.0), 60),
        (StopTimes(0.1, check_seconds=92.0, save_seconds=240.0), 1.5 * 332 + 15),
        (StopTimes(900.0), 1.5 * 900 + 15),  # a large model before its first save
        (StopTimes(900.0, check_seconds=11.5, save_seconds=200.0), 1.5 * 211.5 + 15),
        (StopTimes.estimate(182_000_000_000), 1.5 * 910 + 15),
        (StopTimes(900.0, 2, check_seconds=10.0, save_seconds=200.0), 1.5 * 410 + 15),  # one is written meanwhile
    ],
)
def test_the_grace_period_holds_a_step_and_a_save(times, seconds):
    assert times.needed_seconds == pytest.approx(seconds)


def test_the_longest_time_between_two_looks_counts_without_saves(monkeypatch):
    times, clock = StopTimes(900.0), iter([100.0, 130.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with times.measure_save():
        pass
    for now in (90.0, 92.0, 100.0):
        times.look(now)
    times.leave_out(30.0)
    times.look(131.0)
    assert (times.check_seconds, times.save_seconds) == (8.0, 30.0)


def test_the_environment_overrides_what_the_ranks_recorded(files, monkeypatch):
    assert grace_seconds(files) == 60
    files.open()
    files.write_seconds(513.0)
    assert grace_seconds(files) == 513
    monkeypatch.setenv("ROPEWAY_GRACE_SECONDS", "7.5")
    assert grace_seconds(files) == 7.5


@pytest.mark.parametrize("stated", ["", "1 min", "-1", "0", "nan", "inf"])
def test_a_grace_period_that_is_no_number_is_a_config_error(stated):
    with pytest.raises(ConfigError, match="ROPEWAY_GRACE_SECONDS"):
        stated_seconds({"ROPEWAY_GRACE_SECONDS": stated})


def test_a_stated_grace_period_too_short_for_a_save_is_named_with_what_it_needs():
    times = StopTimes(910.0)
    assert times.describe_shortage(None) is None
    assert times.describe_shortage(911.0) is None
    assert "is 60 s" in times.describe_shortage(60.0)
    assert "estimated" in times.describe_shortage(60.0)
    measured = StopTimes(910.0, check_seconds=11.0, save_seconds=50.0)
    assert "11 s" in measured.describe_shortage(60.0)
    assert "measured" in measured.describe_shortage(60.0)
    assert measured.describe_shortage(61.0) is None


def test_ranks_are_asked_through_a_file_only_while_they_train(files, tmp_path):
    assert not files.request_stop()
    assert not files.is_stop_requested()
    files.open()
    assert not files.is_stop_requested()
    assert files.request_stop()
    assert files.is_stop_requested()
    files.open()  # the next start
    assert not files.is_stop_requested()
    files.remove()
    assert not files.request_stop()
    assert list((tmp_path / ".work").iterdir()) == []


def test_a_damaged_record_of_the_seconds_counts_as_none(files, tmp_path):
    files.open()
    for text in ("", "{", "[]", json.dumps({"seconds": None})):
        (tmp_path / ".work" / "train.grace.json").write_text(text)
        assert files.read_seconds() is None
