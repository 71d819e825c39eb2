import hashlib
import subprocess

import pytest

from ropeway.orchestration import dvc_graph as graph
from ropeway.orchestration.reproduce import (
    RunRecord,
    check_revision,
    clone_revision,
    describe_differences,
    other_weights,
    plan_environment,
    reproduce,
)
from ropeway.registry import Registry
from ropeway.registry.layout import blob_key
from ropeway.registry.signing_keys import make_keys
from ropeway.runtime.devices import cpu_model_name
from ropeway.runtime.errors import ConfigError, DataError, RegistryError
from ropeway.storage import open_store
from tests.support.registry_world import flip, make_package, put

ATTEMPT = {"python": "3.11.7", "torch": "2.13.0", "device": "EPYC", "kernels": "AVX2", "ranks": 2, "host": "here"}
LOCK = {
    "stages": {
        "train": {
            "deps": [{"path": ".identity/code-train.json", "md5": "1"}, {"path": "runs/p/data", "md5": "2"}],
            "outs": [{"path": "runs/p/model", "md5": "3"}, {"path": "runs/p/provenance.json", "md5": "4"}],
        }
    }
}


def record(**changes):
    values = {
        "files": {"model.safetensors": "aa", "README.md": "bb", "manifest.json": "cc"},
        "facts": {"fingerprint": "f", "digests": {"raw": "r", "data": "d"}},
        "block": {"learning_rate": 1e-5, "stop": {"spike_ratio": 2.0}},
        "lock": LOCK,
        "timings": {"attempts": [ATTEMPT]},
    }
    return RunRecord(**{**values, **changes})


def lock_with(kind, path, md5):
    stage = LOCK["stages"]["train"]
    entries = [{**one, "md5": md5} if one["path"] == path else one for one in stage[kind]]
    return {"stages": {"train": {**stage, kind: entries}}}


def test_equal_runs_differ_in_nothing_whatever_clock_and_host_say():
    again = record(
        timings={"attempts": [{**ATTEMPT, "host": "there", "seconds": 9}]},
        lock=lock_with("outs", "runs/p/provenance.json", "9"),
    )
    assert describe_differences(record(), again) == []
    assert other_weights(record(), again) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"timings": {"attempts": [{**ATTEMPT, "python": "3.12.1"}]}}, "python: published with 3.11.7, now 3.12.1"),
        ({"timings": {"attempts": [{**ATTEMPT, "torch": "2.14.0"}]}}, "torch: published with 2.13.0, now 2.14.0"),
        ({"timings": {"attempts": [{**ATTEMPT, "device": "Xeon"}]}}, "device: published with EPYC, now Xeon"),
        ({"timings": {"attempts": [{**ATTEMPT, "kernels": "AVX512"}]}}, "kernels: published with AVX2, now AVX512"),
        ({"timings": {"attempts": [{**ATTEMPT, "ranks": 4}]}}, "ranks: published with 2, now 4"),
        ({"timings": {"attempts": [ATTEMPT, {**ATTEMPT, "ranks": 4}]}}, "ranks: published with 2, now 2, then 4"),
        ({"timings": {}}, "environment: not recorded for this run"),
        (
            {"block": {"learning_rate": 2e-5, "stop": {"spike_ratio": 2.0}}},
            "params: learning_rate: published with 1e-05, now 2e-05",
        ),
        ({"block": {"learning_rate": 1e-5, "stop": {}}}, "params: stop.spike_ratio: published with 2.0, now no value"),
        (
            {"facts": {"fingerprint": "f", "digests": {"raw": "r", "data": "x"}}},
            "digests.data: published with d, now x",
        ),
        ({"lock": lock_with("deps", ".identity/code-train.json", "9")}, "stage train: its code differs"),
        ({"lock": lock_with("outs", "runs/p/model", "9")}, "stage train: equal inputs, different output runs/p/model"),
        ({"files": {"model.safetensors": "aa", "README.md": "xx", "manifest.json": "cc"}}, "README.md: bytes differ"),
        ({"files": {"README.md": "bb", "manifest.json": "cc"}}, "model.safetensors: bytes differ"),
    ],
)
def test_each_difference_is_named_alone(changes, words):
    assert describe_differences(record(), record(**changes)) == [words]


def test_weights_are_compared_shard_by_shard():
    then = record(files={"a.safetensors": "1", "b.safetensors": "2", "x.json": "3"})
    now = record(files={"a.safetensors": "1", "b.safetensors": "9", "c.safetensors": "4", "x.json": "9"})
    assert other_weights(then, now) == ["b.safetensors", "c.safetensors"]


