"""A stage's log is kept wherever it is started, stays bounded, and keeps the lines of ranks apart."""

import io
import subprocess
import sys

import pytest

from ropeway.runtime import stage_log, supervise
from ropeway.runtime.stage_log import LogMirror, RankLines, log_path, open_log, split_rank, writes_to


class Writes(io.StringIO):
    """A stream that keeps each call of `write`."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def write(self, text):
        self.calls.append(text)
        return len(text)


def test_lines_of_two_ranks_written_in_pieces_stay_whole():
    shared = Writes()
    one, two = RankLines(shared, 1), RankLines(shared, 2)
    for part in ("loss ", "3.1", "\nnext\nlast"):
        one.write(part)
        two.write(part)
    one.close()
    lines = [f"[rank {rank}] {line}\n" for rank, line in ((1, "loss 3.1"), (1, "next"), (2, "loss 3.1"), (2, "next"))]
    assert shared.calls == ["".join(lines[:2]), "".join(lines[2:]), "[rank 1] last\n"]
    assert split_rank(lines[2].strip()) == (2, "loss 3.1")


@pytest.mark.parametrize("line", ["[rank x] a", "[rank 3 a", "rank 3] a", "[rank ] a"])
def test_other_lines_have_no_rank(line):
    assert split_rank(line) == (None, line)


def test_a_new_start_begins_an_empty_log_and_a_resumed_one_continues_it(tmp_path):
    path = log_path(tmp_path, "sub/dvc.yaml:train")
    for resumes, expected in ((False, b"a"), (True, b"aa"), (False, b"a")):
        with open_log(path, resumes=resumes) as log:
            log.write(b"a")
        assert path.read_bytes() == expected


def test_a_long_log_is_cut_at_a_line_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(stage_log, "MAX_BYTES", 40)
    path = tmp_path / "train.log"
    path.write_bytes(b"".join(b"line %02d\n" % number for number in range(20)))
    open_log(path, resumes=True).close()
    first, *kept = path.read_bytes().splitlines()
    assert kept == [b"line 18", b"line 19"]
    assert b"144" in first  # 18 lines of 8 bytes


def test_a_mirror_copies_what_is_appended_after_it_was_made(tmp_path, capsysbinary):
    path = tmp_path / "train.log"
    path.write_bytes(b"before\n")
    mirror = LogMirror(path)
    with path.open("ab") as log:
        log.write(b"after\n")
    mirror.close()
    assert capsysbinary.readouterr().out == b"after\n"


def test_a_supervised_command_writes_its_log_and_what_it_printed_arrives(tmp_path):
    log = tmp_path / "stage.log"
    code = (
        "import sys; from pathlib import Path; from ropeway.runtime import supervise; "
        f"sys.exit(supervise.run([sys.executable, '-c', 'print(1); raise SystemExit(65)'], "
        f"record=Path({str(tmp_path / 'a.exit.json')!r}), log=Path({str(log)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, log.read_text()) == (65, "1\n", "1\n")
    assert supervise.signal_of(65) is None


def test_a_stream_is_known_by_the_file_that_it_writes_to(tmp_path):
    path = tmp_path / "train.log"
    assert not writes_to(io.StringIO(), path)
    with path.open("w") as stream:
        assert writes_to(stream, path)
    with (tmp_path / "other").open("w") as stream:
        assert not writes_to(stream, path)
