"""A workspace with fake stages, and one Prefect server for the session; Prefect is imported when a test needs it."""

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.main_job import share_main_jobs
from tests.support.shared import build_once
from tests.support.shipped_params import read_shipped_params

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def main_jobs(tmp_path_factory):
    """Return the main job prepared and finished; not to be changed."""
    return share_main_jobs(tmp_path_factory)


class FlowWorkspace:
    """The real params.yaml and DVC settings, fake stages, a git history of one commit."""

    def __init__(self, root):
        self.root = root

    def copy(self, root):
        """Return a copy of the workspace elsewhere."""
        return FlowWorkspace(shutil.copytree(self.root, root, symlinks=True))

    def git(self, *arguments):
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=self.root, check=True, capture_output=True, text=True
        ).stdout

    def dvc(self, *arguments):
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(command, cwd=self.root, check=True, capture_output=True, text=True).stdout

    def edit(self, name, old, new):
        path = self.root / name
        text = path.read_text()
        assert old in text, f"{old!r} is not in {name}"
        path.write_text(text.replace(old, new))

    def calls(self):
        """Return the stages whose command ran since the last look, but for the one that always runs."""
        path = self.root / "calls"
        names = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return [name for name in names if name != "identity"]

    def trouble(self, stage, code):
        """Let a stage do this before anything else; None undoes that."""
        path = self.root / f"break-{stage}"
        path.unlink(missing_ok=True) if code is None else path.write_text(code)


def make_workspace(root):
    root.mkdir()
    (root / "params.yaml").write_text(read_shipped_params(), encoding="utf-8")
    for folder in ("configs", "flows"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / "flow_workspace" / "dvc.yaml", root)
    shutil.copy(HERE / "flow_workspace" / "fake_stage.txt", root / "fake_stage.py")
    (root / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", root / ".dvc")
    ignored = [(ROOT / ".gitignore").read_text(), "/calls", "/break-*", "/.dvc/tmp", "/.dvc/cache"]
    (root / ".gitignore").write_text("\n".join(ignored))
    workspace = FlowWorkspace(root)
    workspace.git("init", "-q")
    workspace.git("add", "--all")
    workspace.git("commit", "-q", "-m", "a workspace")
    return workspace


def set_environment(monkeypatch):
    for name in ("ROPEWAY_LOCK_HELD", "ROPEWAY_SUPERVISED_BY", "ROPEWAY_REGISTRY", "DVC_STAGE", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ROPEWAY_RETRY_SECONDS", "0")
    monkeypatch.setenv("ROPEWAY_GRACE_SECONDS", "10")


@pytest.fixture(scope="session")
def set_flow_environment():
    """Return the function that gives a monkeypatch the environment of a flow under test."""
    return set_environment


@pytest.fixture
def flow_workspace(tmp_path, monkeypatch):
    """Return a workspace in which nothing has run."""
    set_environment(monkeypatch)
    return make_workspace(tmp_path / "workspace")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Return a workspace whose run is complete and published, not to be changed."""
    from ropeway.orchestration.sequence import run_retrain

    def build(folder):
        with pytest.MonkeyPatch.context() as monkeypatch:
            set_environment(monkeypatch)
            workspace = make_workspace(folder / "workspace")
            run_retrain(workspace.root, use_prefect=False)
        workspace.calls()

    return FlowWorkspace(build_once(tmp_path_factory, "made-workspace", build) / "workspace")


@pytest.fixture
def made_workspace(made_once, tmp_path, monkeypatch):
    """Return a copy of a workspace whose run is complete and published."""
    set_environment(monkeypatch)
    return made_once.copy(tmp_path / "workspace")


class PrefectApi:
    """A server of our own kind, started when its URL is asked for, and a home with an empty database (tables made)."""

    def __init__(self):
        self._running, self._url = ExitStack(), None
        self.home = self.migrated = None

    @property
    def url(self):
        from ropeway.orchestration.prefect_server import await_server, open_server

        if self._url is None:
            self._url = self._running.enter_context(open_server(self.home))
            await_server(self._url, self.home)
        return self._url

    def end(self):
        """End the server; its database stays for the next one."""
        self._url = None
        self._running.close()


PREFECT = PrefectApi()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem):
    """End the server before the tests of other folders: without work it takes 1.3 s of CPU a minute."""
    if nextitem is None or HERE not in nextitem.path.parents:
        PREFECT.end()


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory):
    """Prefect's settings for this process, and its server."""
    PREFECT.home = tmp_path_factory.mktemp("prefect")
    before = dict(os.environ)
    from ropeway.orchestration.prefect_server import apply_settings

    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        del os.environ[name]
    apply_settings(PREFECT.home)
    home = PREFECT.home / ".prefect"

    def build(folder):
        assert PREFECT.url
        shutil.copytree(home, folder / "migrated")

    PREFECT.migrated = build_once(tmp_path_factory, "prefect-home", build) / "migrated"
    if not home.exists():  # the other process of `make test` has made the tables
        shutil.copytree(PREFECT.migrated, home)
    yield PREFECT
    PREFECT.end()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def own_prefect(made_workspace, prefect_api, monkeypatch):
    """Let the made workspace have its own database, as a person's has: an empty one, its tables made (6 s of work)."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(made_workspace.root / ".prefect"))
    shutil.copytree(prefect_api.migrated, made_workspace.root / ".prefect")
    return made_workspace


@pytest.fixture
def on_prefect(prefect_api, monkeypatch):
    """Let `run_retrain` use the session's server."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_api.url)
    return prefect_api.url
