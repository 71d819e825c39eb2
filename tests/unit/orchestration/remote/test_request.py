"""What may be placed in a work pool, and what is refused before anything runs."""

import json
import subprocess

import pytest

from ropeway.orchestration.remote.clones import open_clone
from ropeway.orchestration.remote.request import (
    REPOSITORIES,
    StageRequest,
    check_committed_remote,
    check_repository,
    find_repository,
    read_pools,
)
from ropeway.orchestration.revision import Revision, read_revision
from ropeway.runtime.errors import ConfigError

STAGES = ("fetch", "train", "evaluate")
CLEAN = Revision("a" * 40, ())


def test_pools_are_read_by_stage_and_publishing_is_a_step_too():
    environment = {"ROPEWAY_POOL_TRAIN": "gpu", "ROPEWAY_POOL_PUBLISH": " cpu ", "ROPEWAY_RANKS": "2"}
    assert read_pools(environment, STAGES) == {"publish": "cpu", "train": "gpu"}


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [("ROPEWAY_POOL_TRIAN", "gpu", "did you mean train"), ("ROPEWAY_POOL_TRAIN", " ", "is empty")],
)
def test_a_pool_for_no_stage_and_a_stage_without_pool_are_refused(variable, value, said):
    with pytest.raises(ConfigError, match=said):
        read_pools({variable: value}, STAGES)


def test_a_request_survives_json_and_its_key_depends_on_every_field():
    request = StageRequest("train", "tiny", "/origin.git", "a" * 40, "", "b" * 32)
    assert StageRequest.from_json(request.to_json()) == request
    others = [StageRequest("train", "tiny", "/origin.git", "a" * 40, "", each * 32) for each in "bc"]
    assert [each.key == request.key for each in others] == [True, False]
    with pytest.raises(ConfigError, match="format 2"):
        StageRequest.from_json(request.to_json().replace('"format": 1', '"format": 2'))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repository", "--upload-pack=touch x"),
        ("commit", "--help"),
        ("commit", "main"),
        ("folder", "../"),
        ("folder", "a/../../"),
        ("folder", "/etc/"),
        ("handover", "../../x"),
        ("registry", "file:///etc"),
        ("profile", None),
        ("extra", "x"),
    ],
)
def test_a_request_that_ropeway_did_not_write_is_refused(field, value):
    request = json.loads(StageRequest("train", "tiny", "/origin.git", "a" * 40, "sub/", "b" * 32).to_json())
    with pytest.raises(ConfigError):
        StageRequest.from_json(json.dumps({**request, field: value}))


@pytest.mark.parametrize("text", ["", "[1]", "3", "null"])
def test_a_request_that_is_no_object_is_refused(text):
    with pytest.raises(ConfigError):
        StageRequest.from_json(text)


def git(root, *arguments):
    subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True)


def commit(root):
    git(root, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-q", "--allow-empty", "-m", "a commit")
    return read_revision(root)


@pytest.fixture
def root(tmp_path):
    git(tmp_path, "init", "-q")
    return tmp_path


def test_workers_clone_origin_unless_another_address_is_stated(root):
    with pytest.raises(ConfigError, match="no remote `origin`"):
        find_repository(root, CLEAN, (), {})
    head = commit(root)
    git(root, "remote", "add", "origin", "git@example.org:team/project.git")
    with pytest.raises(ConfigError, match="Run `git push`"):
        find_repository(root, head, (), {})
    git(root, "update-ref", "refs/remotes/origin/main", "HEAD")
    assert find_repository(root, head, (), {}) == "git@example.org:team/project.git"
    assert find_repository(root, CLEAN, (), {"ROPEWAY_GIT_URL": "https://h/p.git"}) == "https://h/p.git"
    (root / "origin.git").mkdir()
    assert find_repository(root, CLEAN, (), {"ROPEWAY_GIT_URL": "origin.git"}) == str(root / "origin.git")


def test_an_address_with_a_password_is_refused_because_prefect_would_show_it(root):
    with pytest.raises(ConfigError, match="password or token") as raised:
        find_repository(root, CLEAN, (), {"ROPEWAY_GIT_URL": "https://me:canary-1f@example.org/p.git"})
    assert "canary" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "ssh://me:canary@h/p.git",
        "https://h/p.git?access_token=canary",
        "http://[::1",
        "--upload-pack=canary",
        "ext::sh -c",
    ],
)
def test_other_addresses_that_workers_must_not_get_are_refused(root, url):
    with pytest.raises(ConfigError):
        find_repository(root, CLEAN, (), {"ROPEWAY_GIT_URL": url})


