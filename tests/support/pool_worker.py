"""Prefect workers with a home of their own, as on other machines, for tests of stages in work pools."""

import functools
import os
import subprocess
import sys
from contextlib import suppress

import psutil

POOL = "gpu"


class PoolWorker:
    """A worker process; it shares git, the Prefect server and the DVC remote with the test, and nothing else."""

    def __init__(self, api, home, *, pool=POOL, **environment):
        self.home = home
        home.mkdir()
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("ROPEWAY_", "DVC_"))}
        self.log = (home / "worker.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"],
            cwd=home,
            env={
                **ours,
                "PREFECT_API_URL": api,
                "PREFECT_HOME": str(home / "prefect"),
                "PREFECT_WORKER_QUERY_SECONDS": "1",
                "ROPEWAY_WORKER_HOME": str(home / "work"),
                "ROPEWAY_GRACE_SECONDS": "30",
                "WANDB_MODE": "disabled",
                **environment,
            },
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def clone(self):
        """Return the folder of its first clone."""
        (found,) = self.home.glob("work/*/clone-0")
        return found

    def processes(self):
        """Return its process and all descendants."""
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.process.pid)
            return [main, *main.children(recursive=True)]
        return []

    def kill(self):
        """Kill it and everything it started at once, as a power cut does; return the processes."""
        found = self.processes()
        for each in found:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        self.process.wait()
        return found

    def stop(self):
        """End it and what it started, each by its own process id."""
        if self.process.poll() is None:
            self.kill()
        self.log.close()


@functools.cache
def create_pool(api, name=POOL):
    """Create a process pool on this server as a person does, once: the command takes 3 s."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "work-pool", "create", name, "--type", "process", "--overwrite"],
        env={**os.environ, "PREFECT_API_URL": api},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
