"""`ropeway doctor`: each thing that is wrong is found, named with its remedy, and ends in 64."""

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ropeway.cli.main import app
from ropeway.orchestration import doctor
from ropeway.runtime.errors import ConfigError
from ropeway.storage import FileStore

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings(
    # dvc 3.67.1 (repo/trie.py, repo/graph.py) on pygtrie 2.6
    "ignore:_NoneStep.value will soon raise:DeprecationWarning"
)


@pytest.fixture
def root(tmp_path, monkeypatch):
    for name in ("ROPEWAY_REGISTRY", "PREFECT_API_URL", "PREFECT_HOME", "CXX", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "workspace"
    root.mkdir()
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "configs", root / "configs")
    shutil.copytree(ROOT / "requirements", root / "requirements")
    (root / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", root / ".dvc")
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for arguments in (["init", "-q"], ["add", "--all"], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", *who, *arguments], cwd=root, check=True)
    monkeypatch.chdir(root)
    return root


def look(about):
    """Run the command; return its exit code and what it says about one thing."""
    done = CliRunner().invoke(app, ["doctor", "--json"])
    (found,) = [finding for finding in json.loads(done.stdout) if finding["about"] == about]
    return done.exit_code, found


def test_a_sound_workspace_ends_with_0_and_leaves_nothing_behind(root):
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.stdout
    assert "WRONG" not in done.stdout
    assert not (root / "registry").exists()


@pytest.mark.usefixtures("root")
def test_no_compiler_is_found(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, found = look("compiler")
    assert (code, found["state"]) == (64, "wrong")
    assert "apt-get install g++" in found["fix"]


@pytest.mark.usefixtures("root")
def test_too_little_shared_memory_is_found(monkeypatch):
    def refuse(ranks):
        raise ConfigError(f"no shared memory for {ranks} ranks")

    monkeypatch.setattr(doctor, "list_gpus", list)
    monkeypatch.setattr(doctor, "check_shared_memory", refuse)
    code, found = look("shared memory")
    assert (code, found["state"], found["words"]) == (64, "wrong", "no shared memory for 2 ranks")


def test_a_version_that_is_not_the_locked_one_is_a_note(root):
    lock = root / "requirements" / "run.txt"
    lock.write_text(re.sub("(?m)^deepspeed==[^ ]+", "deepspeed==0.0.1", lock.read_text()))
    code, found = look("deepspeed")
    assert (code, found["state"]) == (0, "note")
    assert found["words"].endswith("tested with 0.0.1")


@pytest.mark.usefixtures("root")
def test_every_library_it_looks_at_is_locked():
    from ropeway.orchestration.doctor import _LIBRARIES, read_pins

    assert set(_LIBRARIES) <= set(read_pins(ROOT / "requirements"))


def test_a_wrong_params_file_is_a_finding_and_the_rest_is_looked_at(root):
    path = root / "params.yaml"
    path.write_text(path.read_text().replace("learning_rate: 2e-3", "learning_rate: 2e-3x"))
    code, found = look("params")
    assert (code, found["state"]) == (64, "wrong")
    assert "learning_rate: expected a number" in found["words"]
    assert look("registry")[1]["state"] == "ok"


def test_too_little_disk_is_found(root, monkeypatch):
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    code, found = look("disk")
    assert (code, found["state"]) == (64, "wrong")


def test_a_dvc_remote_that_is_not_verified_is_found_and_fixed(root, tmp_path):
    assert look("DVC remote")[1]["state"] == "note"
    with pytest.raises(ConfigError, match="name one"):
        doctor.fix_remote(root, None)
    subprocess.run(["dvc", "remote", "add", "-q", "-d", "mine", str(tmp_path / "remote")], check=True)
    code, found = look("DVC remote")
    assert (code, found["state"]) == (64, "wrong")
    assert "dvc remote modify mine verify true" in found["fix"]
    assert doctor.fix_remote(root, None) == ["DVC remote 'mine' now verifies pulls; commit .dvc/config"]
    code, found = look("DVC remote")
    assert (code, found["state"]) == (0, "ok")
    assert doctor.fix_remote(root, None) == []


def test_fix_creates_a_remote_that_verifies_and_not_inside_the_registry(root, tmp_path):
    with pytest.raises(ConfigError, match="share"):
        doctor.fix_remote(root, str(root / "registry" / "dvc"))
    done = CliRunner().invoke(app, ["doctor", "--fix", "--remote", str(tmp_path / "remote")])
    assert done.exit_code == 0, done.output
    assert look("DVC remote")[1]["state"] == "ok"


@pytest.mark.usefixtures("root")
def test_a_store_in_which_two_writers_win_is_found(monkeypatch):
    monkeypatch.setattr(FileStore, "put_if_absent", lambda *_, **__: True)
    monkeypatch.setattr(FileStore, "get", lambda *_: b"[]")
    code, found = look("registry")
    assert (code, found["state"]) == (64, "wrong")
    assert "two simultaneous writes both succeed" in found["words"]


@pytest.mark.usefixtures("root")
def test_a_prefect_server_that_does_not_answer_is_found(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # no server listens
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{taken.getsockname()[1]}/api")
        code, found = look("Prefect")
    assert (code, found["state"]) == (64, "wrong")
    assert "--no-prefect" in found["fix"]


@pytest.mark.usefixtures("root")
def test_a_taken_port_and_the_mode_of_wandb_are_reported(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(doctor, "DEFAULT_PORT", other.getsockname()[1])
        monkeypatch.setenv("WANDB_MODE", "disabled")
        code, found = look("ports")
    assert (code, found["state"]) == (0, "note")
    assert look("W&B")[1]["words"].startswith("off")


@pytest.mark.usefixtures("root")
def test_what_stops_the_published_run_here_is_found_before_it_is_selected(monkeypatch):
    monkeypatch.setattr("ropeway.orchestration.doctor.list_gpus", list)
    done = CliRunner().invoke(app, ["doctor", "--profile", "llama2_13b_orca_8k", "--json"])
    found = {one["about"]: one for one in json.loads(done.stdout)}
    assert done.exit_code == ConfigError.exit_code
    assert (found["precision"]["state"], found["base"]["state"]) == ("wrong", "wrong")
    assert "model_name /mnt/data/llama2/Llama-2-13b-hf/ is not a folder" in found["base"]["words"]
    assert "llama2_13b_orca_8k" in found["params"]["words"]
