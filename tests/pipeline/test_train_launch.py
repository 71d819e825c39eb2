"""Several machines, played by this one: pdsh and srun are scripts that start here what they would start there."""

import os
import sys

import pytest

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


def test_two_hosts_of_a_hostfile_train_one_model(machines, monkeypatch):
    hostfile = machines.parent / "hosts"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    monkeypatch.setenv("ROPEWAY_HOSTFILE", str(hostfile))
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):  # planned by the stage, not inherited
        monkeypatch.delenv(name, raising=False)
    printed, workspace = train(machines, zero(2))
    assert "2 ranks x" in printed
    sent = next(line for line in printed.splitlines() if line.startswith("pdsh:"))
    assert " HF_HUB_OFFLINE=1 " in sent
    assert " OMP_NUM_THREADS=" in sent
    assert (workspace.model / "model.safetensors").is_file()


def test_two_tasks_of_slurm_train_one_model(machines, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "127.0.0.1")
    printed, workspace = train(machines, zero(2))
    assert "2 ranks x" in printed
    assert (workspace.model / "model.safetensors").is_file()
