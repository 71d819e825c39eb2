"""`ropeway clean`: what nothing needs goes, what a version or the present run needs stays, and nothing goes unasked."""

import json

import pytest
from typer.testing import CliRunner

from ropeway.cli.main import app
from ropeway.orchestration import cleanup as clean
from ropeway.orchestration import dvc_graph as graph
from ropeway.orchestration.sequence import run_retrain
from ropeway.runtime.errors import ConfigError, DataError, RegistryError, TemporaryError
from ropeway.runtime.lock import workspace_lock

pytestmark = pytest.mark.filterwarnings(
    # dvc 3.67.1 (repo/trie.py, repo/graph.py) on pygtrie 2.6
    "ignore:_NoneStep.value will soon raise:DeprecationWarning"
)


def files_of(root):
    return {
        path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and ".git" not in path.parts
    }


def data_of(workspace):
    """The digests of the present data: the folder's listing and its files."""
    lock = graph.parse_lock((workspace.root / "dvc.lock").read_bytes())
    (raw,) = (out["md5"] for out in lock["stages"]["fetch"]["outs"] if out["path"].endswith("raw"))
    cache = workspace.root / ".dvc" / "cache" / "files" / "md5"
    return {raw, *(one["md5"] for one in json.loads((cache / raw[:2] / raw[2:]).read_bytes()))}


def cached(workspace):
    cache = workspace.root / ".dvc" / "cache" / "files" / "md5"
    return {path.parent.name + path.name for path in cache.glob("??/*")}


@pytest.fixture(scope="module")
def three_runs_made(made_once, set_flow_environment, tmp_path_factory):
    """Three versions, the first of other data; the results of the last are the present ones."""
    first, workspace = data_of(made_once), made_once.copy(tmp_path_factory.mktemp("three") / "workspace")
    (workspace.root / "sources").mkdir()
    (workspace.root / "sources" / "more.txt").write_text("more")
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_flow_environment(monkeypatch)
        for rate in ("3e-3", "4e-3"):
            text = (workspace.root / "params.yaml").read_text()
            (workspace.root / "params.yaml").write_text(text.replace("learning_rate: 2e-3", f"learning_rate: {rate}"))
            run_retrain(workspace.root, use_prefect=False)
            (workspace.root / "params.yaml").write_text(text)
    workspace.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 4e-3")
    workspace.calls()
    return workspace, first


@pytest.fixture
def three_runs(three_runs_made, set_flow_environment, tmp_path, monkeypatch):
    """A copy of them, and the digests of the first one's data."""
    set_flow_environment(monkeypatch)
    workspace, first = three_runs_made
    return workspace.copy(tmp_path / "workspace"), first


def test_clean_removes_what_no_version_or_current_output_needs(three_runs):
    workspace, first = three_runs
    before, objects = files_of(workspace.root), cached(workspace)
    plan = clean.plan_clean(workspace.root, keep=1, unsynced=False)
    assert {removal.kind for removal in plan} == {"DVC cache", "DVC run-cache"}
    assert files_of(workspace.root) == before  # a plan removes nothing
    assert clean.clean(workspace.root, keep=1, unsynced=False) == plan
    gone = {removal.path.relative_to(workspace.root).as_posix() for removal in plan}
    assert files_of(workspace.root) | {".work/lock"} == (before - gone) | {".work/lock"}
    assert first <= cached(workspace) < objects  # what `ropeway reproduce` restores of the first version
    assert clean.plan_clean(workspace.root, keep=1, unsynced=False) == []

    run_retrain(workspace.root, use_prefect=False)
    assert workspace.calls() == []
    for name in ("raw", "model", "package"):
        (path,) = (workspace.root / "runs").glob(f"*/{name}")
        assert path.is_dir()
    workspace.dvc("checkout", "--force")
    assert graph.plan(workspace.root)[-1].will_run is False


def test_keep_retains_older_outputs_and_a_reverted_value_restores_them(three_runs):
    workspace, _ = three_runs
    assert clean.clean(workspace.root, keep=3, unsynced=False) == []
    clean.clean(workspace.root, keep=2, unsynced=False)
    workspace.edit("params.yaml", "learning_rate: 4e-3", "learning_rate: 3e-3")
    assert run_retrain(workspace.root, use_prefect=False).stages["train"] == "Restored"


