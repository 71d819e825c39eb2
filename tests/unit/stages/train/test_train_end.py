"""After the last step a failure to read records or to prune older runs is a warning and does not fail the run."""

import json

import pytest

from ropeway.runtime.workspace import Workspace
from ropeway.stages.train import checkpoints
from ropeway.stages.train import stage as train
from ropeway.stages.train.continuing import Fingerprint


def test_a_truncated_record_of_an_attempt_is_skipped_with_a_message(tmp_path, capsys):
    path = tmp_path / "attempts.jsonl"
    path.write_bytes(b'{"ranks": 2}\n{"ranks": \n\xff\n{"ranks": 4}\n')
    assert train._read_attempts(path) == [{"ranks": 2}, {"ranks": 4}]
    said = capsys.readouterr().out
    assert f"{path}:2: not JSON" in said
    assert f"{path}:3: not JSON" in said
    path.unlink()
    assert train._read_attempts(path) == []
    assert "cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["a damaged run.json", "a folder that cannot be removed"])
def test_a_failure_to_prune_older_runs_is_a_warning(tmp_path, capsys, monkeypatch, fault):
    workspace = Workspace(tmp_path, "tiny")
    for name in ("old", "current"):
        checkpoints.write_run_info(workspace.checkpoints / name, {"profile": "tiny"})
    if fault == "a damaged run.json":
        (workspace.checkpoints / "old" / checkpoints.RUN_INFO).write_text("{")
    else:
        monkeypatch.setattr("shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(PermissionError("not yours")))
    train._prune(workspace, Fingerprint("current", {}, {}), keep=1)
    assert json.loads((workspace.checkpoints / "current" / checkpoints.RUN_INFO).read_text()) == {"profile": "tiny"}
    assert (workspace.checkpoints / "old").is_dir()
    assert (
        "cannot be read" if fault == "a damaged run.json" else "could not be removed: not yours"
    ) in capsys.readouterr().out
