"""Evaluate in several processes: the same files as by one, and what happens to them when one of the processes dies."""

import json
import os
import subprocess
import sys

import psutil
import pytest
import torch

from ropeway.runtime.errors import ConfigError, RopewayError
from ropeway.stages.evaluate import stage as evaluation
from ropeway.stages.evaluate.champion import measure_champion
from ropeway.stages.evaluate.evaluation_workers import run_shares
from tests.support import forked
from tests.support.processes import command_of, count_threads
from tests.support.tiny_run import BLOCK, ROOT, make_run

PAIR = (None, None)


def start(workspace, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ROPEWAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "ropeway.cli.main", "execute-stage", "evaluate"],
        cwd=workspace.root,
        env={**kept, "PYTHONPATH": str(ROOT / "src"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def evaluate(workspace, *, code=0, **environment):
    """Evaluate to the end; return what was printed."""
    with start(workspace, **environment) as process:
        text = process.stdout.read()
    assert process.returncode == code, text
    return text


def evaluate_alone(workspace):
    """Evaluate in one process, a forked one; return what was printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ROPEWAY_")}
    command = [sys.executable, "-m", "ropeway.cli.main", "execute-stage", "evaluate"]
    return forked.run(command, cwd=workspace.root, env=kept, check=True).stdout


def left(workspace):
    """Every file that evaluate leaves, and its bytes."""
    files = (workspace.evaluation, workspace.samples, *sorted(workspace.tables.iterdir()))
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize("measuring_champion", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_one_process_and_two_write_equal_files(tmp_path, monkeypatch, measuring_champion):
    workspace, profile = make_run(tmp_path)
    seen, lines = [], []
    for workers in ("", "2"):
        text = evaluate(workspace, ROPEWAY_EVALUATE_WORKERS=workers) if workers else evaluate_alone(workspace)
        assert f"evaluate: {workers or 1} process" in text
        seen.append(left(workspace))
        lines.append([line for line in text.splitlines() if "nats/token" in line or "passkey" in line])
        workspace.evaluation.rename(tmp_path / "eval.json")
    assert set(seen[0]) > {"eval.json", "samples.json", "passkey_answers.csv", "positions.csv"}
    assert seen[0] == seen[1]
    assert len(lines[0]) == 6
    assert lines[0] == lines[1]
    monkeypatch.setenv("ROPEWAY_EVALUATE_WORKERS", measuring_champion)
    measure_champion(workspace, profile, workspace.model, tmp_path / "champion.json", ["losses"])
    own, champion = (json.loads((tmp_path / name).read_text())["sources"] for name in ("eval.json", "champion.json"))
    assert [one["tuned"] for one in champion.values()] == [one["tuned"] for one in own.values()]


def test_a_killed_process_is_a_temporary_error_and_nothing_is_written(tmp_path):
    workspace, _ = make_run(tmp_path)
    before = sorted(workspace.root.rglob("*"))
    with start(workspace, ROPEWAY_EVALUATE_WORKERS="2") as process:
        workers = []
        while len(workers) < 2 and process.poll() is None:
            children = psutil.Process(process.pid).children()
            workers = [child for child in children if "spawn_main" in " ".join(command_of(child))]
        workers[-1].kill()
        text = process.stdout.read()
    assert process.returncode == 75, text
    assert "evaluate: process 2 of 2 was killed, e.g. out of memory; nothing was written" in text
    assert "ROPEWAY_EVALUATE_WORKERS=1" in text
    assert sorted(workspace.root.rglob("*")) == before
    assert not psutil.wait_procs(workers, timeout=120)[1]


def test_a_process_reports_an_error_as_a_single_process_does(tmp_path, monkeypatch, capfd):
    workspace, profile = make_run(tmp_path, block=BLOCK.replace("lengths: [192, 256]", "lengths: [40, 256]"))
    monkeypatch.setenv("ROPEWAY_EVALUATE_WORKERS", "2")
    with pytest.raises(
        ConfigError, match=r"^evaluation\.passkey\.lengths: 40 tokens are too few: the question alone has"
    ):
        evaluation.run(workspace, profile)
    printed = capfd.readouterr()
    assert "evaluate: 2 processes, " in printed.out
    assert "Traceback" not in printed.out + printed.err
    assert not workspace.evaluation.exists()


def test_an_unforeseen_error_of_a_process_is_not_retried(capfd):
    with pytest.raises(RopewayError, match=r"[12] of 2 failed with exit code 1; its traceback is above") as e:
        run_shares(divmod, (1,), PAIR)
    assert e.value.exit_code == 1
    assert "TypeError: unsupported operand" in capfd.readouterr().err


def test_each_process_sees_its_own_card(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run_shares(os.getenv, ("CUDA_VISIBLE_DEVICES",), ("4", "7")) == ["4", "7"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_each_process_has_as_many_threads_as_one_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 2)
    try:
        assert run_shares(count_threads, (), PAIR) == [before + 2] * 2
    finally:
        torch.set_num_threads(before)
