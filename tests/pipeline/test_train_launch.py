"""Several machines, played by this one: pdsh and srun are scripts that start here what they would start there."""

import os
import signal
import socketserver
import subprocess
import sys
import threading

import pytest

from tests.support.processes import read_until
from tests.support.training import train, zero

PDSH = """#!{python}
import os, subprocess, sys
at = sys.argv.index("-w")
hosts, command = sys.argv[at + 1].split(","), " ".join(sys.argv[at + 2 :])
print("pdsh:", command, flush=True)
login = dict(HOME=os.environ["HOME"], PATH="/usr/bin:/bin")  # a shell that ssh opens inherits nothing
ranks = [subprocess.Popen(["bash", "-c", command.replace("%n", str(n))], env=login) for n in range(len(hosts))]
sys.exit(max(rank.wait() for rank in ranks))
"""
SRUN = """#!{python}
import os, subprocess, sys
options = [part for part in sys.argv[1:] if part.startswith("--")]
command = sys.argv[1 + len(options) :]
count = next(int(part.split("=")[1]) for part in options if part.startswith("--ntasks"))
exported = next(part for part in options if part.startswith("--export="))
named = dict(part.split("=", 1) for part in exported.removeprefix("--export=ALL,").split(","))
place = lambda n: dict(SLURM_PROCID=str(n), SLURM_LOCALID=str(n), SLURM_NTASKS=str(count))
ranks = [subprocess.Popen(command, env=dict(os.environ) | named | place(n)) for n in range(count)]
sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.fixture
def machines(tmp_path, monkeypatch):
    """Return the folder of a fresh workspace; pdsh and srun stand on PATH."""
    tools, root = tmp_path / "bin", tmp_path / "workspace"
    tools.mkdir()
    root.mkdir()
    for name, text in (("pdsh", PDSH), ("srun", SRUN)):
        (tools / name).write_text(text.format(python=sys.executable))
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return root


@pytest.mark.slow  # in every run: ranks on two hosts start, train and save when they are stopped
def test_two_hosts_of_a_hostfile_train_one_model(machines, monkeypatch):
    hostfile = machines.parent / "hosts"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    monkeypatch.setenv("ROPEWAY_HOSTFILE", str(hostfile))
    printed, workspace = train(machines, zero(2))
    assert "2 ranks x" in printed
    assert (workspace.model / "model.safetensors").is_file()


def test_two_tasks_of_slurm_train_one_model(machines, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "127.0.0.1")
    printed, workspace = train(machines, zero(2))
    assert "2 ranks x" in printed
    assert (workspace.model / "model.safetensors").is_file()


REMOTE_PDSH = """#!{python}
import socket, sys
at = sys.argv.index("-w")
hosts, command = sys.argv[at + 1].split(","), " ".join(sys.argv[at + 2 :])
remotes = [socket.create_connection(("127.0.0.1", {port})).makefile("rw") for _ in hosts]
for number, remote in enumerate(remotes):
    print(command.replace("%n", str(number)), file=remote, flush=True)
codes = [0]
for remote in remotes:
    for line in remote:
        codes.append(int(line.split()[1])) if line.startswith("exit ") else print(line, end="", flush=True)
sys.exit(max(codes))
"""


class Sshd(socketserver.StreamRequestHandler):
    """Runs one command outside of the caller's process tree, as the ssh server of another machine does."""

    def handle(self):
        command = self.rfile.readline().decode()
        self.server.commands.append(command)
        login = {"HOME": os.environ["HOME"], "PATH": "/usr/bin:/bin"}
        out = self.connection.fileno()
        code = subprocess.run(["bash", "-c", command], env=login, stdout=out, stderr=out, check=False).returncode
        self.wfile.write(f"\nexit {code}\n".encode())


@pytest.fixture
def sshd():
    """Return a server that runs commands; `commands` has those that it received."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Sshd) as server:
        server.daemon_threads, server.commands = True, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_ranks_of_other_machines_save_when_the_run_is_stopped(main_jobs, sshd, tmp_path):
    job = main_jobs.prepared.copy(tmp_path / "workspace")
    hostfile, pdsh = tmp_path / "hosts", tmp_path / "bin" / "pdsh"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    pdsh.parent.mkdir()
    pdsh.write_text(REMOTE_PDSH.format(python=sys.executable, port=sshd.server_address[1]))
    pdsh.chmod(0o755)
    environment = dict(job.environment)
    for name in ("ROPEWAY_GRACE_SECONDS", "OMP_NUM_THREADS", "HF_HUB_OFFLINE"):  # planned by the stage, not inherited
        job.environment.pop(name, None)
    job.environment |= {"ROPEWAY_HOSTFILE": str(hostfile), "PATH": f"{pdsh.parent}{os.pathsep}{environment['PATH']}"}
    process = job.start("ropeway", "stage", "train")
    seen = read_until(process, "step 5/")
    process.send_signal(signal.SIGTERM)
    printed = process.stdout.read()
    process.stdout.close()
    assert process.wait(60) == 75, printed
    assert "stopped after step" in printed
    assert len(sshd.commands) == 2, "DeepSpeed's runner has ended the launchers by name"
    for sent in sshd.commands:
        assert " HF_HUB_OFFLINE=1 " in sent
        assert " OMP_NUM_THREADS=" in sent
    assert "2 ranks x" in "".join(seen) + printed
    job.environment = environment
    assert "resuming after step" in job.stage("train")
    assert job.weights() == main_jobs.finished.weights()
