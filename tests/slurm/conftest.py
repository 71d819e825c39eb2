"""A real Slurm of two nodes for the session, and a training long enough to be interrupted; one ran without Slurm."""

import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from ropeway.runtime.supervise import runs_rank
from tests.support.main_job import MainJob, make_main_job
from tests.support.processes import kill_all, read_until
from tools.slurm_cluster import SlurmCluster, missing_programs

OPTIONS = "--nodes=2 --ntasks-per-node=1 --partition=gpu"
LONG = {
    "num_train_epochs: 1": "num_train_epochs: 20",
    "save_steps: 4": "save_steps: 40",
    "eval_steps: 8": "eval_steps: 80",
}


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Return the cluster; both nodes are free."""
    if missing := missing_programs():
        pytest.fail(f"missing: {', '.join(missing)}. `apt-get install slurmctld slurmd slurm-client munge`")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the daemons end with the tests
    with SlurmCluster(tmp_path_factory.mktemp("cluster") / "slurm") as started:
        yield started
    signal.signal(signal.SIGTERM, before)


class LongJob(NamedTuple):
    """A workspace ready to train 480 steps, and the weights that it ends with when nothing interrupts it."""

    prepared: MainJob
    weights: bytes


@pytest.fixture(scope="session")
def long_job(tmp_path_factory):
    """Return the training, not to be changed; it takes half a minute to make."""
    job = make_main_job(tmp_path_factory.mktemp("long") / "prepared")
    for old, new in LONG.items():
        job.edit("params.yaml", old, new)
    job.commit("a longer run")
    job.do("dvc", "repro", "prepare", "report_data")
    finished = job.copy(job.root.with_name("finished"))
    finished.stage("train")
    return LongJob(MainJob(job.root), finished.weights())


class SlurmJob(MainJob):
    """A workspace on a login node of the cluster."""

    def __init__(self, root: Path, cluster: SlurmCluster, options: str = OPTIONS):
        super().__init__(root)
        self.cluster, self.started = cluster, []
        del self.environment["ROPEWAY_RANKS"]
        self.environment |= {**cluster.environment, "ROPEWAY_SLURM": "1", "ROPEWAY_SLURM_ARGS": options}
        self.environment |= {"ROPEWAY_SLURM_POLL_SECONDS": "0.5"}

    def start_until(self, text, *command):
        """Start a command, `ropeway stage train` by default, and return it when it has printed a line with `text`."""
        process = self.start(*(command or ("ropeway", "stage", "train")))
        self.seen = read_until(process, text)
        return process

    def follow_until(self, process, text):
        """Read on until a process has printed a line with `text`."""
        self.seen += read_until(process, text)

    def start(self, *command):
        process = super().start(*command)
        self.started.append(process)
        return process

    def finish(self, process, code=0):
        """Return all that a process printed; it must end with this code."""
        text = "".join(self.seen) + process.stdout.read()
        process.stdout.close()
        assert process.wait(60) == code, text
        return text

    def jobs(self):
        """Return (id, state) of this workspace's jobs in the queue."""
        lines = self.cluster.command("squeue", "--noheader", "--format=%i %T %Z").splitlines()
        return [tuple(line.split()[:2]) for line in lines if line.split()[2] == str(self.root)]

    def kill_login(self, process):
        """Kill all that runs on the login node at once."""
        kill_tree(process)

    def ranks(self):
        """Return the processes of this workspace's ranks."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if runs_rank(words) and str(self.root) in words:
                found.append(process)
        return found

    def steps(self):
        """Return the steps of the checkpoints."""
        return sorted(int(path.name[5:]) for path in self.root.glob(".checkpoints/*/step-*[0-9]"))

    def wait_until(self, holds, seconds=60.0):
        self.cluster.wait_until(holds, seconds)


def kill_tree(process):
    """Kill a run and all that it started on the login node at once, as a crash of that node does."""
    login = psutil.Process(process.pid)
    kill_all([login, *login.children(recursive=True)])
    process.wait()
    process.stdout.close()


@pytest.fixture
def slurm_job(cluster, long_job, tmp_path):
    """Return a fresh copy of the training on a login node; its jobs are canceled at the end."""
    job = SlurmJob(shutil.copytree(long_job.prepared.root, tmp_path / "workspace", symlinks=True), cluster)
    yield job
    for process in job.started:
        if process.poll() is None:
            kill_tree(process)
    for number, _ in job.jobs():
        cluster.command("scancel", "--full", "--signal=KILL", number)
        cluster.command("scancel", number)
    deadline = time.monotonic() + 30
    while job.jobs() and time.monotonic() < deadline:
        time.sleep(0.1)
