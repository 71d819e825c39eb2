"""The bar on a stage's page shows what the stage wrote for programs, of this start alone."""

import json
import sys
import time

import pytest

from ropeway.orchestration import run_page
from ropeway.orchestration.dvc_stage import Site, progress_path, run_command
from ropeway.orchestration.run_page import ProgressArtifact
from ropeway.runtime.lock import HeldLock
from ropeway.runtime.progress import Progress, read_last_record

AWAY = "http://127.0.0.1:9/api"


def record(step, steps=10):
    return json.dumps({"step": step, "total_steps": steps, "loss": 1.0}) + "\n"


def read_progress(path):
    found = read_last_record(path)
    return (found["step"], found["total_steps"]) if found else None


@pytest.fixture
def path(tmp_path):
    path = progress_path(tmp_path, "train")
    path.parent.mkdir()
    return path


@pytest.fixture
def moved(monkeypatch):
    """What the bar tells a server that answers."""
    from uuid import UUID

    told = []
    monkeypatch.setattr(run_page, "is_answering", lambda _url: True)
    monkeypatch.setattr(run_page, "create_progress_artifact", lambda *a, **_: told.append(a[0]) or UUID(int=1))
    monkeypatch.setattr(run_page, "update_progress_artifact", lambda *a, **_: told.append(a[1]))
    return told


def test_what_training_writes_is_what_the_bar_reads(path):
    progress = Progress({}, path, path.with_name("attempts.jsonl"), None, lambda _line: None)
    line = {
        "step": 3, "total_steps": 10, "loss": 5.25, "learning_rate": 1e-3, "grad_norm": 0.5, "loss_scale": 1.0,
        "applied": 1, "applied_steps": 3, "skipped_steps": 0, "tokens": 1000, "supervised_tokens": 600,
        "seconds": 2.0, "model_flops": 4e12, "peak_memory_bytes": 1,
    }  # fmt: skip
    progress.show(line)
    assert read_progress(path) == (3, 10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        (record(1)[:-1], None),
        (record(1) + record(2)[:20], (1, 10)),
        (record(1) + record(2), (2, 10)),
        (record(5) + record(4), (4, 10)),  # rewound
        (record(6) + "\x00\x00\n", (6, 10)),  # a machine that lost power
        (record(6) + '{"step": null, "total_steps": 10}\n[1]\n3\n', (6, 10)),
        (record(0, 0), None),
        (record(11), None),
        ("\n".join(["x" * 1000] * 100) + "\n" + record(7), (7, 10)),
    ],
)
def test_the_last_whole_record_counts(path, text, expected):
    path.write_text(text)
    assert read_progress(path) == expected


def test_a_stage_without_such_a_file_has_no_bar(path, moved):
    assert read_progress(path) is None
    bar = ProgressArtifact(path, "laptop-evaluate-progress", AWAY)
    bar.refresh()
    bar.refresh(last=True)
    assert moved == []


def test_a_run_that_is_killed_leaves_the_bar_where_it_was_and_a_resumed_one_moves_on(path, moved):
    path.write_text(record(1) + record(2))
    bar = ProgressArtifact(path, "laptop-train-progress", AWAY)
    bar.refresh()
    path.write_text(record(3) + record(4)[:15])  # within the five seconds, and cut off
    bar.refresh()
    assert moved == [20.0]
    bar.refresh(last=True)
    assert moved == [20.0, 30.0]
    path.unlink()
    path.write_text(record(4))
    resumed = ProgressArtifact(path, "laptop-train-progress", AWAY)
    resumed.refresh()
    resumed.refresh(last=True)
    assert moved == [20.0, 30.0, 40.0]


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_the_file_of_an_earlier_start_is_gone_before_a_stage_starts(path, stage):
    path = path.with_name(path.name.replace("train", stage))
    path.write_text(record(10))
    look = f"import pathlib, sys; sys.exit(pathlib.Path({str(path)!r}).exists())"
    site = Site(path.parent.parent, HeldLock(None, {}))
    code, lines = run_command(site, stage, [sys.executable, "-c", look], lambda _line: None)
    assert (code, read_progress(path)) == (0, None), lines


def test_a_server_that_is_away_is_not_waited_for_and_is_told_later(path, moved, monkeypatch):
    monkeypatch.setattr(run_page, "is_answering", lambda _url: False)
    path.write_text(record(1))
    bar, began = ProgressArtifact(path, "laptop-train-progress", AWAY), time.monotonic()
    bar.refresh()
    assert time.monotonic() - began < 5
    assert moved == []
    monkeypatch.setattr(run_page, "is_answering", lambda _url: True)
    bar.refresh(last=True)
    assert moved == [10.0]
