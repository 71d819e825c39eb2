"""What this machine trains on, found without loading torch."""

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ropeway.runtime.errors import ConfigError

CPU_RANKS = 2
_SLOTS = re.compile(r"(\S+)\s+slots=(\d+)\s*(?:#.*)?")
_ASK_SECONDS = 5  # nvidia-smi wakes a sleeping driver


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card as its driver names it."""

    name: str
    memory_bytes: int


def count_ranks(environment: dict[str, str] | None = None, *, devices: Path = Path("/dev")) -> int:
    """Return how many ranks train.

    `ROPEWAY_RANKS`, else a Slurm job's tasks, else the hostfile's slots, else this machine's NVIDIA cards, else 2.

    Raises:
        ConfigError: `ROPEWAY_RANKS` is not a positive whole number, or `ROPEWAY_HOSTFILE` is no hostfile.
    """
    environment = dict(os.environ) if environment is None else environment
    stated = environment.get("ROPEWAY_RANKS")
    if stated is not None:
        if not stated.isdecimal() or int(stated) < 1:
            raise ConfigError(f"ROPEWAY_RANKS: expected a positive whole number, found {stated!r}")
        return int(stated)
    if in_slurm(environment):
        return int(environment["SLURM_NTASKS"])
    if "ROPEWAY_HOSTFILE" in environment:
        return sum(read_hostfile(Path(environment["ROPEWAY_HOSTFILE"])).values())
    return len(list_gpus(environment, devices=devices)) or CPU_RANKS


def in_slurm(environment: Mapping[str, str]) -> bool:
    """Return whether this is a Slurm job with several tasks; one task alone is no wish to spread."""
    tasks = environment.get("SLURM_NTASKS", "")
    return "SLURM_JOB_ID" in environment and tasks.isdecimal() and int(tasks) > 1


def list_gpus(environment: dict[str, str] | None = None, *, devices: Path = Path("/dev")) -> list[str]:
    """Return the NVIDIA cards this process may use, without loading torch."""
    environment = dict(os.environ) if environment is None else environment
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [card for card in visible.split(",") if card.strip() not in ("", "-1")]
    return sorted(path.name for path in devices.glob("nvidia[0-9]*"))


def detect_gpus(environment: dict[str, str] | None = None, *, devices: Path = Path("/dev")) -> list[Gpu]:
    """Return the cards this process may use, with their memory; none where there are none or the driver is silent."""
    cards = list_gpus(environment, devices=devices)
    if not cards:
        return []
    chosen = ["-i", ",".join(card.removeprefix("nvidia") for card in cards)]  # numbers, or UUIDs as CUDA takes them
    query = ["nvidia-smi", *chosen, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=_ASK_SECONDS, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 1) for line in said.stdout.splitlines() if "," in line]
    return [Gpu(name.strip(), int(mebibytes) * 2**20) for name, mebibytes in rows if mebibytes.strip().isdecimal()]


def cpu_model_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return the CPU's model as Linux names it, else its architecture: other kinds round otherwise."""
    try:
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def read_hostfile(path: Path) -> dict[str, int]:
    """Return host -> slots of a hostfile as DeepSpeed and OpenMPI write it; raise ConfigError for anything else."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"ROPEWAY_HOSTFILE: {path} cannot be read ({error.strerror})") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _SLOTS.fullmatch(line.strip())
        if match is None or match[1] in hosts:
            raise ConfigError(f"{path}:{number}: expected `HOST slots=N`, each host once; found {line.strip()!r}")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"{path}: no host in it; expected lines `HOST slots=N`")
    return hosts


def count_local_ranks(environment: Mapping[str, str], ranks: int) -> int:
    """Return how many of the ranks share a machine, 1 at least: its cores are divided among them."""
    if in_slurm(environment):
        return max(1, ranks // int(environment.get("SLURM_JOB_NUM_NODES", "1")))
    if "ROPEWAY_HOSTFILE" in environment:
        return max(read_hostfile(Path(environment["ROPEWAY_HOSTFILE"])).values())
    return ranks
