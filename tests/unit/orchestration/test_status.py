"""`ropeway status` in every state of a workspace: it reads, takes no lock, writes nothing, and imports no DVC."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ropeway.cli.main import app
from ropeway.cli.status_output import list_problems
from ropeway.orchestration.status import find_stages, read_last_end, read_running, read_status
from ropeway.registry import Registry
from ropeway.runtime.lock import workspace_lock
from ropeway.runtime.manifest import write_json
from ropeway.runtime.workspace import Workspace
from tests.support.registry_world import make_package
from tests.support.shipped_params import read_shipped_params

ROOT = Path(__file__).parents[3]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A fresh clone, as far as status reads one."""
    for name in ("ROPEWAY_REGISTRY", "PREFECT_API_URL", "PREFECT_HOME", "PREFECT_API_AUTH_STRING"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "workspace"
    root.mkdir()
    shutil.copy(ROOT / "dvc.yaml", root)
    (root / "params.yaml").write_text(read_shipped_params(), encoding="utf-8")
    shutil.copytree(ROOT / "configs", root / "configs")
    monkeypatch.chdir(root)
    return root


def snapshot(root):
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(root.rglob("*"))}


def record_end(root, stage, *, code, signal=None, log=True):
    work = root / ".work"
    if log:
        (work / "logs").mkdir(parents=True, exist_ok=True)
        (work / "logs" / f"{stage}.log").write_text("a line\n")
    if code is not None:
        facts = {"stage": stage, "code": code, "signal": signal, "why": None, "at": "2026-11-30T10:00:00+00:00"}
        write_json(work / f"{stage}.dvc.json", facts)
        write_json(work / f"{stage}.exit.json", facts)


def write_progress(root, step):
    path = Workspace(root, "").progress("train")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"step": step, "total_steps": 40, "eta_seconds": 90.0}) + "\n")


def test_a_fresh_clone_has_a_status_and_nothing_is_written(root):
    before = snapshot(root)
    found = read_status(root)
    assert snapshot(root) == before
    assert (found.profile, found.running, found.last_end, found.runs, found.versions) == ("laptop", None, None, (), ())
    assert {stage.reasons for stage in found.forecast.stages} == {("it has not run before",)}
    assert (found.prefect, list_problems(found)) == (None, [])


def test_neither_dvc_nor_prefect_nor_torch_is_imported(root):
    code = (
        "import sys; from pathlib import Path; from ropeway.orchestration.status import read_status; "
        "read_status(Path()); print(sorted({'dvc', 'prefect', 'torch', 'boto3', 'pyarrow'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_run_is_shown_with_its_stage_step_and_eta(root):
    with workspace_lock(root, command="ropeway stage train", profile="laptop"):
        write_progress(root, 10)
        running = read_running(root)
        assert (running.pid, running.stage, running.step, running.total_steps) == (os.getpid(), "train", 10, 40)
        assert 80 < running.eta_seconds <= 90
        before = snapshot(root)
        assert read_status(root).running.holds
        assert snapshot(root) == before
    assert read_running(root) is None


def test_the_progress_of_an_earlier_start_is_not_shown(root):
    write_progress(root, 10)
    old = time.time() - 60
    os.utime(Workspace(root, "").progress("train"), (old, old))
    with workspace_lock(root, command="ropeway stage train", profile="laptop"):
        assert read_running(root).step is None


def test_the_stage_of_a_run_is_found_by_its_supervisor(root):
    (root / ".work").mkdir()
    command = [sys.executable, "-m", "ropeway.runtime.supervise", "--record", str(root / ".work" / "train.dvc.json")]
    with subprocess.Popen([*command, "--", "sleep", "60"]) as process:
        assert list(find_stages(root)) == ["train"]
        with workspace_lock(root, command="ropeway run", profile="laptop"):
            assert read_running(root).stage == "train"
        process.terminate()
    assert find_stages(root) == {}


@pytest.mark.parametrize(
    ("code", "signal", "fix"),
    [
        (None, None, "ropeway run --profile laptop"),  # killed with everything above it: no record
        (75, "SIGTERM", "ropeway run --profile laptop"),
        (75, None, "ropeway run --profile laptop"),
        (64, None, "ropeway doctor"),
        (1, None, "ropeway logs train"),
        (65, None, "ropeway logs train"),
    ],
)
def test_a_stage_that_failed_is_a_problem_with_the_command_that_fixes_it(root, code, signal, fix):
    record_end(root, "fetch", code=0)
    os.utime(root / ".work" / "logs" / "fetch.log", (1, 1))
    os.utime(root / ".work" / "fetch.exit.json", (1, 1))
    record_end(root, "train", code=code, signal=signal)
    (problem,) = list_problems(read_status(root))
    assert (problem.about, problem.fix) == ("last stage", fix)
    assert read_last_end(root).code == code


def test_a_stage_that_ended_well_is_no_problem(root):
    record_end(root, "train", code=0)
    assert list_problems(read_status(root)) == []


def test_invalid_params_are_a_problem_and_the_rest_is_shown(root):
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("learning_rate: 2e-3", "learning_rat: 2e-3"))
    record_end(root, "train", code=None)
    found = read_status(root)
    assert found.profile == "laptop"
    assert found.forecast is None
    assert "learning_rat" in next(one.words for one in found.problems if one.about == "params")
    assert found.versions == ()
    assert found.last_end.stage == "train"
    assert CliRunner().invoke(app, ["status"]).exit_code == 0


