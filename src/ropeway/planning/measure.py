"""Measure this machine for estimates of hours: the disk's bandwidth and the CPU's speed."""

import os
import tempfile
import time
from pathlib import Path

from ropeway.runtime.devices import count_local_ranks

_DISK_BYTES = 32 * 2**20
_SIZE = 1024  # rows and columns of the matrices
_SECONDS = 0.3


def measure_disk(folder: Path) -> float:
    """Return the bandwidth of a folder's disk in GB/s: one file of 32 MiB, written and synced."""
    data = os.urandom(_DISK_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return _DISK_BYTES / (time.perf_counter() - began) / 1e9


def measure_cpu(dtype: str, ranks: int) -> float:
    """Return the TFLOPS of one rank in products of 1,024 x 1,024 matrices on this CPU, which the ranks share.

    The fastest product of one thread counts, times the cores, so that other programs matter little.

    Args:
        dtype: fp16, bf16 or fp32, as in params.yaml.
        ranks: Training processes; those of this machine get equal parts of its cores.
    """
    import torch

    from ropeway.models.open_model import DTYPES

    cores = len(os.sched_getaffinity(0))
    local = count_local_ranks(os.environ, ranks)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = torch.ones(_SIZE, _SIZE, dtype=DTYPES[dtype])
        one @ one  # the first product prepares the kernel
        durations: list[float] = []
        end = time.perf_counter() + _SECONDS
        while not durations or time.perf_counter() < end:
            began = time.perf_counter()
            one @ one
            durations.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return 2 * _SIZE**3 / min(durations) * cores / local / 1e12
