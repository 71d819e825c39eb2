"""Stages in Prefect work pools: workers in clones of their own that share git, the Prefect server and a DVC remote."""

import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import uuid

import pytest

from ropeway.orchestration.remote.worker import CHECKPOINT_STORE
from ropeway.orchestration.sequence import run_retrain
from ropeway.orchestration.status import read_last_end, read_running
from ropeway.registry import Registry
from ropeway.runtime.errors import ConfigError, DataError
from tests.support.flow_processes import FLOW, TRAINING, await_deaths, check_it_saved, wait_for
from tests.support.pool_worker import POOL, PoolWorker, create_pool
from tests.support.processes import read_until

pytestmark = pytest.mark.filterwarnings(
    # dvc 3.67.1 (repo/trie.py, repo/graph.py) on pygtrie 2.6
    "ignore:_NoneStep.value will soon raise:DeprecationWarning"
)

# Each starts Prefect processes that take 25 s of a core. `make test` has one run through pools, one stop, the refusals.
SLOW = pytest.mark.slow


@pytest.fixture
def worker(on_prefect, tmp_path):
    """Return a running worker of the pool, on what is another machine."""
    create_pool(on_prefect)
    started = PoolWorker(on_prefect, tmp_path / "machine")
    yield started
    started.stop()


@pytest.fixture
def calling(flow_workspace, tmp_path, monkeypatch):
    """Return a workspace in which nothing ran, with a repository and a DVC remote that others reach."""
    publish_repository(flow_workspace, str(tmp_path / "remote"), tmp_path / "origin.git")
    monkeypatch.setenv("ROPEWAY_POOL_TRAIN", POOL)
    return flow_workspace


def publish_repository(workspace, remote, origin):
    workspace.dvc("remote", "add", "--default", "store", remote)
    workspace.dvc("remote", "modify", "store", "verify", "true")
    workspace.git("commit", "-q", "-am", "a remote")
    subprocess.run(["git", "clone", "-q", "--bare", workspace.root, origin], check=True)
    workspace.git("remote", "add", "origin", str(origin))
    workspace.git("push", "-q", "origin", "HEAD")


def trouble_everywhere(workspace, stage, code):
    """Let a stage do this first wherever it runs: it is part of the commit."""
    workspace.trouble(stage, code)
    workspace.git("add", "--force", f"break-{stage}")
    workspace.git("commit", "-q", "-m", "trouble")
    workspace.git("push", "-q", "origin", "HEAD")