def test_a_missing_params_file_is_a_problem_too(root):
    (root / "params.yaml").unlink()
    found = read_status(root)
    assert (found.profile, found.forecast, found.versions) == (None, None, None)
    assert [one.about for one in found.problems] == ["params"]


def test_candidate_and_production_are_shown_with_who_moved_them(root, tmp_path):
    artifact = Registry.open(Workspace(root, "").registry_url).artifact("laptop")
    done = artifact.publish(make_package(tmp_path / "package"), provenance={}, attachments={})
    artifact.version(done.digest).promote("candidate", expect=None, by="ana", reason="better")
    (target,) = read_status(root).versions
    assert (target.alias, target.version, target.digest) == ("candidate", "laptop@v1", done.digest)
    assert (target.by, target.reason, target.identity) == ("ana", "better", "claimed")


def test_a_registry_that_does_not_answer_in_time_costs_a_second_and_is_a_problem(root, monkeypatch):
    monkeypatch.setattr("ropeway.orchestration.status.ANSWER_SECONDS", 0.05)
    never = threading.Event()
    monkeypatch.setattr("ropeway.orchestration.status._read_versions", lambda *_: never.wait())
    found = read_status(root)
    never.set()
    assert found.versions is None
    assert [(one.about, one.fix) for one in found.problems if one.about == "versions"] == [
        ("versions", "ropeway registry list")
    ]


ANSWERS = {
    "/api/health": True,
    "/api/flow_runs/filter": [
        {"id": "1", "name": "laptop-1", "state": {"name": "Published"}, "start_time": "2026-11-30T10:00:00Z"}
    ],
    "/api/deployments/filter": [
        {"name": "retrain", "status": "READY", "schedules": [{"active": True, "schedule": {"cron": "0 3 * * *"}}]},
        {"name": "review", "status": "NOT_READY", "schedules": []},
    ],
}


@contextmanager
def prefect_server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(ANSWERS[self.path]).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()
    thread.join()
    server.server_close()


def test_runs_and_schedules_come_from_the_server_if_one_answers(root, monkeypatch):
    with prefect_server() as url:
        monkeypatch.setenv("PREFECT_API_URL", url)
        view = read_status(root).prefect
    assert [(run.name, run.state) for run in view.runs] == [("laptop-1", "Published")]
    assert [(one.deployment, one.ready, one.cron) for one in view.schedules] == [
        ("retrain", True, ("0 3 * * *",)),
        ("review", False, ()),
    ]


