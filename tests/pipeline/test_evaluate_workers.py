"""Evaluate in several processes: the same files as by one, and what happens to them when one of the processes dies."""

import json
import os
import subprocess
import sys
import threading

import psutil
import pytest
import torch

from ropeway.runtime.errors import ConfigError, RopewayError, TemporaryError
from ropeway.stages.evaluate import stage as evaluation
from ropeway.stages.evaluate.champion import measure_champion
from ropeway.stages.evaluate.evaluation_workers import SINGLE_PROCESS, run_shares
from ropeway.stages.evaluate.measuring import measure_folder
from tests.support.processes import command_of, describe_worker, raise_config_error
from tests.support.tiny_run import ROOT, make_run

PAIR = (None, None)


def evaluate(workspace, **environment):
    """Evaluate to the end; return what was printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ROPEWAY_")}
    return subprocess.run(
        [sys.executable, "-m", "ropeway.cli.main", "execute-stage", "evaluate"],
        cwd=workspace.root,
        env={**kept, "PYTHONPATH": str(ROOT / "src"), **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def left(workspace):
    """Every file that evaluate leaves, and its bytes."""
    files = (workspace.evaluation, workspace.samples, *sorted(workspace.tables.iterdir()))
    return {path.name: path.read_bytes() for path in files}


def test_two_processes_measure_what_one_does(tmp_path):
    workspace, profile = make_run(tmp_path)
    _, request = evaluation.plan_request(workspace, profile)
    assert request.long_rows
    assert request.questions
    assert request.samples
    alone, pair = (
        measure_folder(workspace.model, workspace.model, request, gpus=gpus, name="tuned")
        for gpus in (SINGLE_PROCESS, PAIR)
    )
    assert alone.scores
    assert pair == alone


@pytest.mark.slow  # each process of four imports transformers; above are two
@pytest.mark.parametrize("measuring_champion", ["1", "2"])
def test_one_process_and_two_write_equal_files(tmp_path, monkeypatch, measuring_champion):
    workspace, profile = make_run(tmp_path)
    seen, lines = [], []
    for workers in ("1", "2"):
        text = evaluate(workspace, ROPEWAY_EVALUATE_WORKERS=workers)
        assert f"evaluate: {workers} process" in text
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


def test_a_killed_process_is_a_temporary_error_and_nothing_is_written(tmp_path, monkeypatch, capfd):
    workspace, profile = make_run(tmp_path)
    before = sorted(workspace.root.rglob("*"))
    monkeypatch.setenv("ROPEWAY_EVALUATE_WORKERS", "2")
    ended, workers = threading.Event(), []

    def kill_the_second():
        while len(workers) < 2 and not ended.wait(0.01):
            children = psutil.Process().children()
            workers[:] = [child for child in children if "spawn_main" in " ".join(command_of(child))]
        workers[-1].kill()

    killer = threading.Thread(target=kill_the_second)
    killer.start()
    try:
        with pytest.raises(TemporaryError, match=r"process 2 of 2 was killed.*ROPEWAY_EVALUATE_WORKERS=1$"):
            evaluation.run(workspace, profile)
    finally:
        ended.set()
        killer.join()
    assert "evaluate: 2 processes, " in capfd.readouterr().out
    assert sorted(workspace.root.rglob("*")) == before
    assert not psutil.wait_procs(workers, timeout=120)[1]


def test_a_process_reports_an_error_as_a_single_process_does(capfd):
    for gpus in (SINGLE_PROCESS, PAIR):
        with pytest.raises(ConfigError, match=r"^40 tokens are too few$"):
            run_shares(raise_config_error, ("40 tokens are too few",), gpus)
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err


def test_an_unforeseen_error_of_a_process_is_not_retried(capfd):
    with pytest.raises(RopewayError, match=r"[12] of 2 failed with exit code 1; its traceback is above") as e:
        run_shares(divmod, (1,), PAIR)
    assert e.value.exit_code == 1
    assert "TypeError: unsupported operand" in capfd.readouterr().err


def test_each_process_sees_its_own_card_and_has_as_many_threads_as_one_alone(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 2)
    try:
        assert run_shares(describe_worker, (), ("4", "7")) == [("4", before + 2), ("7", before + 2)]
    finally:
        torch.set_num_threads(before)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