def md5s(folder):
    return {hashlib.md5(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}  # noqa: S324 - as DVC names


def cached(root):
    """Return the digests of what DVC's cache of a workspace holds."""
    files = (root / ".dvc" / "cache" / "files" / "md5").glob("*/*")
    return {path.parent.name + path.name for path in files}


def start_run(workspace):
    command = [sys.executable, "-c", FLOW, str(workspace.root), "prefect"]
    return subprocess.Popen(command, cwd=workspace.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@SLOW
def test_a_stage_runs_on_the_worker_and_its_result_is_taken_over(calling, worker, capsys):
    result = run_retrain(calling.root)
    said = capsys.readouterr().out
    assert result.stages["train"] == "Completed", said
    assert result.publication.state == "Published"
    assert calling.calls() == ["fetch", "evaluate", "package"]
    assert (worker.clone() / "calls").read_text().split() == ["train"]
    assert "  learning rate 0.002" in said.splitlines()
    assert CHECKPOINT_STORE in said, "where checkpoints are, at the start of train"
    assert "learning rate 0.002" in (calling.root / ".work" / "logs" / "train.log").read_text()

    again = run_retrain(calling.root)
    assert again.stages == dict.fromkeys(result.stages, "Unchanged")
    assert calling.calls() == []
    assert (worker.clone() / "calls").read_text().split() == ["train"]


PACKAGE = """\
  package:
    cmd: python fake_stage.py evaluate ${profile} && python fake_stage.py package ${profile}
    deps:
      - runs/${profile}/model
    metrics:
      - runs/${profile}/eval.json
    outs:
      - runs/${profile}/package
"""


def test_a_run_is_published_by_a_worker_and_its_weights_stay_away_from_the_caller(
    flow_workspace, tmp_path, worker_on_s3, monkeypatch, s3_bucket, capsys
):
    graph = (flow_workspace.root / "dvc.yaml").read_text()
    (flow_workspace.root / "dvc.yaml").write_text(graph[: graph.index("  evaluate:\n")] + PACKAGE)
    publish_repository(flow_workspace, str(tmp_path / "remote"), tmp_path / "origin.git")
    monkeypatch.setenv("ROPEWAY_REGISTRY", f"s3://{s3_bucket}/{uuid.uuid4().hex[:12]}")
    for step in ("TRAIN", "PACKAGE", "PUBLISH"):
        monkeypatch.setenv(f"ROPEWAY_POOL_{step}", POOL)
    result = run_retrain(flow_workspace.root)
    assert result.publication.state == "Published", capsys.readouterr().out
    assert flow_workspace.calls() == ["fetch"]
    check_weights_are_there_only(flow_workspace, worker_on_s3)


def check_weights_are_there_only(workspace, worker):
    """Return the digests of the weights that only the worker has."""
    run, there = workspace.root / "runs" / "laptop", worker.clone() / "runs" / "laptop"
    assert not (run / "model").exists()
    assert not (run / "package").exists()
    weights = md5s(there / "model") | md5s(there / "package")
    assert weights
    assert not weights & cached(workspace.root)
    assert (run / "eval.json").read_bytes() == (there / "eval.json").read_bytes()  # a single file comes back
    return weights


@SLOW
def test_weights_stay_away_from_a_caller_whose_later_stages_are_elsewhere(
    flow_workspace, tmp_path, worker_on_s3, monkeypatch, s3_bucket, capsys
):
    prefix = f"s3://{s3_bucket}/{uuid.uuid4().hex[:12]}"
    publish_repository(flow_workspace, f"{prefix}/dvc", tmp_path / "origin.git")
    monkeypatch.setenv("ROPEWAY_REGISTRY", f"{prefix}/registry")
    for step in ("TRAIN", "EVALUATE", "PACKAGE", "PUBLISH"):
        monkeypatch.setenv(f"ROPEWAY_POOL_{step}", POOL)
    result = run_retrain(flow_workspace.root)
    said = capsys.readouterr().out
    assert result.publication.state == "Published", said
    assert flow_workspace.calls() == ["fetch"]
    weights = check_weights_are_there_only(flow_workspace, worker_on_s3)

    again = run_retrain(flow_workspace.root)
    assert again.stages == dict.fromkeys(result.stages, "Unchanged")
    assert again.publication.digest == result.publication.digest
    assert not weights & cached(flow_workspace.root)

    for step in ("TRAIN", "EVALUATE", "PACKAGE", "PUBLISH"):  # on one machine: the same version, nothing computed
        monkeypatch.delenv(f"ROPEWAY_POOL_{step}")
    alone = run_retrain(flow_workspace.root, use_prefect=False)
    assert alone.publication.digest == result.publication.digest
    assert flow_workspace.calls() == []


@pytest.fixture
def worker_on_s3(s3_server, on_prefect, tmp_path, monkeypatch):
    """Return a worker that has the S3 server's keys, as this process."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    create_pool(on_prefect)
    started = PoolWorker(on_prefect, tmp_path / "machine")
    yield started
    started.stop()


@SLOW
def test_an_error_of_the_stage_comes_back_with_its_class_and_is_not_retried(calling, worker):
    trouble_everywhere(calling, "train", "print('row 7 is empty'); sys.exit(65)")
    with pytest.raises(DataError, match="row 7 is empty"):
        run_retrain(calling.root)
    assert (worker.clone() / "calls").read_text().split() == ["train"]


def test_a_stopped_run_stops_the_stage_on_the_worker_which_saves_and_leaves_no_process(calling, worker):
    trouble_everywhere(calling, "train", TRAINING)
    with start_run(calling) as process:
        read_until(process, "training ")
        before = worker.processes()
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()
    assert process.returncode == 143, said
    clone = type(calling)(worker.clone())
    wait_for((clone.root / "saved").exists)
    assert len(before) > 4
    await_deaths([each for each in before if each.pid != worker.process.pid])
    check_it_saved(clone)


@SLOW
def test_a_killed_runs_stage_goes_on_and_the_next_run_takes_it_over(calling, worker, tmp_path):
    go = tmp_path / "go"
    os.mkfifo(go)
    trouble_everywhere(calling, "train", f"print('waiting to go'); open({str(go)!r}).read()")
    with start_run(calling) as process:
        read_until(process, "waiting to go")
        shown = wait_for(lambda: (found := read_running(calling.root)) and found.worker and found)
        assert (shown.stage, shown.pool, shown.worker) == ("train", POOL, socket.gethostname())
        process.kill()
    left = read_last_end(calling.root)
    assert (left.stage, left.code, left.pool) == ("train", None, POOL)
    with start_run(calling) as process:
        read_until(process, "continuing train-laptop")
        go.write_text("go")
        said = process.stdout.read()
    assert process.returncode == 0, said
    assert (worker.clone() / "calls").read_text().split() == ["train"]
    assert not list((calling.root / ".work").glob("*.pool.json"))


@SLOW
def test_a_silent_worker_is_given_up_and_another_one_resumes(calling, worker, on_prefect, tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWAY_WORKER_SILENCE_SECONDS", "12")
    once = tmp_path / "once"
    once.touch()
    trouble_everywhere(
        calling, "train", f"import time\nif Path({str(once)!r}).exists(): print('will die'); time.sleep(1000)"
    )
    with start_run(calling) as process:
        read_until(process, "will die")
        worker.kill()
        once.unlink()
        other = PoolWorker(on_prefect, tmp_path / "another")
        try:
            said = process.stdout.read()
        finally:
            other.stop()
    assert process.returncode == 0, said
    assert "gave no sign of life" in said
    assert (other.clone() / "calls").read_text().split() == ["train"]


def test_pools_are_refused_before_anything_runs_where_workers_could_not_follow(calling, on_prefect, monkeypatch):
    monkeypatch.setenv("ROPEWAY_POOL_TRAIN", "nowhere")
    with pytest.raises(ConfigError, match="no work pool 'nowhere'"):
        run_retrain(calling.root)
    create_pool(on_prefect)
    monkeypatch.setenv("ROPEWAY_POOL_TRAIN", POOL)
    with pytest.raises(ConfigError, match="without --no-prefect"):
        run_retrain(calling.root, use_prefect=False)
    calling.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 3e-3")
    with pytest.raises(ConfigError, match=r"uncommitted: params\.yaml"):
        run_retrain(calling.root)
    assert calling.calls() == []


@SLOW  # two real trainings beside the session's one; what it covers step by step is tested above
def test_a_real_training_killed_on_one_machine_ends_on_another_with_the_version_of_one_machine(
    main_jobs, s3_server, s3_bucket, on_prefect, tmp_path, monkeypatch
):
    prefix = f"s3://{s3_bucket}/{uuid.uuid4().hex[:12]}"
    alone = main_jobs.prepared.copy(tmp_path / "alone")
    longer = ("params.yaml", "num_train_epochs: 1", "num_train_epochs: 10")  # else it ends before it is killed
    alone.edit(*longer)
    alone.commit("longer")
    alone.do("ropeway", "run", "--no-prefect")
    published = Registry.open((alone.root / "registry").as_uri()).artifact("tiny").alias("candidate").digest

    job = main_jobs.prepared.copy(tmp_path / "caller")
    job.edit(*longer)
    shutil.rmtree(job.root / ".dvc" / "cache" / "runs")
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    job.environment |= s3_server.environment
    job.environment |= {"PREFECT_API_URL": on_prefect, "ROPEWAY_REGISTRY": f"{prefix}/registry"}
    job.environment |= {"ROPEWAY_WORKER_SILENCE_SECONDS": "20", "ROPEWAY_RETRY_SECONDS": "0"}
    job.environment |= {f"ROPEWAY_POOL_{step}": POOL for step in ("TRAIN", "EVALUATE", "PACKAGE", "PUBLISH")}
    job.do("dvc", "remote", "add", "--default", "store", f"{prefix}/dvc")
    job.do("dvc", "remote", "modify", "store", "verify", "true")
    job.commit("a remote")
    job.do("git", "clone", "-q", "--bare", str(job.root), str(tmp_path / "origin.git"))
    job.do("git", "remote", "add", "origin", str(tmp_path / "origin.git"))
    job.do("git", "push", "-q", "origin", "HEAD")

    create_pool(on_prefect)
    stated = {"ROPEWAY_RANKS": "2", "ROPEWAY_CHECKPOINT_STORE": f"{prefix}/checkpoints", "DS_ACCELERATOR": "cpu"}
    workers = [PoolWorker(on_prefect, tmp_path / "first", **stated)]
    try:
        with job.start("ropeway", "run") as process:
            read_until(process, f" MiB in {prefix}/checkpoints after ")
            workers[0].kill()
            workers.append(PoolWorker(on_prefect, tmp_path / "second", **stated))
            said = process.stdout.read()
    finally:
        for each in workers:
            each.stop()
    assert process.returncode == 0, said
    assert re.search(r"checkpoint of step \d+ was fetched from s3://", said), said
    assert "resuming after step" in said
    assert Registry.open(f"{prefix}/registry").artifact("tiny").alias("candidate").digest == published
    assert not (job.run / "model").exists()
    weights = hashlib.md5(alone.weights()).hexdigest()  # noqa: S324 - as DVC names it
    assert weights in cached(alone.root)
    assert weights not in cached(job.root)
