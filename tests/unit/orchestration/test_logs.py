"""`ropeway logs` shows a stage's lines, follows a running one to its end, and names the stages that have a log."""

import json
import os

import pytest
from typer.testing import CliRunner

from ropeway.cli.main import app
from ropeway.orchestration import log_reader
from ropeway.orchestration.log_reader import choose_stage, follow, follow_stage, read_tail
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.stage_log import log_path

HEAD = "Running stage 'train':\n> ropeway stage train tiny\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(log_reader, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(log_reader, "_CHECK_SECONDS", 0.0)
    (tmp_path / "params.yaml").write_text("profile: tiny\n")
    write(tmp_path, "train", HEAD + "step 1\n[rank 1] ready\nstep 2\n")
    return tmp_path


def write(root, stage, text, *, mode="w"):
    path = log_path(root, stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode) as log:
        log.write(text)


def texts(lines):
    return [(one.rank, one.line) for one in lines]


def test_the_last_lines_are_shown_with_their_rank(root):
    assert texts(read_tail(root, "train", 2)) == [(1, "ready"), (None, "step 2")]
    assert read_tail(root, "train", 0) == []


def test_what_dvc_advises_and_a_terminal_is_told_is_left_out(root):
    write(root, "train", "one\rtwo\rthree\n\x1b[1mbold\x1b[0m\nTo track the changes with git, run:\n\tgit add a\n")
    assert [line for _, line in texts(read_tail(root, "train", 9))] == ["one", "three", "bold"]


def test_a_running_stage_is_followed_to_its_last_line(root):
    said = [lambda: write(root, "train", "step 3\nstep", mode="a"), lambda: write(root, "train", " 4\nend", mode="a")]

    def is_running():
        if said:
            said.pop(0)()
            return True
        return False

    found = texts(follow_stage(root, "train", 1, is_running))
    assert found == [(None, line) for line in ("step 2", "step 3", "step 4", "end")]


def test_a_stage_that_does_not_run_is_shown_and_nothing_is_waited_for(root):
    assert texts(follow(root, None, first="train", lines=1)) == [(None, "step 2")]


def test_without_a_name_it_is_the_stage_that_wrote_last(root):
    write(root, "sub-dvc.yaml-late", "late\n")
    os.utime(log_path(root, "train"), (1, 1))
    assert choose_stage(root, None, None) == "sub-dvc.yaml-late"


def test_an_unknown_stage_is_refused_with_the_nearest(root):
    with pytest.raises(ConfigError, match="did you mean train"):
        choose_stage(root, "trian", None)


def test_a_log_of_another_profile_is_refused(root):
    assert choose_stage(root, "train", "tiny") == "train"
    with pytest.raises(ConfigError, match="of profile 'tiny'"):
        choose_stage(root, "train", "other")


def test_nothing_has_run(tmp_path):
    with pytest.raises(DataError, match="ropeway run"):
        choose_stage(tmp_path, None, None)


@pytest.mark.usefixtures("root")
def test_json_is_one_object_per_line():
    done = CliRunner().invoke(app, ["logs", "train", "--json", "--lines", "2"])
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"stage": "train", "rank": 1, "line": "ready"},
        {"stage": "train", "rank": None, "line": "step 2"},
    ]


def test_a_rank_is_a_number_of_plain_digits(root):
    write(root, "train", "[rank ²] x\n")
    assert texts(read_tail(root, "train", 9)) == [(None, "[rank ²] x")]


def test_of_a_long_log_the_end_is_read_from_the_beginning_of_a_line(root, monkeypatch):
    monkeypatch.setattr(log_reader, "_TAIL_BYTES", 40)
    monkeypatch.setattr(log_reader, "_LINE_BYTES", 1)
    write(root, "train", "".join(f"step {number}\n" for number in range(1000)))
    found = [line for _, line in texts(read_tail(root, "train", 3))]
    assert found == ["step 997", "step 998", "step 999"]
    followed = [line for _, line in texts(follow_stage(root, "train", 3, lambda: False))]
    assert followed == found
