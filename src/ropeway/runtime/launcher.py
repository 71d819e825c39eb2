"""Builds the command that starts the ranks: DeepSpeed's launcher, its multi-node runner, srun or a Slurm job.

Where a run executes is set by the environment, not by params: `ROPEWAY_RANKS`; `ROPEWAY_HOSTFILE` (lines
`host slots=8`; every machine has this workspace under the same path) with `ROPEWAY_LAUNCHER` (default pdsh); in a Slurm
job with several tasks, Slurm's variables; elsewhere `ROPEWAY_SLURM=1` submits a job (`ropeway.runtime.slurm_job`).
"""

import base64
import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from ropeway.runtime.devices import (
    count_local_ranks,
    device_index,
    first_slurm_host,
    in_slurm,
    list_gpus,
    read_hostfile,
    spans_machines,
)
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.op_build import check_shared_memory
from ropeway.runtime.slurm import find_node_address, submits_jobs

LOOPBACK = "127.0.0.1"
RANK_MODULE = "ropeway.stages.train.rank"
_TASK_CORES = "SLURM_CPUS_PER_TASK"
# Where a rank fails and Slurm then ends the others, srun ends with 143, not with that rank's code (22.05). So the first
# task that fails writes its code into a file, and that code is returned. TERM, which Slurm sends to every process of a
# task, must not end the shell before the rank has saved.
_RUN_TASK = (
    'code_file=$1; shift; trap : TERM INT; "$@"; code=$?; '
    'test $code -eq 0 || (set -C; echo $code > "$code_file") 2> /dev/null; exit $code'
)
_RUN_TASKS = (
    'code_file=$1; shift; rm -f "$code_file"; "$@"; code=$?; '
    'test $code -eq 0 || ! test -s "$code_file" || code=$(cat "$code_file"); rm -f "$code_file"; exit $code'
)
# Variables that the ranks on other machines need, and prefixes of others.
_FORWARDED_VARIABLES = (
    "CXX", "DS_ACCELERATOR", "HF_HUB_OFFLINE", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "PATH", "ROPEWAY_GRACE_SECONDS",
    "ROPEWAY_OTHER_VERSIONS", "ROPEWAY_SKIP_WARM_UP", "TOKENIZERS_PARALLELISM", "TORCH_EXTENSIONS_DIR",
)  # fmt: skip
_FORWARDED_PREFIXES = ("GLOO_", "NCCL_", "PYTORCH_")


def build_launch_command(environment: Mapping[str, str], arguments: list[str], *, ranks: int, port: int) -> list[str]:
    """Return the command that starts all ranks with these arguments.

    Args:
        environment: That of the ranks (`rank_environment`); what it sets reaches the other machines.
        arguments: Those of the rank's module.
        ranks: Number of ranks.
        port: Must be free on the machine of rank 0.

    Raises:
        ConfigError: torchrun started this process, the hostfile is invalid, its slots do not add up to `ranks`, or
            Slurm's list of hosts cannot be read.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        raise ConfigError(
            "torchrun started this stage once per rank, but the stage starts the ranks itself. Run `ropeway stage "
            f"train` without torchrun, or start `-m {RANK_MODULE}` with torchrun"
        )
    rank = [sys.executable, "-m", RANK_MODULE, *arguments]
    if in_slurm(environment):
        where = f"--export=ALL,MASTER_ADDR={_find_address(first_slurm_host(environment))},MASTER_PORT={port}"
        # Since 22.05 srun does not take it over from the job.
        cores = [f"--cpus-per-task={environment[_TASK_CORES]}"] if _TASK_CORES in environment else []
        srun = ["srun", f"--ntasks={ranks}", *cores, "--kill-on-bad-exit=1", where]
        code = str(Path(arguments[0], ".work", "train.srun-code"))
        return ["sh", "-c", _RUN_TASKS, "sh", code, *srun, "sh", "-c", _RUN_TASK, "sh", code, *rank]
    if submits_jobs(environment):
        return [sys.executable, "-m", "ropeway.runtime.slurm_job", str(ranks), *arguments]
    if "ROPEWAY_HOSTFILE" in environment:
        return _multi_node_command(environment, rank, ranks=ranks, port=port)
    devices = _local_devices(environment, ranks=ranks)
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    launcher = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--node_rank=0"]
    options = [f"--master_addr={LOOPBACK}", f"--master_port={port}", "--module", "--no_local_rank"]
    return [*launcher, *options, "--log_level=warning", RANK_MODULE, *arguments]


def _find_address(host: str) -> str:
    """Return a Slurm host, or the address that Slurm has for it where its name cannot be resolved."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return find_node_address(host) or host
    return host


