"""A listing in a DVC remote that names files outside of its folder: nothing is written there."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from dvc.exceptions import DvcException
from dvc_data.hashfile.tree import Tree

from ropeway.orchestration import guarded_dvc
from ropeway.orchestration.dvc_graph import reproduce_command
from ropeway.runtime.errors import ConfigError
from tests.support.main_job import make_main_job


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A folder with `workspace` and `remote`, made by seven commands of DVC, to copy."""
    root = tmp_path_factory.mktemp("pushed") / "workspace"
    root.mkdir()
    run(root, "git", "init", "-q")
    dvc(root, "init", "-q")
    dvc(root, "config", "core.analytics", "false")
    dvc(root, "remote", "add", "-q", "-d", "r", "../remote")
    dvc(root, "remote", "modify", "r", "verify", "true")
    (root / "in.txt").write_text("read")  # without a dependency DVC keeps no run-cache entry
    stage = {"cmd": "mkdir -p out && echo fine > out/a", "deps": ["in.txt"], "outs": ["out"]}
    (root / "dvc.yaml").write_text(json.dumps({"stages": {"s": stage}}))
    dvc(root, "repro", "-q")
    dvc(root, "push", "-q", "--run-cache")
    return root.parent


@pytest.fixture
def workspace(pushed, tmp_path):
    """A repository whose remote has the folder `out` and its run-cache entry."""
    shutil.copytree(pushed, tmp_path, dirs_exist_ok=True)
    return tmp_path / "workspace"


def run(root, *command):
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def dvc(root, *words):
    return run(root, *guarded_dvc.COMMAND, *words)


def replace_listing(root, names, **other):
    """Let the remote's entry name another listing, under its right MD5; forget what this machine has."""
    remote = root.parent / "remote"
    (listing,) = (remote / "files" / "md5").rglob("*.dir")
    (entry,) = json.loads(listing.read_bytes())
    data = json.dumps([{**entry, "relpath": name, **other} for name in names]).encode()
    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    place = remote / "files" / "md5" / digest[:2] / f"{digest[2:]}.dir"
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(data)
    old = f"{listing.parent.name}{listing.name}"
    for path in (*(path for path in (remote / "runs").rglob("*") if path.is_file()), root / "dvc.lock"):
        path.write_text(path.read_text().replace(old, f"{digest}.dir"))
    shutil.rmtree(root / ".dvc" / "cache")
    shutil.rmtree(root / "out")


@pytest.mark.parametrize(("how", "names"), [("pull", ["a", "../escaped"]), ("run-cache", ["b/../../../escaped"])])
def test_a_file_outside_of_its_folder_is_refused_by_name(workspace, how, names):
    replace_listing(workspace, names)
    if how == "pull":
        done = dvc(workspace, "pull", "--run-cache")
    else:
        dvc(workspace, "fetch", "--run-cache", "-q")
        (workspace / "dvc.lock").unlink()
        command = reproduce_command("s", pull=True)
        assert command[: len(guarded_dvc.COMMAND)] == list(guarded_dvc.COMMAND)
        done = run(workspace, *command)
    assert list(workspace.parent.rglob("escaped")) == []
    if how == "pull":
        assert done.returncode
        assert "outside of the folder" in done.stderr


def forget_results(root):
    """Leave of the stage what the remote and the run-cache have."""
    dvc(root, "fetch", "--run-cache", "-q")
    shutil.rmtree(root / "out")
    (root / "dvc.lock").unlink()


def test_an_entry_of_the_run_cache_restores_no_output_of_another_stage(workspace):
    remote = workspace.parent / "remote"
    code = b"print('not of the workspace')\n"
    digest = hashlib.md5(code, usedforsecurity=False).hexdigest()
    (remote / "files" / "md5" / digest[:2]).mkdir(exist_ok=True)
    (remote / "files" / "md5" / digest[:2] / digest[2:]).write_bytes(code)
    (entry,) = (path for path in (remote / "runs").rglob("*") if path.is_file())
    good = entry.read_text()
    entry.write_text(f"{good}- path: sitecustomize.py\n  hash: md5\n  md5: {digest}\n  size: {len(code)}\n")
    shutil.rmtree(workspace / ".dvc" / "cache")
    forget_results(workspace)
    done = run(workspace, *reproduce_command("s", pull=True))
    assert not (workspace / "sitecustomize.py").exists()
    assert done.returncode
    assert "outputs that this stage does not have" in done.stderr
    entry.write_text(good)
    shutil.rmtree(workspace / ".dvc" / "cache")
    dvc(workspace, "fetch", "--run-cache", "-q")
    done = run(workspace, *reproduce_command("s", pull=True))
    assert "skipping run" in done.stdout, done.stderr


@pytest.mark.parametrize(("key", "written"), [
    ("runs/x/y/../../../../code.py", "code.py"), ("runs/x/../../code.py", "cache/code.py"),
])  # fmt: skip
def test_a_key_of_the_run_cache_that_leaves_it_is_refused(workspace, key, written):
    remote = workspace.parent / "remote"
    (remote / "runs" / "x" / "y").mkdir(parents=True)
    (remote.parent / "code.py").write_text("print()")
    (remote / "code.py").write_text("print()")
    code = f"""
from dvc.exceptions import DvcException
from dvc.repo import Repo
from ropeway.orchestration.guarded_dvc import refuse_outside_names
refuse_outside_names()
repo = Repo("{workspace}")
odb = repo.cloud.get_remote_odb(None, "test", hash_name="md5-dos2unix")
odb.fs.find = lambda path: iter(["{remote}/{key}"])
try:
    repo.stage_cache.pull(None, odb)
except DvcException:
    raise SystemExit(3)
"""
    assert run(workspace, sys.executable, "-c", code).returncode == 3
    assert not (workspace / ".dvc" / written).exists()


