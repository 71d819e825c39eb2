"""`ropeway rehearse` as a person starts it: killed, then to its end, beside a finished run that it must not touch."""

import json
import os
import signal

import psutil
import pytest

from ropeway.orchestration import cleanup
from ropeway.rehearse.rehearsal import rehearsal_folder
from ropeway.runtime.lock import is_held
from ropeway.runtime.manifest import file_sha256
from ropeway.runtime.workspace import Workspace
from tests.support.processes import read_until


def files(root):
    """Return path -> sha256 and modification time of every file of a workspace but those of rehearsals."""
    own = root / ".work" / "rehearse"
    paths = (path for path in root.rglob("*") if path.is_file() and not path.is_relative_to(own))
    return {path.relative_to(root).as_posix(): (file_sha256(path), path.stat().st_mtime_ns) for path in paths}


@pytest.fixture
def finished(main_jobs, tmp_path):
    """Return a copy of a workspace in which `dvc repro` has run."""
    return main_jobs.finished.copy(tmp_path / "workspace")


def test_a_killed_rehearsal_leaves_nothing_and_the_next_one_runs_every_stage_without_touching_the_run(finished):
    before, folder = files(finished.root), rehearsal_folder(finished.root, "tiny")
    assert {name.split("/")[0] for name in before} >= {"runs", ".checkpoints", ".identity", "dvc.lock", ".dvc"}
    process = finished.start("ropeway", "rehearse", "--profile", "tiny")
    read_until(process, "prepare ")
    tree = psutil.Process(process.pid).children(recursive=True)
    assert is_held(folder)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    _, alive = psutil.wait_procs(tree, timeout=60)
    assert alive == []
    assert files(finished.root) == before
    assert [one.path for one in cleanup.plan_work(Workspace(finished.root, ""), {"tiny"})] == [folder / "workspace"]

    (folder / "workspace" / "runs" / "left").mkdir(parents=True)
    said = finished.do("ropeway", "rehearse", "--profile", "tiny", "--json", "--keep")
    result = json.loads(said[said.index("\n{\n") :])
    assert (result["failed"], result["version"], result["ranks"]) == (None, "tiny@v1", 2)
    names = [step["name"] for step in result["steps"]]
    assert names[-3:] == ["report_package", "publish", "pull and chat"]
    assert result["omitted"]
    assert {"key": "num_train_epochs", "real": "1", "rehearsed": "1", "why": ""} not in result["changes"]
    workspace = folder / "workspace"
    assert not (workspace / "runs" / "left").exists()
    assert (workspace / "runs" / "tiny" / "train.json").is_file()
    assert list((workspace / "cache" / "versions" / "tiny").iterdir())
    assert files(finished.root) == before