@pytest.mark.parametrize(
    ("provenance", "words"),
    [
        ({}, "published without git"),
        ({"git": None}, "published without git"),
        (
            {"git": "c" * 40, "dirty": True, "dirty_files": ["src/x.py"]},
            r"revision cccccccccccc in src/x.py",
        ),
        ({"git": "refs/pull/666/head"}, "refs/pull/666/head"),
    ],
)
def test_a_version_whose_code_git_does_not_hold_is_refused(provenance, words):
    with pytest.raises(RegistryError, match=words):
        check_revision(provenance, None, "tiny@v1")


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "project" / "inner"
    root.mkdir(parents=True)
    (root / "params.yaml").write_text("profile: tiny\n")
    git = ["git", "-C", str(root.parent), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    first = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (root / "params.yaml").write_text("profile: other\n")
    subprocess.run([*git, "commit", "-qam", "two"], check=True)
    return root, first


def test_the_clone_stands_at_the_revision_and_is_continued(repository, tmp_path):
    root, first = repository
    said = []
    place = clone_revision(root, first, tmp_path / "clone", said.append)
    assert place == tmp_path / "clone" / "inner"
    assert (place / "params.yaml").read_text() == "profile: tiny\n"
    assert (root / "params.yaml").read_text() == "profile: other\n"
    assert clone_revision(root, first, tmp_path / "clone", said.append) == place
    assert said[-1].startswith("continuing in")


def test_an_unknown_commit_a_taken_folder_and_no_git_are_refused(repository, tmp_path, monkeypatch):
    root, first = repository
    with pytest.raises(ConfigError, match=r"git does not have revision 0{40}\. `git fetch` it"):
        clone_revision(root, "0" * 40, tmp_path / "clone", print)
    assert not (tmp_path / "clone").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ConfigError, match=r"taken is not a clone of revision [0-9a-f]{12}\..*--to"):
        clone_revision(root, first, tmp_path / "taken", print)
    (tmp_path / "plain").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(ConfigError, match="not in a git repository"):
        clone_revision(tmp_path / "plain", first, tmp_path / "clone", print)


def test_the_revisions_own_code_runs_on_as_many_ranks_as_then_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("ROPEWAY_RANKS", raising=False)
    monkeypatch.setenv("PYTHONPATH", "before")
    assert plan_environment(tmp_path, record()) == {"ROPEWAY_RANKS": "2"}
    (tmp_path / "src" / "ropeway").mkdir(parents=True)
    assert plan_environment(tmp_path, record())["PYTHONPATH"] == f"{tmp_path / 'src'}:{tmp_path}:before"
    monkeypatch.setenv("ROPEWAY_RANKS", "1")
    assert "ROPEWAY_RANKS" not in plan_environment(tmp_path, record())


def test_files_of_a_version_are_read_by_name_and_hashed(tmp_path):
    store = open_store((tmp_path / "registry").as_uri())
    put(store, make_package(tmp_path / "package"))
    version = Registry(store).version("tiny@v1")
    assert version.read_file("plots/loss.svg") == b"<svg/>"
    assert version.read_file("dvc.lock", attached=True) is None
    flip(store, blob_key(hashlib.sha256(b"<svg/>").hexdigest()))
    with pytest.raises(DataError, match=r"the blob of plots/loss\.svg"):
        version.read_file("plots/loss.svg")


def test_a_lock_that_is_none_is_refused():
    assert graph.parse_lock(b"") == {}
    assert graph.parse_lock(b"stages:\n  a: {cmd: x}\n")["stages"]["a"] == {"cmd": "x"}
    with pytest.raises(ConfigError, match=r"dvc\.lock: cannot be read"):
        graph.parse_lock(b"a: [")


def test_the_cpu_is_named_by_its_model(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 7763\nprocessor\t: 1\n")
    assert cpu_model_name(tmp_path / "cpuinfo") == "AMD EPYC 7763"
    assert cpu_model_name(tmp_path / "none")


def test_an_unsigned_version_is_not_reproduced_under_a_policy(tmp_path, monkeypatch):
    store = open_store((tmp_path / "registry").as_uri())
    put(store, make_package(tmp_path / "package"))
    make_keys(tmp_path / "key")
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(tmp_path))
    version, lines = Registry(store).version("tiny@v1"), []
    with pytest.raises(DataError, match="no signature of a trusted key"):
        reproduce(tmp_path, version, target=tmp_path / "clone", write_line=lines.append)
    assert lines == []
    assert not (tmp_path / "clone").exists()
