"""A worker's clones: at the caller's commit, kept between runs, one for each request at a time."""

import subprocess

import pytest

from ropeway.orchestration.remote.clones import open_clone
from ropeway.orchestration.remote.request import StageRequest
from ropeway.runtime.errors import ConfigError


def git(root, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def origin(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWAY_WORKER_HOME", str(tmp_path / "home"))
    root = tmp_path / "origin"
    (root / "sub" / ".dvc").mkdir(parents=True)
    (root / "sub" / ".dvc" / "config").write_text("")
    (root / "sub" / "params.yaml").write_text("profile: a\n")
    (root / ".gitignore").write_text("/sub/runs\nconfig.local\n")
    git(root, "init", "-q")
    commit(root, "first")
    return root


def commit(root, message):
    git(root, "add", "--all")
    git(root, "commit", "-q", "-m", message)
    return git(root, "rev-parse", "HEAD")


def request(origin, commit_hash, folder="sub/"):
    return StageRequest("train", "a", str(origin), commit_hash, folder, "0" * 32)


def test_a_clone_is_kept_and_moved_to_the_commit_that_is_asked_for(origin):
    first = git(origin, "rev-parse", "HEAD")
    with open_clone(request(origin, first)) as root:
        assert (root / "params.yaml").read_text() == "profile: a\n"
        (root / "runs").mkdir()
        (root / "runs" / "kept").touch()
        (root / "params.yaml").write_text("profile: b\n")  # as a worker writes the profile
        (root / "stray.py").touch()
    (origin / "sub" / "params.yaml").write_text("profile: c\n")
    second = commit(origin, "second")
    with open_clone(request(origin, second)) as again:
        assert again == root
        assert (again / "params.yaml").read_text() == "profile: c\n"
        assert (again / "runs" / "kept").exists()
        assert not (again / "stray.py").exists()
    with open_clone(request(origin, first)) as back:
        assert (back / "params.yaml").read_text() == "profile: a\n"


def test_a_clone_that_was_killed_is_made_again(origin):
    first = git(origin, "rev-parse", "HEAD")
    with open_clone(request(origin, first)) as root:
        clone = root.parent
    clone.rename(clone.with_name("clone-0.partial"))
    (clone.with_name("clone-0.partial") / ".git" / "HEAD").unlink()
    with open_clone(request(origin, first)) as again:
        assert again == root


def test_two_requests_at_once_have_a_clone_each_and_share_the_cache(origin):
    first = git(origin, "rev-parse", "HEAD")
    with open_clone(request(origin, first)) as one, open_clone(request(origin, first)) as two:
        assert one != two
        caches = {(root / ".dvc" / "config.local").read_text() for root in (one, two)}
        assert len(caches) == 1


def test_a_commit_that_was_not_pushed_and_a_folder_without_params_are_refused(origin):
    with pytest.raises(ConfigError, match="Push it there"), open_clone(request(origin, "f" * 40)):
        pass
    head = git(origin, "rev-parse", "HEAD")
    with pytest.raises(ConfigError, match=r"no other/params\.yaml"), open_clone(request(origin, head, "other/")):
        pass
    with pytest.raises(ConfigError, match="git clone"), open_clone(request(origin / "nowhere", "f" * 40)):
        pass