def test_what_a_killed_dvc_left_in_the_run_cache_is_not_copied(workspace):
    (workspace / ".dvc" / "cache" / "runs" / "left.tmp").write_text("half")
    assert dvc(workspace, "push", "--run-cache").returncode == 0
    assert not (workspace.parent / "remote" / "runs" / "left.tmp").exists()


def test_the_state_of_dvc_is_in_a_folder_of_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(guarded_dvc, "STATES", tmp_path)
    monkeypatch.setenv(guarded_dvc.STATE, "/own")
    guarded_dvc.keep_state_private()
    assert os.environ[guarded_dvc.STATE] == "/own", "what the user states counts"
    folder = tmp_path / f"ropeway-{os.getuid()}"
    for _ in range(2):
        monkeypatch.delenv(guarded_dvc.STATE)
        guarded_dvc.keep_state_private()
        assert os.environ[guarded_dvc.STATE] == str(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv(guarded_dvc.STATE)
    folder.chmod(0o770)
    with pytest.raises(ConfigError, match="that nobody else may read or write"):
        guarded_dvc.keep_state_private()
    folder.rename(tmp_path / "moved")
    (tmp_path / "moved").chmod(0o700)
    folder.symlink_to("moved")
    with pytest.raises(ConfigError, match="that nobody else may read or write"):
        guarded_dvc.keep_state_private()


def test_no_call_of_dvc_uses_the_state_that_every_user_can_write(workspace):
    code = """
import os
os.environ.pop("DVC_SITE_CACHE_DIR", None)
from pathlib import Path
from ropeway.orchestration.dvc_graph import open_repo
with open_repo(Path(".")) as repo:
    print(repo.site_cache_dir)
"""
    done = run(workspace, sys.executable, "-c", code)
    assert done.stdout.startswith(f"{guarded_dvc.STATES}/ropeway-{os.getuid()}/"), done.stderr


def test_a_listing_of_names_inside_is_restored(workspace):
    replace_listing(workspace, ["a", "b/c"])
    done = dvc(workspace, "pull", "--run-cache")
    assert done.returncode == 0, done.stderr
    assert (workspace / "out" / "b" / "c").read_text() == "fine\n"


@pytest.mark.parametrize("name", ["", ".", "..", "/a", "a//b", "a/.", "../a", "a/../b", "a/\0"])
def test_no_part_of_a_name_leads_elsewhere(name):
    # In a process of its own: the check stays for as long as the process lives.
    code = f"""
from ropeway.orchestration.guarded_dvc import refuse_outside_names
from dvc.exceptions import DvcException
from dvc_data.hashfile.tree import Tree
refuse_outside_names(); refuse_outside_names()
try:
    Tree.from_list([{{"relpath": {name!r}, "md5": "d41d8cd98f00b204e9800998ecf8427e"}}])
except DvcException:
    raise SystemExit(3)
"""
    assert run(".", sys.executable, "-c", code).returncode == 3


def test_dvc_itself_does_not_check():
    """If this fails, DVC has a check of its own, and `guarded_dvc` can go."""
    if not hasattr(Tree.add, "__wrapped__"):
        entry = {"relpath": "../a", "md5": "d41d8cd98f00b204e9800998ecf8427e"}
        try:
            Tree.from_list([entry])
        except DvcException:
            pytest.fail("DVC refuses it")


def test_the_name_of_a_profile_is_no_shell_command(tmp_path):
    job = make_main_job(tmp_path / "job")
    params = job.root / "params.yaml"
    text = params.read_text()
    assert text.count("profile: tiny") == 1
    for name in ("x; touch taken #", "$(touch taken)", "`touch taken`"):
        params.write_text(text.replace("profile: tiny", f"profile: {json.dumps(name)}"))
        with job.start("dvc", "repro") as process:
            said = process.stdout.read()
        assert process.returncode
        assert "ERROR" in said
        assert not list(job.root.rglob("taken"))


@pytest.mark.parametrize("how", ["lock", "listing"])
def test_a_digest_that_is_a_path_removes_no_file(workspace, how):
    victim = workspace.parent / "victim.txt"
    victim.write_text("kept")
    path = "./../../../../../victim.txt"  # from .dvc/cache/files/md5/./
    if how == "lock":
        lock = workspace / "dvc.lock"
        (listing,) = (workspace.parent / "remote" / "files" / "md5").rglob("*.dir")
        lock.write_text(lock.read_text().replace(f"{listing.parent.name}{listing.name}", path))
        shutil.rmtree(workspace / ".dvc" / "cache")
        shutil.rmtree(workspace / "out")
    else:
        replace_listing(workspace, ["a"], md5=path)
    done = dvc(workspace, "pull", "--run-cache")
    assert victim.read_text() == "kept"
    assert "is not the digest of an object" in done.stderr
