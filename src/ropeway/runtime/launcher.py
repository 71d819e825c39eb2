"""How the ranks are started: DeepSpeed's launcher here, its hostfile over several machines, or Slurm's srun.

Where a run runs is environment, not params: `ROPEWAY_RANKS`; `ROPEWAY_HOSTFILE` (lines `host slots=8`; all machines see
this workspace under the same path) with `ROPEWAY_LAUNCHER` (pdsh unless said otherwise); inside a Slurm job with
several tasks, its own variables.
"""

import base64
import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from ropeway.runtime.devices import count_local_ranks, in_slurm, list_gpus, read_hostfile
from ropeway.runtime.errors import ConfigError

LOOPBACK = "127.0.0.1"
RANK_MODULE = "ropeway.stages.train.rank"
# Of ours, what the ranks of another machine must have too.
_TRAVELLING = ("DS_ACCELERATOR", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PATH", "TOKENIZERS_PARALLELISM")


def build_launch_command(environment: Mapping[str, str], arguments: list[str], *, ranks: int, port: int) -> list[str]:
    """Return the command that starts every rank with these arguments; `port` is a free one on the machine of rank 0.

    Raises:
        ConfigError: torchrun started this, the hostfile cannot be read, or it has other slots than ranks.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        raise ConfigError(
            "torchrun started this stage once per rank, but the stage starts the ranks itself: run `ropeway stage "
            f"train` alone, or let torchrun start `-m {RANK_MODULE}`"
        )
    rank = [sys.executable, "-m", RANK_MODULE, *arguments]
    if in_slurm(environment):
        where = f"--export=ALL,MASTER_ADDR={socket.gethostname()},MASTER_PORT={port}"
        return ["srun", f"--ntasks={ranks}", "--kill-on-bad-exit=1", where, *rank]
    if "ROPEWAY_HOSTFILE" in environment:
        return _over_hosts(environment, rank, ranks=ranks, port=port)
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
    launcher = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--node_rank=0"]
    options = [f"--master_addr={LOOPBACK}", f"--master_port={port}", "--module", "--no_local_rank"]
    return [*launcher, *options, "--log_level=warning", RANK_MODULE, *arguments]


def _over_hosts(environment: Mapping[str, str], rank: list[str], *, ranks: int, port: int) -> list[str]:
    hostfile = Path(environment["ROPEWAY_HOSTFILE"])
    hosts = read_hostfile(hostfile)
    if sum(hosts.values()) != ranks:
        raise ConfigError(
            f"{hostfile}: its slots add up to {sum(hosts.values())}, the run has {ranks} ranks; correct the file or "
            "unset ROPEWAY_RANKS"
        )
    # DeepSpeed's runner passes NCCL's and Python's variables on, no others, so ours travel in front of the program.
    passed = [f"{name}={value}" for name, value in sorted(environment.items()) if name in _TRAVELLING]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}", "--force_multi"),
        *(f"--launcher={environment.get('ROPEWAY_LAUNCHER', 'pdsh')}", "--no_ssh_check", "--no_python"),
        *(f"--master_addr={next(iter(hosts))}", f"--master_port={port}", "--no_local_rank"),
        *("env", *passed, *rank),
    ]


def rank_environment(environment: Mapping[str, str], *, ranks: int) -> dict[str, str]:
    """Return the ranks' environment: device, threads, no network; raise ConfigError without GPU and C++ compiler."""
    planned = {**environment, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not list_gpus(dict(environment)):
        check_compiler()
        planned["DS_ACCELERATOR"] = "cpu"
        # Ranks that fight for cores are slower, and another number of threads rounds differently: fixed and recorded.
        planned.setdefault(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count_local_ranks(environment, ranks)))
        )
    return planned


def check_compiler() -> None:
    """Raise ConfigError unless a C++ compiler is on PATH; DeepSpeed builds its shared-memory op with it on a CPU."""
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        raise ConfigError(
            f"no C++ compiler: looked for `{compiler}` on PATH. DeepSpeed builds a small op with it at its first "
            "start on a CPU. Install one (Debian: `apt-get install g++`; Fedora: `dnf install gcc-c++`) or set CXX"
        )


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Name this task's place as torch.distributed does, where srun and nobody else has started it."""
    if "RANK" in environment or not in_slurm(environment):
        return
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    environment.update({ours: environment[theirs] for ours, theirs in names.items()})


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port: int = free.getsockname()[1]
        return port
