"""A real Slurm with two nodes on this machine, for `make test-slurm` and docs/tasks/slurm.md.

    python -m tools.slurm_cluster FOLDER     start it, print the variable to set, run until Ctrl-C

Debian's packages slurmctld, slurmd, slurm-client and munge; both nodes are slurmd processes on loopback. Everything
that the daemons write is in FOLDER. Jobs of partition `gpu` are preempted and requeued by those of `urgent`.
"""

import argparse
import ctypes
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
NODES = ("node1", "node2")
GRACE_SECONDS = 30  # of partition `gpu`, from the preemption to KILL
_START_SECONDS, _STOP_SECONDS = 60.0, 20.0
_PR_SET_PDEATHSIG = 1
_CONFIG = """\
ClusterName=ropeway
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=gpu Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=node1,node2 MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Return the programs of Slurm and munge that this machine lacks."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin"))
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class SlurmCluster:
    """Two nodes; `with` starts the daemons and ends them, their jobs first, whatever happens.

    Attributes:
        folder: What the daemons write.
        environment: The variable by which Slurm's commands find this cluster.
    """

    def __init__(self, folder: Path) -> None:
        """Use an empty folder; the path of a socket in it must be shorter than 100 characters."""
        self.folder = folder
        self.config = folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.config)}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        """Start the daemons and wait until both nodes accept jobs."""
        with ExitStack() as failed:
            failed.callback(self._stop)
            self._write_files()
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-f", str(self.config))
            for node in NODES:
                self.start_node(node)
            self.wait_until(lambda: self.command("sinfo", "-h", "-N", "-o", "%T").split()[:2] == ["idle"] * 2)
            failed.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel all jobs, end the daemons by their pids, and end what a killed node left."""
        self._stop()

    def command(self, *words: str) -> str:
        """Return what one of Slurm's commands prints; an empty text if it fails."""
        environment = {**os.environ, **self.environment}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False).stdout

    def wait_until(self, holds: Callable[[], object], seconds: float = _START_SECONDS) -> None:
        """Wait until a condition holds; raise TimeoutError with the end of the daemons' logs."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                logs = [path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.log"))]
                raise TimeoutError("\n".join(logs))
            time.sleep(0.05)

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        (self.folder / node).mkdir(exist_ok=True)
        self._start(node, "slurmd", "-D", "-N", node, "-f", str(self.config))

    def kill_node(self, node: str) -> None:
        """Send SIGKILL to everything on a node, as a power failure does."""
        daemon = self._daemons.pop(node)
        for process in [psutil.Process(daemon.pid), *self.processes_on(node)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        daemon.wait(_STOP_SECONDS)

    def processes_on(self, node: str) -> list[psutil.Process]:
        """Return the processes of jobs on a node: their slurmstepd, and what runs under it."""
        spool = str(self.folder / node)
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                is_task = (
                    environment.get("SLURM_CONF") == str(self.config) and environment.get("SLURMD_NODENAME") == node
                )
                if is_task or _is_stepd(process, spool):
                    found.append(process)
        return found

    def _write_files(self) -> None:
        for name in ("munge", "state"):
            (self.folder / name).mkdir(parents=True)
            (self.folder / name).chmod(0o711)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        facts = {"host": socket.gethostname().partition(".")[0], "user": _user()}
        text = _CONFIG.format(folder=self.folder, ports=_free_ports(3), grace=GRACE_SECONDS, **facts)
        self.config.write_text(text)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        files = [f"--{name}={folder / name.partition('-')[0]}" for name in ("key-file", "socket", "pid-file")]
        files += [f"--seed-file={folder / 'seed'}", f"--log-file={self.folder / 'munge.log'}"]
        self._start("munged", "munged", "--foreground", "--force", *files)
        self.wait_until((folder / "socket").exists)

    def _start(self, name: str, *command: str) -> None:
        path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin"))
        environment = {**os.environ, **self.environment, "PATH": path}
        with (self.folder / f"{name}.out.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [shutil.which(command[0], path=path) or command[0], *command[1:]],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches this process alone
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - a daemon must not outlive the tests
            )

    def _stop(self) -> None:
        if self.config.exists() and "slurmctld" in self._daemons:
            user = f"--user={_user()}"
            self.command("scancel", "--quiet", "--full", "--signal=KILL", "--state=RUNNING", user)
            self.command("scancel", "--quiet", user)
            with suppress(TimeoutError):
                self.wait_until(lambda: not self.command("squeue", "-h").strip(), _STOP_SECONDS)
        for name in ("slurmctld", *NODES, "munged"):
            if daemon := self._daemons.pop(name, None):
                daemon.terminate()
                try:
                    daemon.wait(_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        for node in NODES:
            for process in self.processes_on(node):
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _is_stepd(process: psutil.Process, spool: str) -> bool:
    """Return whether a process is the slurmstepd of a node: it has the node's log open, and hides its environment."""
    if process.name() != "slurmstepd":
        return False
    return any(file.path.startswith((f"{spool}/", f"{spool}.log")) for file in process.open_files())


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def main() -> None:
    """Run a cluster until Ctrl-C or TERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    if missing := missing_programs():
        print(f"missing: {', '.join(missing)}. Run `apt-get install slurmctld slurmd slurm-client munge`")
        sys.exit(64)
    if folder.exists() and any(folder.iterdir()):
        print(f"{folder} is not empty; name a new folder")
        sys.exit(64)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), SlurmCluster(folder) as cluster:
        print(f"{len(NODES)} nodes accept jobs. In another terminal: export SLURM_CONF={cluster.config}", flush=True)
        signal.pause()
    print("stopped")


if __name__ == "__main__":
    main()
