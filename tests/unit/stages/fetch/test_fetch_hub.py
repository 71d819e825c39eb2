"""`kind: huggingface`, against a Hub on loopback and against a warm cache without a network."""

import json
import socket
import subprocess
import sys
import time

import pytest

from ropeway.config.load_params import load_profile
from ropeway.config.sections import HuggingfaceSource
from ropeway.data.raw_records import iterate_records
from ropeway.models.conversation import Conversation
from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.runtime.manifest import load_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch.patterns import match_names
from ropeway.stages.fetch.sources import source_identity
from ropeway.storage.hub import resolve_commit
from tests.support.freezing import run_fetch
from tests.support.hub_world import COMMIT, REPO, TOKEN, Hub, lay_cache, point_at, serve_hub
from tests.support.tiny_run import ROOT

TALK = {"conversation": [{"input": "q", "output": "a"}], "instruction": "s"}
FILES = {
    "README.md": b"# Talks",
    "orca-chat-gpt4.json": json.dumps([TALK, {}, TALK]).encode(),
    "data/a.jsonl": json.dumps(TALK).encode(),
    "data/deep/b.jsonl": json.dumps(TALK).encode() * 2,
}
_, LAPTOP = load_profile(ROOT / "params.yaml", "laptop")


def source(*files, revision="main", repo=REPO):
    return HuggingfaceSource(
        kind="huggingface",
        repo=repo,
        revision=revision,
        files=list(files) or ["*.json"],
        rows="orca_chat",
        columns={},
        expected_rows=None,
    )


