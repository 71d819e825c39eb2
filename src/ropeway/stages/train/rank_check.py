"""Checks of all ranks against each other before they communicate: one kind of device, own GPUs, one file system.

Ranks that use different devices would wait for each other until a timeout, and ranks that do not share the workspace
would train to the end and have no complete checkpoint.
"""

import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from secrets import token_hex

import torch
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ropeway.runtime.devices import list_gpus
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.launcher import check_compiler

NONCE = "train.nonce"  # in .work
_READ_SECONDS = timedelta(seconds=60)  # for the other ranks to receive the result; then they end themselves


@dataclass(frozen=True, slots=True)
class RankReport:
    """What one rank found on its machine.

    Attributes:
        accelerator: Device kind that DeepSpeed chose there, e.g. `cuda` or `cpu`.
        card: Identity of the rank's GPU; empty on a CPU.
        nonce: The text of the nonce file as read there; None if it cannot be read.
        problem: Why the rank cannot start on its machine; None if it can.
    """

    rank: int
    host: str
    accelerator: str
    card: str
    nonce: str | None
    problem: str | None


def check_ranks(work: Path, accelerator: str, environment: Mapping[str, str]) -> None:
    """Compare all ranks; end each with code 64 after rank 0 has printed what is wrong. A collective.

    Rank 0 writes a nonce into the folder `work`, which every rank must read. MPI launchers set RANK later, inside
    DeepSpeed: ranks that they start are not compared.
    """
    if "RANK" not in environment:
        return
    store, rank, ranks = next(rendezvous("env://"))
    store = PrefixStore("ropeway", store)
    path = work / NONCE
    if rank == 0:
        nonce = token_hex()
        work.mkdir(exist_ok=True)
        path.write_text(nonce)
        store.set("nonce", nonce)
    store.get("nonce")  # waits until rank 0 has written it
    store.set(f"rank-{rank}", json.dumps(asdict(_report(rank, accelerator, path))))
    if rank == 0:
        reports = [RankReport(**json.loads(store.get(f"rank-{one}"))) for one in range(ranks)]
        faults = find_faults(reports, nonce=nonce, path=path)
        if faults:
            print("\n".join(faults), file=sys.stderr, flush=True)
        store.set("faults", str(len(faults)))
    count = int(store.get("faults"))
    _await_readers(store, rank, ranks)
    if count:
        os._exit(ConfigError.exit_code)


def find_faults(reports: Sequence[RankReport], *, nonce: str, path: Path) -> list[str]:
    """Return what prevents these ranks from training together, with the names of the hosts; empty if nothing does."""
    faults = [
        f"rank {one.rank} on host {one.host}: {one.problem}" for one in reports if one.problem and one.nonce == nonce
    ]
    if blind := _hosts(one for one in reports if one.nonce != nonce):
        faults.append(
            f"{path}: rank 0 on host {reports[0].host} wrote this file, but it cannot be read on {', '.join(blind)}. "
            "All machines must have the workspace on one shared file system, under the same path"
        )
    kinds = dict.fromkeys(one.accelerator for one in reports)
    if len(kinds) > 1:
        found = "; ".join(
            f"{kind} on {', '.join(_hosts(one for one in reports if one.accelerator == kind))}" for kind in kinds
        )
        faults.append(
            f"the ranks use different devices: {found}. Use machines with the same devices, correct the driver or "
            "CUDA_VISIBLE_DEVICES there, or set DS_ACCELERATOR for all"
        )
    shared = Counter((one.host, one.card) for one in reports if one.card)
    faults += [
        f"host {host}: {count} ranks use GPU {card}. Start at most one rank per GPU (ROPEWAY_RANKS, slots of the "
        "hostfile, or Slurm's --ntasks-per-node)"
        for (host, card), count in shared.items()
        if count > 1
    ]
    return faults


def _hosts(reports: Iterable[RankReport]) -> list[str]:
    return list(dict.fromkeys(one.host for one in reports))


def _report(rank: int, accelerator: str, path: Path) -> RankReport:
    try:
        nonce = path.read_text()
    except OSError:
        nonce = None
    environment = dict(os.environ)
    card = ""
    if accelerator == "cuda" and "MIG" not in environment.get("CUDA_VISIBLE_DEVICES", ""):  # parts share a GPU's UUID
        card = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return RankReport(rank, platform.node(), accelerator, card, nonce, _find_problem(accelerator, environment))


def _find_problem(accelerator: str, environment: dict[str, str], *, devices: Path = Path("/dev")) -> str | None:
    """Return why this machine cannot run a rank on the device that DeepSpeed chose.

    DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES on machines without a GPU too, so a GPU must also be in `devices`.
    """
    if accelerator != "cpu":
        return None
    gpus = list_gpus(environment) if list_gpus({}, devices=devices) else []
    if "DS_ACCELERATOR" not in environment and gpus:
        return (
            f"has GPUs ({', '.join(gpus)}), but torch {torch.__version__} cannot use them. Check the driver and the "
            "build of torch, or set DS_ACCELERATOR=cpu to train on the CPU"
        )
    try:
        check_compiler()
    except ConfigError as error:
        return str(error)
    return None


def _await_readers(store: Store, rank: int, ranks: int) -> None:
    """On rank 0, whose process serves the store, wait until the other ranks have received the result."""
    store.set(f"read-{rank}", "")
    if rank == 0:
        with suppress(RuntimeError):  # one of them has already ended
            store.wait([f"read-{one}" for one in range(ranks)], _READ_SECONDS)
