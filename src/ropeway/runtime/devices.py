"""Detects the hardware of this machine without loading torch."""

import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ropeway.runtime.environment import read_count
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.slurm import count_job_tasks, submits_jobs

CPU_RANKS = 2
_SLOTS = re.compile(r"(\S+)\s+slots=([0-9]{1,6})\s*(?:#.*)?")
_BRACKETS = re.compile(r"([^\[\]]*)\[([^\[\]]+)\](.*)")
_NUMBERS = re.compile(r"(\d+)(?:-(\d+))?")
_NVIDIA_SMI_SECONDS = 5  # nvidia-smi may have to load the driver


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as reported by its driver."""

    name: str
    memory_bytes: int


def count_ranks(environment: dict[str, str] | None = None, *, devices: Path = Path("/dev")) -> int:
    """Return the number of training ranks.

    `ROPEWAY_RANKS`, else the tasks of the Slurm job that this runs in or will submit, else the slots of the hostfile,
    else the number of NVIDIA GPUs, else 2.

    Raises:
        ConfigError: `ROPEWAY_RANKS` is not a positive whole number, `ROPEWAY_HOSTFILE` is not a valid hostfile, or
            `ROPEWAY_SLURM_ARGS` states no number of tasks.
    """
    environment = dict(os.environ) if environment is None else environment
    if (stated := read_count(environment, "ROPEWAY_RANKS")) is not None:
        return stated
    if in_slurm(environment):
        return int(environment["SLURM_NTASKS"])
    if submits_jobs(environment):
        return count_job_tasks(environment)
    if "ROPEWAY_HOSTFILE" in environment:
        return sum(read_hostfile(Path(environment["ROPEWAY_HOSTFILE"])).values())
    return len(list_gpus(environment, devices=devices)) or CPU_RANKS


def in_slurm(environment: Mapping[str, str]) -> bool:
    """Return whether this is a Slurm job with several tasks; a job with one task runs like a plain machine."""
    tasks = environment.get("SLURM_NTASKS", "")
    return "SLURM_JOB_ID" in environment and tasks.isdecimal() and int(tasks) > 1


def first_slurm_host(environment: Mapping[str, str]) -> str:
    """Return the first host of the Slurm job, which runs its first task and so rank 0.

    Raises:
        ConfigError: Slurm's list of hosts is missing or cannot be read.
    """
    for name in ("SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if name in environment:
            return expand_host_list(environment[name])[0]
    raise ConfigError(
        "SLURM_JOB_ID is set, but neither SLURM_JOB_NODELIST nor SLURM_NODELIST is. Start the run inside a Slurm job, "
        "or unset SLURM_JOB_ID and SLURM_NTASKS"
    )


def expand_host_list(text: str) -> list[str]:
    """Return the hosts of a Slurm host list, in its order. Source: scontrol(1), `show hostnames`.

    >>> expand_host_list("node[08-10,7],gpu-a")
    ['node08', 'node09', 'node10', 'node7', 'gpu-a']

    Raises:
        ConfigError: It is not a host list.
    """
    hosts = [host for part in re.split(r",(?![^\[]*\])", text) for host in _expand_brackets(part, text)]
    if not all(hosts):
        raise _invalid_host_list(text)
    return hosts


def _expand_brackets(part: str, text: str) -> list[str]:
    """Return the hosts of a part without commas outside of brackets."""
    found = _BRACKETS.fullmatch(part)
    if found is None:
        if "[" in part or "]" in part:
            raise _invalid_host_list(text)
        return [part]
    before, numbers, after = found.groups()
    endings = _expand_brackets(after, text)
    return [f"{before}{number}{end}" for number in _expand_numbers(numbers, text) for end in endings]


def _expand_numbers(numbers: str, text: str) -> Iterator[str]:
    for part in numbers.split(","):
        found = _NUMBERS.fullmatch(part)
        if found is None or (found[2] and int(found[2]) < int(found[1])):
            raise _invalid_host_list(text)
        for number in range(int(found[1]), int(found[2] or found[1]) + 1):
            yield f"{number:0{len(found[1])}}"


def _invalid_host_list(text: str) -> ConfigError:
    return ConfigError(f"SLURM_JOB_NODELIST: expected hosts such as node[01-03,7],gpu-a; found {text!r}")


def spans_machines(environment: Mapping[str, str]) -> bool:
    """Return whether ranks may run on other machines than this one, which may then have other hardware."""
    return in_slurm(environment) or submits_jobs(environment) or "ROPEWAY_HOSTFILE" in environment


def device_index(local_rank: int, visible: int) -> int:
    """Return the index of the GPU that a rank uses, out of the `visible` ones of its process.

    A scheduler that gives each task its own GPU makes only that one visible, as device 0.

    Raises:
        ConfigError: Several GPUs are visible, but fewer than there are ranks on this machine.
    """
    if visible == 1:
        return 0
    if local_rank < visible:
        return local_rank
    raise ConfigError(
        f"rank {local_rank} of {platform.node()} (counted from 0) has no GPU: {visible} are visible to it. Start at "
        "most one rank per GPU (ROPEWAY_RANKS, slots of the hostfile, or Slurm's --ntasks-per-node)"
    )


def list_gpus(environment: dict[str, str] | None = None, *, devices: Path = Path("/dev")) -> list[str]:
    """Return the NVIDIA GPUs that this process may use, without loading torch."""
    environment = dict(os.environ) if environment is None else environment
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [card for card in visible.split(",") if card.strip() not in ("", "-1")]
    return sorted(path.name for path in devices.glob("nvidia[0-9]*"))


def detect_gpus(environment: dict[str, str] | None = None, *, devices: Path = Path("/dev")) -> list[Gpu]:
    """Return the GPUs that this process may use, with their memory; empty without GPUs or if nvidia-smi fails."""
    cards = list_gpus(environment, devices=devices)
    if not cards:
        return []
    chosen = [
        "-i",
        ",".join(card.removeprefix("nvidia") for card in cards),
    ]  # indices, or UUIDs as in CUDA_VISIBLE_DEVICES
    query = ["nvidia-smi", *chosen, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=True, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line]
    return [Gpu(name.strip(), int(mebibytes) * 2**20) for name, mebibytes in rows if mebibytes.strip().isdecimal()]


def cpu_model_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return the CPU model as Linux reports it, else the architecture; rounding can differ between models."""
    try:
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def read_hostfile(path: Path) -> dict[str, int]:
    """Return host -> slots of a hostfile in DeepSpeed's and OpenMPI's format; raise ConfigError if it is invalid."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"ROPEWAY_HOSTFILE: {path} cannot be read ({reason}). Correct the path") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _SLOTS.fullmatch(line.strip())
        if match is None or match[1] in hosts:
            raise ConfigError(f"{path}:{number}: expected `HOST slots=N`, each host once; found {line.strip()!r}")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"{path}: expected at least one line `HOST slots=N`, found 0")
    return hosts


def count_local_ranks(environment: Mapping[str, str], ranks: int) -> int:
    """Return how many ranks run on one machine (at least 1), which share its CPU cores."""
    if in_slurm(environment):
        return max(1, ranks // int(environment.get("SLURM_JOB_NUM_NODES", "1")))
    if "ROPEWAY_HOSTFILE" in environment:
        return max(read_hostfile(Path(environment["ROPEWAY_HOSTFILE"])).values())
    return ranks
