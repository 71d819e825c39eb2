"""Stages that do not train report how much is done and the time left: a record per second, a line per 15 s."""

import io
import json

import pytest

from ropeway.runtime import progress
from ropeway.runtime.progress import PROGRESS_FILE, LiveLine, StageProgress, read_last_record, track


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "evaluate.progress.jsonl"


def advance(shown, clock, *counts, seconds=1.0):
    for count in counts:
        clock.now += seconds
        shown.advance(count)


def test_a_record_per_second_has_what_is_done_and_the_time_left(path, clock):
    shown = StageProgress("batches", 10, path=path, clock=clock)
    advance(shown, clock, 1, 1, 1, seconds=0.5)
    advance(shown, clock, 1)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(one["step"], one["eta_seconds"]) for one in records] == [(2, 4.0), (4, 3.75)]
    assert read_last_record(path) == {"step": 4, "total_steps": 10, "unit": "batches", "eta_seconds": 3.75}


def test_what_an_earlier_attempt_did_is_counted_and_does_not_shorten_the_estimate(path, clock):
    shown = StageProgress("bytes", 100, path=path, clock=clock)
    shown.skip(50)
    advance(shown, clock, 10)
    assert read_last_record(path)["step"] == 60
    assert read_last_record(path)["eta_seconds"] == 4.0


def test_more_than_expected_leaves_no_total(path, clock):
    shown = StageProgress("records", 2, path=path, clock=clock)
    advance(shown, clock, 3)
    assert read_last_record(path) == {"step": 3, "total_steps": None, "unit": "records", "eta_seconds": None}


def test_a_log_gets_a_line_every_15_seconds_and_no_control_bytes(path, clock, capsys):
    with StageProgress("batches", 100, path=path, clock=clock) as shown:
        advance(shown, clock, *[1] * 40)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("]")[1].split()[0] for line in lines] == ["15", "30"]
    assert all(line.isprintable() for line in lines)


def test_a_terminal_gets_one_line_in_place_that_is_erased_at_the_end(path, clock, monkeypatch):
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    with StageProgress("batches", 100, path=path, clock=clock) as shown:
        advance(shown, clock, 1, 1)
    written = progress.sys.stdout.getvalue()
    assert "\n" not in written
    assert max(len(part) for part in written.split("\r\x1b[2K")) < 40
    assert written.endswith("\r\x1b[2K")


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_line_is_updated_in_place_where_the_cursor_can_move(path, clock, monkeypatch, term):
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setenv("TERM", term)
    advance(StageProgress("batches", 100, path=path, clock=clock), clock, *[1] * 16)
    assert ("\x1b" in progress.sys.stdout.getvalue()) == (term != "dumb")
    assert ("\n" in progress.sys.stdout.getvalue()) == (term == "dumb")


def test_without_a_file_nothing_is_written_or_printed(clock, capsys, monkeypatch):
    monkeypatch.delenv(PROGRESS_FILE, raising=False)
    monkeypatch.setattr(progress.time, "monotonic", clock)
    for _ in track([1, 2, 3], "items"):
        clock.now += 100
    assert capsys.readouterr().out == ""


def test_items_are_done_once_the_next_one_is_requested(path, clock, monkeypatch):
    monkeypatch.setenv(PROGRESS_FILE, str(path))
    monkeypatch.setattr(progress.StageProgress.__init__, "__kwdefaults__", {"path": None, "clock": clock})
    seen = []
    for item in track(["a", "b"], "items"):
        seen.append((item, (read_last_record(path) or {}).get("step")))
        clock.now += 2
    assert seen == [("a", None), ("b", 1)]


def test_another_process_shows_the_record_on_a_terminal_alone(path, monkeypatch, capsys):
    path.write_text('{"step": 1, "total_steps": 4, "unit": "batches", "eta_seconds": 3.0}\n')
    LiveLine(path).draw()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    line = LiveLine(path)
    line.draw()
    line.draw()  # unchanged: not drawn again
    line.erase()
    assert progress.sys.stdout.getvalue().count("1 of 4 batches") == 1
