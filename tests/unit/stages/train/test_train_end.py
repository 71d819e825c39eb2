"""Nothing after the last step loses a run: notes, pruning and pages warn."""

import json

import pytest

from ropeway.runtime.workspace import Workspace
from ropeway.stages.train import checkpoints
from ropeway.stages.train import stage as train
from ropeway.stages.train.continuing import Fingerprint


def test_a_record_of_a_start_that_a_full_disk_cut_is_left_out_and_said(tmp_path, capsys):
    path = tmp_path / "attempts.jsonl"
    path.write_bytes(b'{"ranks": 2}\n{"ranks": \n\xff\n{"ranks": 4}\n')
    assert train._read_attempts(path) == [{"ranks": 2}, {"ranks": 4}]
    said = capsys.readouterr().out
    assert f"{path}:2: not JSON" in said
    assert f"{path}:3: not JSON" in said
    path.unlink()
    assert train._read_attempts(path) == []
    assert "cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["a damaged note", "a folder that cannot be removed"])
def test_older_runs_that_cannot_be_pruned_lose_nothing(tmp_path, capsys, monkeypatch, fault):
    workspace = Workspace(tmp_path, "tiny")
    for name in ("old", "current"):
        checkpoints.claim(workspace.checkpoints / name, {"profile": "tiny"})
    if fault == "a damaged note":
        (workspace.checkpoints / "old" / checkpoints.OWNER).write_text("{")
    else:
        monkeypatch.setattr("shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(PermissionError("not yours")))
    train._prune(workspace, Fingerprint("current", {}, {}), keep=1)
    assert json.loads((workspace.checkpoints / "current" / checkpoints.OWNER).read_text()) == {"profile": "tiny"}
    assert (workspace.checkpoints / "old").is_dir()
    assert (
        "cannot be read" if fault == "a damaged note" else "could not be removed: not yours"
    ) in capsys.readouterr().out
