"""Tokenize in many processes: the same bytes for any worker, and what a kill costs."""

import importlib.util
import os
import pickle
import subprocess
import sys
import threading
from contextlib import contextmanager

import psutil
import pytest

from ropeway.config.tokenize_params import TokenizeParams
from ropeway.runtime.manifest import file_sha256
from ropeway.stages.tokenize.encode_workers import count_cores
from tests.support.processes import command_of
from tests.support.raw_records import profile, write_raw
from tests.support.tiny_run import ROOT

# Units of some lines each; from the fourth on they wait for a pipe to be written to, while it is there.
SCRIPT = """
import os
import pickle
import sys
from pathlib import Path

from ropeway.stages.tokenize import stage as tokenize
from ropeway.runtime.errors import RopewayError
from ropeway.stages.tokenize import cluster, store
from ropeway.stages.tokenize.units import tokenize_unit
from ropeway.runtime.workspace import Workspace

def make_or_wait(unit):
    gate = unit.folder.parents[3] / "gate"
    if unit.folder.name >= "00003" and gate.exists():
        gate.read_text()
    return tokenize_unit(unit)

if __name__ == "__main__":
    tokenize.UNIT_BYTES = 900
    cluster.TIMEOUT_SECONDS = float(os.environ.get("PATIENCE", "10"))
    store.tokenize_unit = make_or_wait
    try:
        root = Path(sys.argv[1])
        tokenize.run(Workspace(root, "run"), pickle.loads((root / "profile.pickle").read_bytes()))
    except RopewayError as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(error.exit_code)
"""