def test_clean_removes_nothing_during_a_run_or_without_the_registry(three_runs):
    workspace, _ = three_runs
    before = cached(workspace)
    with workspace_lock(workspace.root, command="ropeway run"), pytest.raises(TemporaryError, match="is held by"):
        clean.clean(workspace.root, keep=1, unsynced=False)
    lock = (workspace.root / "dvc.lock").read_bytes()
    (workspace.root / "dvc.lock").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"dvc\.lock"):
        clean.clean(workspace.root, keep=1, unsynced=False)
    (workspace.root / "dvc.lock").write_text("stages: {train: null}")
    with pytest.raises(ConfigError, match=r"dvc\.lock"):
        clean.clean(workspace.root, keep=1, unsynced=False)
    (workspace.root / "dvc.lock").write_bytes(lock)
    (workspace.root / "registry").rename(workspace.root / "aside")  # as if it were elsewhere and not configured
    with pytest.raises(RegistryError, match="Which data its versions need is not known"):
        clean.clean(workspace.root, keep=1, unsynced=False)
    (workspace.root / "aside").rename(workspace.root / "registry")
    versions = workspace.root / "registry" / "models" / "laptop" / "versions"
    (versions / "00000002.json").write_text("{")
    with pytest.raises(DataError, match="00000002"):
        clean.clean(workspace.root, keep=1, unsynced=False)
    assert cached(workspace) == before


def test_clean_does_not_touch_a_shared_cache(three_runs, tmp_path):
    workspace, _ = three_runs
    (workspace.root / ".dvc" / "cache").rename(tmp_path / "shared")
    workspace.dvc("cache", "dir", "--local", str(tmp_path / "shared"))
    assert clean.plan_clean(workspace.root, keep=1, unsynced=True) == []


def test_clean_removes_synced_wandb_runs_and_stale_work_files(made_workspace, monkeypatch):
    work = made_workspace.root / ".work"
    for name, synced in (("offline-run-1", True), ("offline-run-2", False)):
        (work / "wandb" / name).mkdir(parents=True)
        (work / "wandb" / name / f"{name}.wandb").write_bytes(b"x" * 5000)
        if synced:
            (work / "wandb" / name / f"{name}.wandb.synced").touch()
    for name in (
        "reproduce/laptop-1",
        "tokenize-laptop-0123456789abcdef",
        "tokenize-old-0123456789abcdef",
        "prepare-laptop",
    ):
        (work / name).mkdir(parents=True)
        (work / name / "file").write_bytes(b"y" * 100)

    def named(**options):
        return {removal.path.name for removal in clean.plan_clean(made_workspace.root, keep=1, **options)}

    always = {"offline-run-1", "laptop-1", "tokenize-old-0123456789abcdef", "prepare-laptop"}
    assert named(unsynced=False) == always
    assert named(unsynced=True) == {*always, "offline-run-2"}
    monkeypatch.chdir(made_workspace.root)
    shown = CliRunner().invoke(app, ["clean", "--json"])
    assert {removal["path"].rpartition("/")[2] for removal in json.loads(shown.stdout)["removals"]} == always
    assert (work / "reproduce" / "laptop-1").is_dir()
    done = CliRunner().invoke(app, ["clean", "--apply"])
    assert done.exit_code == 0, done.stdout
    assert not (work / "reproduce" / "laptop-1").exists()
    assert (work / "wandb" / "offline-run-2").is_dir()
    assert (work / "tokenize-laptop-0123456789abcdef").is_dir()


def test_run_summary_and_doctor_print_disk_usage(made_workspace, capsys, monkeypatch):
    (made_workspace.root / ".checkpoints").mkdir()
    (made_workspace.root / ".checkpoints" / "state").write_bytes(bytes(3 << 20))
    run_retrain(made_workspace.root, use_prefect=False)
    assert "checkpoints 3.0 MiB; `ropeway clean` shows what can go" in " ".join(capsys.readouterr().out.split())
    monkeypatch.chdir(made_workspace.root)
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert "checkpoints 3.0 MiB" in next(one["words"] for one in found if one["about"] == "on disk")