def test_a_repository_without_encryption_is_refused_by_the_run_and_by_the_worker(root, monkeypatch):
    monkeypatch.delenv("ROPEWAY_ALLOW_HTTP", raising=False)
    for url in ("http://git.example/team/x", "git://git.example/team/x"):
        with pytest.raises(ConfigError, match="ROPEWAY_ALLOW_HTTP=1"):
            find_repository(root, CLEAN, (), {"ROPEWAY_GIT_URL": url})
        with pytest.raises(ConfigError, match="ROPEWAY_ALLOW_HTTP=1"):
            check_repository(url, {REPOSITORIES: url})


def test_uncommitted_code_is_refused_and_local_data_is_not(root):
    git(root, "remote", "add", "origin", "git@example.org:team/project.git")
    head = commit(root)
    git(root, "update-ref", "refs/remotes/origin/main", "HEAD")
    dirty = Revision(head.commit, ("data/chats.jsonl", "src/ropeway/x.py"))
    with pytest.raises(ConfigError, match=r"uncommitted: src/ropeway/x\.py\. "):
        find_repository(root, dirty, ("data/chats.jsonl",), {})
    assert find_repository(root, dirty, dirty.dirty, {})
    with pytest.raises(ConfigError, match="Commit this workspace"):
        find_repository(root, Revision(None, ()), (), {})


def test_the_dvc_remote_must_be_in_the_commit(root):
    (root / ".dvc").mkdir()
    (root / ".dvc" / "config").write_text("[core]\n    remote = store\n['remote \"store\"']\n    url = /tmp/x\n")
    with pytest.raises(ConfigError, match="no DVC remote"):
        check_committed_remote(root, None)
    with pytest.raises(ConfigError, match=r"not in the committed \.dvc/config"):
        check_committed_remote(root, "store")
    git(root, "add", ".dvc/config")
    git(root, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-q", "-m", "a remote")
    check_committed_remote(root, "store")


TEAM = "https://git.example.org/team,git@git.example.org:own/, /srv/git/project.git"


@pytest.mark.parametrize(
    "repository",
    ["https://git.example.org/team/project.git", "git@git.example.org:own/project.git", "/srv/git/project.git"],
)
def test_a_worker_clones_the_repositories_that_it_allows(repository):
    check_repository(repository, {REPOSITORIES: TEAM})
    check_repository(repository, {})


@pytest.mark.parametrize(
    "repository",
    [
        "https://git.example.org/team2/project.git",
        "https://git.example.org.evil.example/team/project.git",
        "https://git.example.org/team/../other/project.git",
        "https://git.example.org/team/%2e%2e/other/project.git",
        "git@git.example.org:other/project.git",
        "git@git.example.org:own/..",
        "/srv/git/project.git2",
        "",
    ],
)
def test_a_worker_refuses_other_repositories_before_it_clones(repository, tmp_path, monkeypatch):
    monkeypatch.setenv(REPOSITORIES, TEAM)
    monkeypatch.setenv("ROPEWAY_WORKER_HOME", str(tmp_path / "home"))
    asked = StageRequest("train", "laptop", repository, "a" * 40, "", "b" * 32)
    with pytest.raises(ConfigError, match=REPOSITORIES), open_clone(asked):
        pass
    assert not (tmp_path / "home").exists()


def test_an_empty_list_of_a_worker_is_refused():
    with pytest.raises(ConfigError, match=f"{REPOSITORIES} is empty"):
        check_repository("/srv/git/project.git", {REPOSITORIES: " , "})
