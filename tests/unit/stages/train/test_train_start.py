"""Before it starts the ranks, the stage verifies the checkpoint to resume from and hands its step to them."""

from types import SimpleNamespace

import pytest

from ropeway.runtime.workspace import Workspace
from ropeway.stages.train import checkpoints, stage
from ropeway.stages.train.continuing import Fingerprint
from tests.support.committed import commit


class LaunchedError(Exception):
    """Ends the stage where it would start the ranks."""


def launch(workspace, monkeypatch):
    """Run the stage up to the start of the ranks; return the arguments that they would get."""
    given = []

    def build(_environment, arguments, **_options):
        given.extend(arguments)
        raise LaunchedError

    fakes = {
        "count_ranks": lambda: 2,
        "accumulation_steps": lambda *_: 1,
        "FrozenInputs": SimpleNamespace(load=lambda _: SimpleNamespace(text=lambda *_: "{}")),
        "compute_fingerprint": lambda *_: Fingerprint("current", {}, {}),
        "rank_environment": lambda *_, **__: {},
        "build_launch_command": build,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(stage, name, fake)
    profile = SimpleNamespace(deepspeed_config="ds.json", resume_from=None, layout="padded")
    with pytest.raises(LaunchedError):
        stage.run(workspace, profile)
    return given


def save(root, step):
    partial = checkpoints.partial_folder(root, step)
    partial.mkdir(parents=True)
    (partial / "weights.pt").write_bytes(bytes(step))
    return commit(root, step, [], {"ranks": 2})


def test_the_ranks_get_the_newest_valid_step(tmp_path, monkeypatch, capsys):
    workspace = Workspace(tmp_path, "tiny")
    assert launch(workspace, monkeypatch)[-1] == "0"
    save(workspace.checkpoints / "current", 5)
    newest = save(workspace.checkpoints / "current", 10)
    assert launch(workspace, monkeypatch)[-1] == "10"
    (newest / "weights.pt").write_bytes(b"0123456789")
    assert launch(workspace, monkeypatch)[-1] == "5"
    assert "checkpoint of step 10 is damaged" in capsys.readouterr().out


def test_what_an_interrupted_attempt_left_is_removed_before_the_ranks_start(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path, "tiny")
    root = workspace.checkpoints / "current"
    save(root, 0)  # of the warm-up step
    checkpoints.partial_folder(root, 5).mkdir()
    assert launch(workspace, monkeypatch)[-1] == "0"
    assert sorted(path.name for path in root.iterdir()) == ["run.json"]