class Run:
    """A workspace and tokenize in a process of its own."""

    def __init__(self, root):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ropeway.data.raw_records._ROW_GROUP_CHARACTERS", 200)
            self.workspace = write_raw(root)
        (root / "start.py").write_text(SCRIPT)
        (root / "profile.pickle").write_bytes(pickle.dumps(TokenizeParams.of(profile())))
        self.gate = root / "gate"

    def start(self, **environment):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ROPEWAY_")}
        return subprocess.Popen(
            [sys.executable, self.workspace.root / "start.py", self.workspace.root],
            env={**kept, "PYTHONPATH": str(ROOT / "src"), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def do(self, *, code=0, **environment):
        """Tokenize to the end; return what was printed and the units that were made."""
        with self.start(**environment) as process:
            text = process.stdout.read()
        assert process.returncode == code, text
        return text, made(text.splitlines())

    @contextmanager
    def stopped(self, *, after, **environment):
        """A tokenize that has made `after` units and waits before the next; and the units made."""
        os.mkfifo(self.gate)
        with self.start(**environment) as process:
            lines = []
            while len(made(lines)) < after:
                line = process.stdout.readline()
                assert line, lines
                lines.append(line)
            yield process, made(lines)
            self.last = process.stdout.read()
        self.gate.unlink()

    def whole(self):
        """Units on disk."""
        return {" ".join(path.parts[-3:-1]) for path in self.workspace.work.glob("tokenize-*/*/*/manifest.json")}

    @property
    def digests(self):
        return file_sha256(self.workspace.tokens / "manifest.json")


def made(lines):
    return {" ".join(line.split()[1:3]) for line in lines if " made, " in line}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes: digests, and all units."""
    run = Run(tmp_path_factory.mktemp("alone"))
    _, units = run.do(ROPEWAY_TOKENIZE_WORKERS="1")
    assert {"talk 00003", "text 00003"} <= units
    return run.digests, units


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


@pytest.mark.parametrize("workers", ["2", "3"])
def test_the_bytes_are_the_same_for_any_number_of_processes(run, alone, workers):
    text, units = run.do(ROPEWAY_TOKENIZE_WORKERS=workers)
    assert f"units to tokenize on {workers} processes" in text
    assert (run.digests, units) == alone


def test_a_small_dataset_starts_no_worker(run, alone):
    text, _ = run.do()
    assert "processes" not in text
    assert run.digests == alone[0]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_tokenize_leaves_nothing_running_and_continues_with_what_is_missing(run, alone, workers):
    digests, everything = alone
    with run.stopped(after=3, ROPEWAY_TOKENIZE_WORKERS=workers) as (process, units):
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
    assert process.returncode == -9
    assert len(children) == (0 if workers == "1" else int(workers) + 1)  # multiprocessing's resource tracker
    assert run.whole() == units == {"talk 00000", "talk 00001", "talk 00002"}
    assert not run.workspace.tokens.exists()
    text, rest = run.do(ROPEWAY_TOKENIZE_WORKERS=workers)
    assert rest == everything - units
    assert f"tokenize: {len(units)} of {len(everything)} units are complete already" in text
    assert run.digests == digests


def test_a_killed_worker_is_a_temporary_error(run, alone):
    digests, everything = alone
    with run.stopped(after=3, ROPEWAY_TOKENIZE_WORKERS="2") as (process, units):
        encoding = [
            child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(command_of(child))
        ]
        assert len(encoding) == 2
        encoding[0].kill()
    assert process.returncode == 75
    assert "TemporaryError: tokenize: a worker died (BrokenProcessPool: killed, out of memory" in run.last
    assert "Run the same command again" in run.last
    _, rest = run.do(ROPEWAY_TOKENIZE_WORKERS="2")
    assert rest == everything - units
    assert run.digests == digests


needs_dask = pytest.mark.skipif(not importlib.util.find_spec("distributed"), reason="distributed is not installed")


class Cluster:
    """A Dask scheduler and workers on loopback, each a process as a person starts it."""

    def __init__(self):
        self.processes, self.readers = [], []
        options = ("--host", "127.0.0.1", "--no-dashboard")
        self.address, self.scheduler = self._start("scheduler", *options, "--port", "0", until="Scheduler at:")

    def add_worker(self):
        options = ("--host", "127.0.0.1", "--no-dashboard", "--no-nanny", "--nthreads", "1")
        return self._start("worker", self.address, *options, until="Registered to:")[1]

    def _start(self, what, *options, until):
        process = subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.dask_{what}", *options],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        for line in process.stderr:
            if until in line:
                reader = threading.Thread(target=process.stderr.read)  # a full pipe would stop it
                reader.start()
                self.readers.append(reader)
                return line.split()[-1], process
        raise AssertionError(f"the {what} ended")

    def close(self):
        for process in self.processes:
            process.kill()
        for process, reader in zip(self.processes, self.readers, strict=True):
            reader.join()
            process.communicate()


@pytest.fixture
def cluster():
    cluster = Cluster()
    yield cluster
    cluster.close()


@needs_dask
def test_a_dask_cluster_of_two_workers_makes_the_same_bytes(run, alone, cluster):
    for _ in range(2):
        cluster.add_worker()
    text, units = run.do(ROPEWAY_DASK_SCHEDULER=cluster.address)
    assert f"units to tokenize on the Dask cluster at {cluster.address}" in text
    assert (run.digests, units) == alone


@needs_dask
def test_a_lost_cluster_keeps_complete_units_and_this_machine_continues(run, alone, cluster):
    digests, everything = alone
    workers = [cluster.add_worker() for _ in range(2)]
    with run.stopped(after=3, ROPEWAY_DASK_SCHEDULER=cluster.address, PATIENCE="3") as (process, _):
        for worker in workers:
            worker.kill()
            worker.wait()
    units = run.whole()
    assert 3 <= len(units) < len(everything)
    assert process.returncode == 75, run.last
    assert "TemporaryError: tokenize: the Dask cluster at" in run.last
    assert "is down or has no workers; completed units are kept in" in run.last
    _, rest = run.do()
    assert rest == everything - units
    assert run.digests == digests


@needs_dask
def test_a_lost_scheduler_is_reported_at_once(run, cluster):
    cluster.add_worker()
    with run.stopped(after=3, ROPEWAY_DASK_SCHEDULER=cluster.address) as (process, _):
        cluster.scheduler.kill()
    assert process.returncode == 75, run.last
    assert "TemporaryError: tokenize: a worker died (CancelledError" in run.last


@needs_dask
def test_a_scheduler_without_workers_or_none_at_all_is_refused(run, cluster):
    text, _ = run.do(code=64, ROPEWAY_DASK_SCHEDULER=cluster.address, PATIENCE="1")
    assert f"the scheduler at {cluster.address} has no workers after 1 s" in text
    cluster.scheduler.kill()
    cluster.scheduler.wait()
    text, _ = run.do(code=64, ROPEWAY_DASK_SCHEDULER=cluster.address, PATIENCE="1")
    assert f"no Dask scheduler responds at {cluster.address} within 1 s" in text
    assert not run.workspace.tokens.exists()


def test_cores_are_counted_as_this_process_may_use_them():
    assert 1 <= count_cores() <= os.cpu_count()