def run(root, one):
    workspace = Workspace(root, "laptop")
    profile = LAPTOP.model_copy(update={"sources": {"talks": one}, "max_refused_fraction": 0.5})
    run_fetch(workspace, profile)
    facts = load_manifest(workspace.raw, remedy="")["sources"]["talks"]
    return facts, list(iterate_records(workspace.raw / "talks"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serve_hub(Hub(dict(FILES))) as served:
        point_at(monkeypatch, tmp_path / "cache", url=served.url)
        yield served


@pytest.fixture
def offline(tmp_path, monkeypatch):
    point_at(monkeypatch, tmp_path / "cache", offline=True)
    return lay_cache(tmp_path / "cache", FILES)


def test_a_branch_becomes_a_commit_and_a_commit_asks_nobody(hub, tmp_path):
    assert source_identity(source(), tmp_path) == {
        "kind": "huggingface",
        "repo": REPO,
        "commit": COMMIT,
        "files": ["*.json"],
    }
    asked = len(hub.asked)
    assert source_identity(source(revision=COMMIT), tmp_path)["commit"] == COMMIT
    assert len(hub.asked) == asked


def test_only_the_matching_files_are_downloaded_and_every_record_counted(hub, tmp_path):
    facts, records = run(tmp_path, source())
    assert records == [Conversation(("q", "a"), "s")] * 2
    assert (facts["read"], facts["kept"], facts["refused"]) == (3, 2, {"missing column 'conversation'": 1})
    assert facts["first_refused"] == [
        {"where": "orca-chat-gpt4.json: record 2", "reason": "missing column 'conversation'"}
    ]
    assert facts["identity"]["commit"] == COMMIT
    assert {asked.split("/")[-1] for asked in hub.asked if "/resolve/" in asked} == {"orca-chat-gpt4.json"}


def test_what_is_in_the_cache_is_not_downloaded_again_also_without_a_network(hub, tmp_path, monkeypatch):
    run(tmp_path, source())
    before = [asked for asked in hub.asked if asked.startswith("GET /datasets")]
    run(tmp_path, source())
    assert [asked for asked in hub.asked if asked.startswith("GET /datasets")] == before
    point_at(monkeypatch, tmp_path / "cache", offline=True)
    assert run(tmp_path, source())[0]["kept"] == 2


def test_a_private_repository_opens_with_the_token_and_the_token_is_nowhere(hub, tmp_path, monkeypatch, capsys):
    hub.private = True
    with pytest.raises(ConfigError, match=r".401.*HF_TOKEN"):
        source_identity(source(), tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run(tmp_path, source())[0]["kept"] == 2
    assert all(TOKEN not in text for text in capsys.readouterr())
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in left if TOKEN.encode() in path.read_bytes()]


def test_a_hub_on_another_machine_without_tls_is_refused_before_it_sees_the_token(monkeypatch):
    for name in ("ROPEWAY_ALLOW_HTTP", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *words, **_: asked.append(words))
    with pytest.raises(ConfigError, match=r"HF_ENDPOINT: http://hub\.example is not encrypted"):
        resolve_commit("a/b", "main", kind="model")
    assert asked == []


@pytest.mark.parametrize(
    ("status", "code", "error", "phrase"),
    [
        (401, "", ConfigError, ".401.*HF_TOKEN"),
        (401, "GatedRepo", ConfigError, "gated.*datasets/team/talks.*HF_TOKEN"),
        (403, "GatedRepo", ConfigError, "gated.*datasets/team/talks.*HF_TOKEN"),
        (403, "", ConfigError, "HF_TOKEN .403"),
        (404, "RepoNotFound", ConfigError, "the repository does not exist.*HF_TOKEN"),
        (404, "RevisionNotFound", ConfigError, "the revision does not exist.*/commits/main"),
        (404, "", ConfigError, ".404.*HF_ENDPOINT"),
        (429, "", TemporaryError, "429"),
        (503, "", TemporaryError, "503.*HF_HUB_OFFLINE=1"),
    ],
)
def test_each_refusal_of_the_hub_says_what_to_do(hub, tmp_path, status, code, error, phrase):
    hub.error = (status, code)
    for one in (source(), source(revision=COMMIT)):
        with pytest.raises(error, match=phrase) as caught:
            run(tmp_path, one)
        assert REPO in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.usefixtures("hub")
def test_a_token_that_the_hub_does_not_know_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "schlüssel")
    with pytest.raises((ConfigError, TemporaryError)) as caught:
        source_identity(source(), tmp_path)
    assert "schlüssel" not in str(caught.value)


@pytest.mark.parametrize("repo", ["a/b/c", "-x/y", "x y"])
@pytest.mark.usefixtures("hub")
def test_a_name_that_no_repository_can_have_is_reported(tmp_path, repo):
    with pytest.raises(ConfigError, match="owner/name"):
        source_identity(source(repo=repo), tmp_path)


@pytest.mark.usefixtures("hub")
def test_an_unknown_branch_is_reported(tmp_path):
    with pytest.raises(ConfigError, match=rf"{REPO} at 'v2': the revision does not exist"):
        source_identity(source(revision="v2"), tmp_path)


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_without_a_network_it_fails_at_once_and_says_how_to_go_on(tmp_path, monkeypatch, revision):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_at(monkeypatch, tmp_path / "cache", url=f"http://127.0.0.1:{closed.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(TemporaryError, match=r"not reachable .*HF_HUB_OFFLINE=1"):
            run(tmp_path, source(revision=revision))
        assert time.monotonic() - started < 5


@pytest.mark.usefixtures("hub")
def test_a_pattern_that_matches_nothing_names_the_files_there_are(tmp_path):
    with pytest.raises(
        ConfigError, match=r"'\*.parquet' matches none of the 4 files in the repository: README.md, data/a.jsonl, "
    ):
        run(tmp_path, source("*.json", "*.parquet"))


def test_a_matched_file_of_no_known_format_is_reported_before_anything_is_downloaded(hub, tmp_path):
    hub.files |= {"logo.png": b"png"}
    with pytest.raises(ConfigError, match=r"README.md: a .txt or .md file is one document, .* rows: orca_chat"):
        run(tmp_path, source("*.md"))
    with pytest.raises(ConfigError, match=r"logo.png: expected a file name in"):
        run(tmp_path, source("*.png"))
    assert not [asked for asked in hub.asked if "/resolve/" in asked]


@pytest.mark.usefixtures("offline")
def test_offline_a_branch_is_what_the_cache_knows_and_its_files_are_read(tmp_path):
    assert source_identity(source(), tmp_path)["commit"] == COMMIT
    assert run(tmp_path, source("data/*.jsonl"))[0]["read"] == 1
    with pytest.raises(ConfigError, match=r"'\*.parquet' matches none of the 4 files in the cache"):
        run(tmp_path, source("*.parquet"))


@pytest.mark.parametrize(
    ("one", "phrase"),
    [
        (source(revision="v2"), "the commit of that revision"),
        (source(revision="../refs/main"), "the commit of that revision"),
        (source(repo="team/other"), "the commit of that revision"),
        (source(revision="d" * 40), "matches none of the 0 files in the cache"),
    ],
)
@pytest.mark.usefixtures("offline")
def test_offline_what_the_cache_lacks_is_reported(tmp_path, one, phrase):
    with pytest.raises(ConfigError, match=phrase):
        run(tmp_path, one)


def test_offline_a_damaged_reference_is_reported(offline, tmp_path):
    (offline.parents[1] / "refs" / "main").write_text("")
    with pytest.raises(ConfigError, match="expected a commit of 40 hex digits"):
        source_identity(source(), tmp_path)


def test_the_environment_is_respected_as_a_person_sets_it(tmp_path):
    lay_cache(tmp_path / "cache", FILES)
    code = (
        "from ropeway.storage import hub\n"
        f"assert hub.resolve_commit('{REPO}', 'main', kind='dataset') == '{COMMIT}'\n"
        f"assert hub.download_files('{REPO}', '{COMMIT}', ['data/a.jsonl'], kind='dataset', revision='main').is_dir()\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "x/c.jsonl", "x/y/d.jsonl"]),
        ("x/**", ["x/c.jsonl", "x/y/d.jsonl"]),
        ("?.jsonl", ["a.jsonl", "b.jsonl"]),
        ("[!a].jsonl", ["b.jsonl"]),
        ("[ab].jsonl", ["a.jsonl", "b.jsonl"]),
        ("x/c.jsonl", ["x/c.jsonl"]),
        ("a+jsonl", []),
    ],
)
def test_patterns_read_as_glob_reads_them_in_folders(tmp_path, pattern, names):
    there = ["a.jsonl", "b.jsonl", "x/c.jsonl", "x/y/d.jsonl"]
    assert match_names([pattern], there) == {pattern: names}
    for name in there:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    import glob

    found = glob.glob(pattern, root_dir=tmp_path, recursive=True)  # noqa: PTH207 - the authority
    assert sorted(name for name in found if (tmp_path / name).is_file()) == names