def _local_devices(environment: Mapping[str, str], *, ranks: int) -> list[str] | list[int]:
    """Return one GPU per rank: DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES to them, whatever it was before."""
    if "CUDA_VISIBLE_DEVICES" in environment and len(visible := list_gpus(dict(environment))) >= ranks:
        return visible[:ranks]
    return list(range(ranks))


def _multi_node_command(environment: Mapping[str, str], rank: list[str], *, ranks: int, port: int) -> list[str]:
    hostfile = Path(environment["ROPEWAY_HOSTFILE"])
    hosts = read_hostfile(hostfile)
    if sum(hosts.values()) != ranks:
        raise ConfigError(
            f"{hostfile}: expected slots for {ranks} ranks, found {sum(hosts.values())} slots. Correct the file or "
            "unset ROPEWAY_RANKS"
        )
    # DeepSpeed's runner forwards few variables, and those of NCCL only from a machine with GPUs; `env` sets the others.
    passed = [f"{name}={value}" for name, value in sorted(environment.items()) if _is_forwarded(name)]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}", "--force_multi"),
        *(f"--launcher={environment.get('ROPEWAY_LAUNCHER', 'pdsh')}", "--no_ssh_check", "--no_python"),
        *(f"--master_addr={next(iter(hosts))}", f"--master_port={port}", "--no_local_rank"),
        *("env", *passed, *rank),
    ]


def _is_forwarded(name: str) -> bool:
    return name in _FORWARDED_VARIABLES or name.startswith(_FORWARDED_PREFIXES)


def rank_environment(environment: Mapping[str, str], *, ranks: int) -> dict[str, str]:
    """Return the environment of the ranks: device, threads, offline mode.

    Ranks on other machines choose their device there (DeepSpeed does, where DS_ACCELERATOR is not set): this machine
    may be a login node without a GPU.

    Raises:
        ConfigError: The ranks run on this machine without a GPU, and it has no compiler or too little /dev/shm.
    """
    planned = {**environment, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not list_gpus(dict(environment)):
        if not spans_machines(environment):
            check_compiler()
            check_shared_memory(count_local_ranks(environment, ranks))
            planned["DS_ACCELERATOR"] = "cpu"
        # Oversubscribed cores are slower, and the thread count changes rounding: the count is fixed and recorded.
        # A job that will be submitted counts them on its own machines.
        if not submits_jobs(environment):
            shared = max(1, (os.cpu_count() or 1) // count_local_ranks(environment, ranks))
            planned.setdefault("OMP_NUM_THREADS", environment.get(_TASK_CORES, str(shared)))
    return planned


def check_compiler() -> None:
    """Raise ConfigError unless a C++ compiler is on PATH; on a CPU, DeepSpeed compiles its shared-memory op."""
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        raise ConfigError(
            f"no C++ compiler: `{compiler}` is not on PATH. DeepSpeed compiles a small op at its first start on a "
            "CPU. Install one (Debian: `apt-get install g++`; Fedora: `dnf install gcc-c++`) or set CXX"
        )


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK from Slurm's variables if srun started this rank directly."""
    if "RANK" in environment or not in_slurm(environment):
        return
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    environment.update({ours: environment[theirs] for ours, theirs in names.items()})


def adopt_device(environment: MutableMapping[str, str], *, visible: int) -> int:
    """Set LOCAL_RANK, from which DeepSpeed takes the device, to the index of this rank's GPU, and return it.

    Raises:
        ConfigError: No GPU is left for this rank.
    """
    index = device_index(int(environment["LOCAL_RANK"]), visible)
    environment["LOCAL_RANK"] = str(index)
    return index


def free_port() -> int:
    """Return a port that was free at the time of the call."""
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port: int = free.getsockname()[1]
        return port