def test_a_stated_server_that_does_not_answer_is_a_problem(root, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert [(one.about, one.fix) for one in read_status(root).problems] == [("server", "ropeway doctor")]


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("columns", ["40", "80"])
def test_its_lines_fit_the_terminal_and_its_json_parses(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    text = CliRunner().invoke(app, ["status"]).stdout
    longest = max(text.splitlines(), key=len)
    assert len(longest) <= int(columns) or len(max(longest.split(), key=len)) > int(columns) // 2
    facts = json.loads(CliRunner().invoke(app, ["status", "--json"]).stdout)
    assert facts["profile"] == "laptop"
    assert len(facts["forecast"]["stages"]) == 10


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (".work/lock", '{"pid": 1, "since": "yesterday"}'),
        (".work/lock", '{"pid": -5}'),
        (".work/train.exit.json", "xx"),
        (".work/train.exit.json", '{"code": "a"}'),
        ("dvc.lock", "stages: 3\n"),
        ("dvc.lock", "stages: {fetch: 3}\n"),
        ("dvc.yaml", "stages: 3\n"),
        ("dvc.yaml", "stages: {fetch: [1]}\n"),
    ],
)
def test_a_damaged_file_leaves_the_rest_of_the_status(root, name, content):
    (root / ".work").mkdir()
    (root / name).write_text(content)
    done = CliRunner().invoke(app, ["status", "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found["profile"] == "laptop"
    if name.startswith("dvc"):
        assert "stages" in next(one["words"] for one in found["problems"] if one["about"] == "next run")


def test_links_to_nothing_and_folders_are_no_logs(root):
    record_end(root, "train", code=0)
    (root / ".work" / "logs" / "x.log").symlink_to("nothing")
    (root / ".work" / "logs" / "dir.log").mkdir()
    assert read_last_end(root).stage == "train"
    assert CliRunner().invoke(app, ["logs"], catch_exceptions=False).exit_code == 0


def test_a_stage_whose_caller_was_killed_may_still_run_in_its_pool(tmp_path):
    work = tmp_path / ".work"
    (work / "logs").mkdir(parents=True)
    (work / "logs" / "train.log").touch()
    (work / "train.pool.json").write_text('{"pool": "gpu", "flow_run": "1"}')
    end = read_last_end(tmp_path)
    assert (end.stage, end.code, end.pool) == ("train", None, "gpu")
    assert find_stages(tmp_path) == {}  # no run follows it
    with workspace_lock(tmp_path, command="ropeway run", profile="laptop"):
        assert list(find_stages(tmp_path)) == ["train"]
        assert read_running(tmp_path).stage == "train"
    (work / "train.pool.json").unlink()
    assert read_last_end(tmp_path).pool is None


def test_a_server_that_is_starting_is_not_said_to_be_none(root):
    (root / ".prefect").mkdir()
    write_json(root / ".prefect" / "ropeway-server.json", {"url": "http://127.0.0.1:9/api", "pid": os.getpid()})
    found = read_status(root)
    assert found.prefect is None
    assert "http://127.0.0.1:9 " in next(one.words for one in found.problems if one.about == "server")
    (root / ".prefect" / "ropeway-server.json").unlink()
    assert not [one for one in read_status(root).problems if one.about == "server"]


def call_in_pool(root, **facts):
    since = datetime.now(UTC) - timedelta(hours=1)
    stated = {"pool": "gpu", "flow_run": "1", "since": since.isoformat()}
    write_json(root / ".work" / "train.pool.json", {**stated, "worker": None, "sign_at": None, **facts})


def test_a_stage_in_a_work_pool_is_shown_with_pool_worker_and_last_progress(root):
    with workspace_lock(root, command="ropeway run", profile="laptop"):
        call_in_pool(root)
        waiting = read_running(root)
        assert (waiting.stage, waiting.pool, waiting.worker, waiting.sign_seconds) == ("train", "gpu", None, None)
        assert "waiting for a worker" in show_status()
        at = datetime.now(UTC) - timedelta(seconds=30)
        call_in_pool(root, worker="node7", sign_at=at.isoformat())
        write_progress(root, 5)
        found = read_running(root)
        assert (found.worker, found.step) == ("node7", 5)
        assert found.sign_seconds == pytest.approx(30, abs=20)
        assert found.stage_seconds == pytest.approx(3600, abs=20), (
            "since it was called, not since its last sign of life"
        )
        words = show_status()
        assert "work pool gpu" in words
        assert "node7" in words


def show_status():
    return " ".join(CliRunner().invoke(app, ["status"], catch_exceptions=False).stdout.split())
