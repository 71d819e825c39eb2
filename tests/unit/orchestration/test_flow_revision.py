import json
import subprocess
from pathlib import Path

import pytest

from ropeway.config.load_params import read_block
from ropeway.orchestration.revision import Revision, read_revision

ROOT = Path(__file__).parents[3]


@pytest.fixture
def workspace(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "params.yaml").write_text("# runs\nprofile: laptop\nlaptop:\n  learning_rate: 1e-5\n")
    (tmp_path / "dvc.lock").write_text("old")
    (tmp_path / "train.py").write_text("old")
    git("init", "-q")
    git("add", "--all")
    git("commit", "-q", "-m", "first")
    return tmp_path, git


def test_a_clean_tree_is_its_commit(workspace):
    root, git = workspace
    assert read_revision(root) == Revision(git("rev-parse", "HEAD"), ())
    assert str(read_revision(root)) == git("rev-parse", "HEAD")[:7]


def test_what_every_run_changes_is_no_dirt(workspace):
    root, _ = workspace
    (root / "dvc.lock").write_text("new")
    (root / "params.yaml").write_text((root / "params.yaml").read_text().replace("profile: laptop", "profile: smollm2"))
    (root / "untracked").write_text("new")
    assert read_revision(root).dirty == ()


def test_any_other_change_of_a_tracked_file_is_dirt_also_a_staged_one(workspace):
    root, git = workspace
    (root / "params.yaml").write_text((root / "params.yaml").read_text().replace("1e-5", "2e-5"))
    (root / "train.py").write_text("new")
    git("add", "train.py")
    assert read_revision(root).dirty == ("params.yaml", "train.py")
    assert str(read_revision(root)).endswith("+")


def test_outside_git_there_is_no_revision(tmp_path):
    assert read_revision(tmp_path) == Revision(None, ())
    assert str(read_revision(tmp_path)) == "no-git"


@pytest.fixture
def named(workspace):
    root, git = workspace
    (root / ".gitignore").write_text("/data/ignored.jsonl\n/models/\n/hidden.json\n")
    params = read_block(ROOT / "params.yaml", "laptop")
    files = {"kind": "files", "rows": "text", "columns": {"text": "text"}, "expected_rows": None}
    params["sources"] = {"mine": {**files, "paths": ["data/*.jsonl"]}}
    params["datasets"] = [{"mine": {"max_val_set": 8}}]
    params["contamination"] = {**params["contamination"], "prompts": ["hidden.json"]}
    params["deepspeed_config"] = "own.json"
    params["evaluation"] = {**params["evaluation"], "prompts": "prompts.jsonl", "sampling": "sampling.json"}
    (root / "params.yaml").write_text(json.dumps({"profile": "laptop", "laptop": params}))
    (root / "data").mkdir()
    for name in ("prompts.jsonl", "sampling.json", "data/ignored.jsonl"):
        (root / name).write_text("{}")
    git("add", "--all")
    git("commit", "-q", "-m", "named")
    return root


@pytest.mark.parametrize("name", ["own.json", "hidden.json", "data/loose.jsonl", "dvc.yaml"])
def test_a_file_that_params_name_and_git_does_not_have_is_dirt(named, name):
    assert read_revision(named).dirty == ()
    (named / "unrelated.json").write_text("{}")
    (named / name).write_text("{}")
    assert read_revision(named).dirty == (name,)


def test_files_of_another_profile_are_no_dirt(named):
    params = json.loads((named / "params.yaml").read_text())
    params["other"] = {**params["laptop"], "deepspeed_config": "other.json"}
    (named / "params.yaml").write_text(json.dumps(params))
    (named / "other.json").write_text("{}")
    assert read_revision(named, "laptop").dirty == ("params.yaml",)
    assert read_revision(named, "other").dirty == ("params.yaml", "other.json")
