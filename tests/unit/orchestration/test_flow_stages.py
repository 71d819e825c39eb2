import errno
import json
import os
from collections import deque

import pytest

from ropeway.orchestration.dvc_stage import (
    LineCollapser,
    Site,
    StageStoppedError,
    _explain_failure,
    _lock_entry,
    find_outcome,
)
from ropeway.runtime.errors import ConfigError, DataError, RopewayError, TemporaryError
from ropeway.runtime.lock import HeldLock


@pytest.fixture
def site(tmp_path):
    (tmp_path / ".work").mkdir()
    return Site(tmp_path, HeldLock(None, {}))


def record(site, kind, **facts):
    site.record("train", kind).write_text(json.dumps({"code": 255, "signal": None, "why": None, **facts}))


@pytest.mark.parametrize(
    ("own", "kind", "says"),
    [
        ({"code": 64}, ConfigError, "failed with exit code 64"),
        ({"code": 65}, DataError, "failed with exit code 65"),
        ({"code": 75}, TemporaryError, "failed with exit code 75"),
        ({"code": 247, "signal": "SIGKILL"}, TemporaryError, "was ended by SIGKILL"),
        ({"code": 1}, RopewayError, "failed with exit code 1"),
    ],
)
def test_the_class_of_a_failure_says_what_can_be_done(site, own, kind, says):
    record(site, "exit", **own)
    record(site, "dvc")
    error = _explain_failure(site, "train", 255, {"ran": None, "failed": 255}, deque(["one", "two"]))
    assert type(error) is kind
    assert f"stage train {says}; last lines:\n    one\n    two\n  full log: {site.log('train')}" in str(error)


@pytest.mark.parametrize("dvc", [{"code": 137, "signal": "SIGKILL"}, {"code": 75, "why": "received SIGTERM"}])
def test_a_dvc_that_was_ended_from_outside_is_not_retried(site, dvc):
    record(site, "exit", code=75)
    record(site, "dvc", **dvc)
    assert type(_explain_failure(site, "train", 137, {"ran": None}, deque())) is StageStoppedError


def test_nor_is_one_whose_supervisor_was_killed(site):
    assert type(_explain_failure(site, "train", -9, {"ran": None}, deque())) is StageStoppedError


def test_without_a_record_of_its_own_dvc_s_word_for_the_code_counts(site):
    record(site, "dvc")
    assert type(_explain_failure(site, "train", 255, {"ran": None, "failed": 65}, deque())) is DataError
    assert type(_explain_failure(site, "train", 255, {"ran": None, "failed": -9}, deque())) is TemporaryError
    assert type(_explain_failure(site, "train", 255, {}, deque())) is RopewayError


def test_without_any_record_the_exit_code_of_a_stop_counts(site):
    assert type(_explain_failure(site, "train", 143, {"ran": None}, deque())) is StageStoppedError


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("ERROR: unexpected error - [Errno 28] No space left on device", TemporaryError),
        ("sqlite3.OperationalError: database or disk is full", TemporaryError),
        ("safetensors_rust.SafetensorError: I/O error: No space left on device (os error 28)", TemporaryError),
        ("OSError: [Errno 30] Read-only file system: '/data'", ConfigError),
        ("OSError: [Errno 5] Input/output error", ConfigError),
        ("OSError: [Errno 2] No such file or directory", RopewayError),
    ],
)
def test_what_a_process_printed_of_the_disk_decides_where_its_code_says_nothing(site, line, kind):
    for events in ({}, {"ran": None, "failed": 1}):
        assert type(_explain_failure(site, "train", 255, events, deque([line, "failed"]))) is kind
    assert type(_explain_failure(site, "train", 255, {"failed": 65}, deque([line]))) is DataError


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, TemporaryError), (errno.EIO, ConfigError)])
def test_a_disk_that_fails_now_is_the_reason_if_it_took_no_record_and_no_line(site, monkeypatch, number, kind):
    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    error = _explain_failure(site, "train", 255, {}, deque())
    assert type(error) is kind
    assert os.strerror(number) in str(error)
    assert [path.name for path in site.root.iterdir()] == [".work"]


def test_a_stage_of_another_folder_has_a_file_name(site):
    assert site.log("sub/dvc.yaml:train").name == "sub-dvc.yaml-train.log"


def fold(*pieces, clock=lambda: 0.0):
    folder = LineCollapser(clock=clock)
    lines = [line for piece in pieces for line in folder.feed(piece)]
    return [*lines, *folder.feed(b"", last=True)]


def test_lines_come_whole_however_their_bytes_were_cut():
    text = "größer\nzwei\r\n\nlast".encode()
    expected = ["größer", "zwei", "last"]
    assert all(fold(text[:cut], text[cut:]) == expected for cut in range(len(text)))


def test_what_a_progress_bar_overwrites_is_folded_and_its_end_is_kept():
    assert fold(b"10%\r20%\r30%\r\nnext\n") == ["10%", "30%", "next"]
    now = iter([0.0, 0.0, 9.0, 9.0, 9.0, 9.0])
    assert fold(b"10%\r20%\r30%\r", b"40%\n", clock=lambda: next(now)) == ["10%", "20%", "40%"]


def test_colours_go_and_a_long_line_is_capped():
    assert fold(b"\x1b[1;31mred\x1b[0m \x1b]8;;http://a\x07link\n") == ["red link"]
    (line,) = fold(b"x" * 5000)
    assert line == "x" * 2000 + "… (and 3,000 characters; the log file has them)"


@pytest.mark.parametrize(
    ("has_record", "events", "changed", "outcome"),
    [
        (True, {}, True, "ran"),  # whatever words DVC has for it
        (True, {"unchanged": None}, False, "ran"),
        (False, {"ran": None}, True, "ran"),  # a user's own stage, without a record
        (False, {"restored": None}, False, "restored"),  # its files were missing
        (False, {}, True, "restored"),
        (False, {"unchanged": None}, False, "unchanged"),
        (False, {}, False, "unchanged"),
    ],
)
def test_what_became_of_a_stage_is_read_from_its_record_and_dvc_lock(site, has_record, events, changed, outcome):
    if has_record:
        record(site, "exit", code=0)
    assert find_outcome(site, "train", events, changed=changed) == outcome


@pytest.mark.parametrize("text", [b"schema: '2.0'\nstages:\n", b"stages: [a]\n", b"stages: {train: ", b"\xff", b""])
def test_a_lock_file_that_is_cut_off_has_no_entry(site, text):
    (site.root / "dvc.lock").write_bytes(text)
    assert _lock_entry(site.root, "train") is None


@pytest.mark.parametrize("text", ["[]", "7", "null", '{"code": 64}', "{", ""])
def test_a_file_that_is_no_exit_record_counts_as_none(site, text):
    site.record("train", "exit").write_text(text)
    assert find_outcome(site, "train", {}, changed=False) == "unchanged"


def test_control_characters_of_a_stage_are_shown_as_escapes():
    """A name in a base or a record can hold them."""
    lines = list(LineCollapser().feed("a\tb \u009b31m \x07\u202e\n".encode(), last=True))
    assert lines == [r"a       b \x9b31m \x07\u202e"]
