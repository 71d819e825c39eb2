"""What this machine trains on, found without loading torch."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ropeway.errors import ConfigError

CPU_RANKS = 2
_ASK_SECONDS = 5  # nvidia-smi wakes a sleeping driver


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card as its driver names it."""

    name: str
    memory_bytes: int


def count_ranks(environment: dict[str, str] | None = None, *, devices: Path = Path("/dev")) -> int:
    """Return how many ranks train: `ROPEWAY_RANKS`, else the NVIDIA cards of this machine, else 2 on CPU.

    Raises:
        ConfigError: `ROPEWAY_RANKS` is not a positive whole number.
    """
    environment = dict(os.environ) if environment is None else environment
    stated = environment.get("ROPEWAY_RANKS")
    if stated is not None:
        if not stated.isdecimal() or int(stated) < 1:
            raise ConfigError(f"ROPEWAY_RANKS: expected a positive whole number, found {stated!r}")
        return int(stated)
    return len(list_gpus(environment, devices=devices)) or CPU_RANKS


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
