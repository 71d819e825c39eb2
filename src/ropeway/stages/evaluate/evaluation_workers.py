"""Evaluation in this process or in several worker processes of this machine, each with a share of the rows and a GPU.

The number of processes is `ROPEWAY_EVALUATE_WORKERS`, by default one per GPU used in training (`ROPEWAY_RANKS`), on a
CPU one. It does not change the results: the result of an item depends only on that item, and results are summed in the
order of the items. On a CPU every worker has as many threads as this process, since another number of threads rounds
differently.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

import torch

from ropeway.data.mixture import rank_order
from ropeway.runtime.devices import count_local_ranks, count_ranks, list_gpus
from ropeway.runtime.errors import RopewayError, TemporaryError
from ropeway.runtime.progress import PROGRESS_FILE
from ropeway.runtime.worker_processes import init_worker, read_process_count

Item = TypeVar("Item")
Result = TypeVar("Result")

GpuAssignment = tuple[str | None, ...]  # CUDA_VISIBLE_DEVICES of each process; None: as in this process
SINGLE_PROCESS: GpuAssignment = (None,)
_WORKERS_VARIABLE = "ROPEWAY_EVALUATE_WORKERS"


@dataclass(frozen=True, slots=True)
class Share:
    """The items of one process: every `count`-th, starting with its number, which splits sorted items evenly.

    >>> Share(1, 3).of([10, 11, 12, 13, 14])
    [11, 14]
    """

    number: int
    count: int

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return the share's items, in order."""
        return rank_order(items, rank=self.number, world_size=self.count)


def merge_shares(parts: Sequence[Sequence[Item]]) -> list[Item]:
    """Return the results of all shares in the order of the items.

    >>> merge_shares([[10, 13], [11, 14], [12]])
    [10, 11, 12, 13, 14]
    """
    results = [item for part in parts for item in part]  # the right length; every position is overwritten below
    for number, part in enumerate(parts):
        results[number :: len(parts)] = part  # ValueError if the part has another length than its share
    return results


def plan_workers() -> GpuAssignment:
    """Return and print the processes that evaluate on this machine, from its environment and GPUs.

    Raises:
        ConfigError: As in `read_process_count` and `count_ranks`.
    """
    has_gpus = torch.cuda.is_available()  # False in a torch without CUDA
    gpus = assign_gpus(os.environ, list_gpus() if has_gpus else [])
    where = f"GPUs {', '.join(map(str, gpus))}" if has_gpus else f"up to {torch.get_num_threads()} threads each"
    print(f"evaluate: {len(gpus)} process{'es' if len(gpus) > 1 else ''}, {where}", flush=True)
    return gpus


def assign_gpus(environment: Mapping[str, str], found: Sequence[str]) -> GpuAssignment:
    """Return the GPU of each process; if there are more processes than GPUs, they share them."""
    # Without CUDA_VISIBLE_DEVICES, CUDA numbers the GPUs from 0, whatever their device files are named.
    gpus = [gpu.strip() if "CUDA_VISIBLE_DEVICES" in environment else str(at) for at, gpu in enumerate(found)]
    visible = {**environment, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    default = min(count_local_ranks(visible, count_ranks(visible)), len(gpus)) if gpus else 1
    count = read_process_count(_WORKERS_VARIABLE, environment) or default
    return tuple(gpus[number % len(gpus)] if gpus else None for number in range(count))


def run_shares(function: Callable[..., Result], arguments: Sequence[object], gpus: GpuAssignment) -> list[Result]:
    """Return `function(*arguments, share)` for every share, in their order; a single share runs in this process.

    `function` must be defined at module level, so that a worker can import it.

    Raises:
        TemporaryError: A worker was killed.
        RopewayError: A worker raised it, or failed with another error whose traceback it has printed.
    """
    count = len(gpus)
    if count == 1:
        return [function(*arguments, Share(0, 1))]
    with ExitStack() as stack:  # no worker outlives this call
        workers: list[_Worker[Result]] = []
        for number, gpu in enumerate(gpus):
            workers.append(_Worker(function, arguments, Share(number, count), gpu))
            stack.callback(workers[-1].close)
        results = {worker.share.number: worker.receive() for worker in _as_completed(workers)}
    return [results[number] for number in range(count)]


class _Worker(Generic[Result]):
    """A process that runs one call.

    It is spawned, not forked: a forked process cannot use CUDA or its parent's threads.
    """

    def __init__(
        self, function: Callable[..., Result], arguments: Sequence[object], share: Share, gpu: str | None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.share = share
        self.connection, theirs = context.Pipe(duplex=False)
        call = (theirs, function, (*arguments, share), share, gpu, torch.get_num_threads())
        self._process = context.Process(target=_run_worker, args=call, daemon=True)
        with suppress(BrokenPipeError):  # killed while it started: `receive` reports it
            self._process.start()
        theirs.close()  # otherwise a dead worker's end of the pipe stays open in this process

    def close(self) -> None:
        """Kill the process if it still runs."""
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()
        self.connection.close()

    def receive(self) -> Result:
        """Return the result, or raise the error that the worker sent."""
        try:
            result: Result = self.connection.recv()
        except (EOFError, OSError):
            if self._process.pid is not None:
                self._process.join()
            worker = f"evaluate: process {self.share.number + 1} of {self.share.count}"
            if (code := self._process.exitcode or 0) > 0:
                raise RopewayError(f"{worker} failed with exit code {code}; its traceback is above") from None
            raise TemporaryError(
                f"{worker} was killed, e.g. out of memory; nothing was written. Run the same command again, or with "
                f"fewer processes, which need less memory: {_WORKERS_VARIABLE}={max(1, self.share.count // 2)}"
            ) from None
        if isinstance(result, RopewayError):
            raise result
        return result


def _as_completed(workers: Sequence[_Worker[Result]]) -> Iterator[_Worker[Result]]:
    """Yield each worker once it has sent its result or has ended."""
    waiting = {worker.connection: worker for worker in workers}
    while waiting:
        for connection in wait(list(waiting)):
            yield waiting.pop(connection)  # type: ignore[call-overload]


def _run_worker(
    connection: Connection,
    function: Callable[..., object],
    arguments: Sequence[object],
    share: Share,
    gpu: str | None,
    threads: int,
) -> None:
    """Run one call in a worker process and send its result or its RopewayError."""
    init_worker()
    if share.number:  # the first share stands for all
        os.environ.pop(PROGRESS_FILE, None)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read on the first use of CUDA, which is later
    torch.set_num_threads(threads)
    try:
        result = function(*arguments)
    except RopewayError as error:
        result = error
    connection.send(result)
