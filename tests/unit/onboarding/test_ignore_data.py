"""The data of a new profile in .gitignore: what git is asked decides, so git itself is the authority here."""

import shutil
import subprocess

import pytest

from ropeway.onboarding.ignore_data import IgnoredData, ignore_data
from ropeway.runtime.errors import ConfigError


def git(root, *arguments):
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def root(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "data" / "chats").mkdir(parents=True)
    for name in ("mine.jsonl", "my notes.txt", "chats/a.jsonl"):
        (tmp_path / "data" / name).write_text("x\n")
    return tmp_path


def list_loose(root):
    return set(git(root, "ls-files", "--others", "--exclude-standard").splitlines())


@pytest.mark.parametrize(
    ("path", "line", "left"),
    [
        ("data/mine.jsonl", "/mine.jsonl", {"data/my notes.txt", "data/chats/a.jsonl"}),
        ("data/my notes.txt", "/my\\ notes.txt", {"data/mine.jsonl", "data/chats/a.jsonl"}),
        ("data/*.jsonl", "/*.jsonl", {"data/my notes.txt", "data/chats/a.jsonl"}),
        ("data/**/*.jsonl", "/**/*.jsonl", {"data/my notes.txt"}),
        ("data/chats", "/chats", {"data/mine.jsonl", "data/my notes.txt"}),
    ],
)
def test_git_ignores_the_data_and_nothing_else(root, path, line, left):
    found = ignore_data(root, [path])
    assert found == IgnoredData((("data/.gitignore", line),))
    assert found.files == ["data/.gitignore"]
    assert list_loose(root) == left | {"data/.gitignore"}


def test_what_git_ignores_already_is_not_added_again(root):
    ignore_data(root, ["data/mine.jsonl", "data/*.jsonl"])
    before = (root / "data" / ".gitignore").read_bytes()
    assert ignore_data(root, ["data/mine.jsonl", "data/*.jsonl"]) == IgnoredData()
    assert (root / "data" / ".gitignore").read_bytes() == before


def test_a_line_is_added_after_a_last_line_without_an_end(root):
    (root / "data" / ".gitignore").write_text("*.tmp")
    ignore_data(root, ["data/mine.jsonl"])
    assert (root / "data" / ".gitignore").read_text() == "*.tmp\n/mine.jsonl\n"


def test_a_link_that_came_with_the_data_names_no_file_that_is_changed(root, tmp_path_factory):
    victim = tmp_path_factory.mktemp("home") / ".bashrc"
    victim.write_text("mine\n")
    (root / "data" / ".gitignore").symlink_to(victim)
    assert ignore_data(root, ["data/mine.jsonl"]) == IgnoredData(((".gitignore", "/data/mine.jsonl"),))
    assert "data/mine.jsonl" not in list_loose(root)
    (root / "linked").symlink_to(victim.parent)
    (victim.parent / "x.jsonl").write_text("x")
    ignore_data(root, ["linked/x.jsonl"])
    assert sorted(path.name for path in victim.parent.iterdir()) == [".bashrc", "x.jsonl"]
    (root / ".gitignore").unlink()
    (root / ".gitignore").symlink_to(victim)
    with pytest.raises(ConfigError, match="is a link"):
        ignore_data(root, ["data/my notes.txt"])
    assert victim.read_text() == "mine\n"


def test_data_that_git_has_is_named_and_stays(root):
    git(root, "add", "data/mine.jsonl")
    assert ignore_data(root, ["data/mine.jsonl"]) == IgnoredData(tracked=("data/mine.jsonl",))


@pytest.mark.parametrize("path", ["/data/mine.jsonl", "../mine.jsonl", "https://host/mine.jsonl", "s3://b/m.jsonl"])
def test_data_elsewhere_is_left_alone(root, path):
    assert ignore_data(root, [path]) == IgnoredData()


def test_without_git_nothing_is_written(root):
    shutil.rmtree(root / ".git")
    assert ignore_data(root, ["data/mine.jsonl"]) == IgnoredData()
    assert not (root / "data" / ".gitignore").exists()
