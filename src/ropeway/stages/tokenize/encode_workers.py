"""Run tokenize jobs in this process, in local worker processes or on a Dask cluster; the output bytes are the same.

Environment variables choose: `ROPEWAY_TOKENIZE_WORKERS` (default: the cores this process may use), or
`ROPEWAY_DASK_SCHEDULER`, the address of a cluster (see `ropeway.stages.tokenize.cluster`).
"""

import multiprocessing
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from ropeway.runtime.environment import check_renamed
from ropeway.runtime.errors import TemporaryError
from ropeway.runtime.worker_processes import count_cores, init_worker, read_process_count

Job = TypeVar("Job")
Result = TypeVar("Result")

_BYTES_PER_WORKER = 1 << 22  # about one second on one core, as long as a process takes to start
_HEALTH_CHECK_SECONDS = 2.0  # interval of the cluster's health checks


@dataclass(frozen=True, slots=True)
class WorkerPool:
    """An executor and how to detect that its workers are lost.

    Attributes:
        name: For the log.
        lost_worker_errors: What `Future.result` raises if a worker is lost.
        check_health: Raises TemporaryError if there are no workers left although no future has failed.
    """

    name: str
    executor: Executor
    lost_worker_errors: tuple[type[BaseException], ...]
    check_health: Callable[[], None]


def count_workers(text_bytes: int) -> int:
    """Return how many processes to use: `ROPEWAY_TOKENIZE_WORKERS`, else one per core and `_BYTES_PER_WORKER` of text.

    Raises:
        ConfigError: `ROPEWAY_TOKENIZE_WORKERS` is not a positive integer, or is set under its old name.
    """
    check_renamed(os.environ)
    asked = read_process_count("ROPEWAY_TOKENIZE_WORKERS", os.environ)
    return min(count_cores(), text_bytes // _BYTES_PER_WORKER) if asked is None else asked


def iterate_results(
    pool: WorkerPool, function: Callable[[Job], Result], jobs: Sequence[Job], *, work: Path
) -> Generator[Result]:
    """Yield the results of jobs as they complete.

    Args:
        pool: The workers.
        function: A module-level function, so that another process can import it.
        jobs: Its arguments.
        work: The folder of the results; named if a worker is lost.

    Raises:
        TemporaryError: A worker died, or no workers are left.
    """
    waiting = {pool.executor.submit(function, job) for job in jobs}
    done = 0
    try:
        while waiting:
            ready, waiting = wait(waiting, timeout=_HEALTH_CHECK_SECONDS, return_when=FIRST_COMPLETED)
            for future in ready:
                yield future.result()
                done += 1
            if waiting:
                pool.check_health()
    except pool.lost_worker_errors as error:
        raise TemporaryError(
            f"tokenize: a worker died ({type(error).__name__}: killed, out of memory, or its machine is down) after "
            f"{done} of {len(jobs)} units; completed units are kept in {work}. Run the same command again to make the "
            "missing ones"
        ) from None
    finally:
        for future in waiting:
            future.cancel()


@contextmanager
def open_pool(workers: int) -> Iterator[WorkerPool]:
    """Yield a pool of local worker processes; their tokenizer threads together use all cores.

    Workers are spawned, not forked: the threads of a forked tokenizer can deadlock.
    """
    threads = max(1, count_cores() // workers)
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_init_worker, initargs=(threads,)
    )
    try:
        yield WorkerPool(f"{workers} processes", pool, (BrokenProcessPool,), lambda: None)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _init_worker(threads: int) -> None:
    """Initialize a worker process; limit its tokenizer threads to its share of the cores."""
    init_worker()
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, text_bytes: int, work: Path
) -> Iterator[Result]:
    """Yield the results of jobs in any order; environment variables choose where the jobs run.

    Args:
        function: A module-level function, so that another process can import it.
        jobs: Its arguments.
        text_bytes: Text of all jobs, in bytes.
        work: The folder of the results.

    Raises:
        ConfigError: An environment variable has an invalid value, or names a cluster that cannot be used.
        TemporaryError: A worker died.
    """
    if not jobs:
        return
    with ExitStack() as stack:
        if address := os.environ.get("ROPEWAY_DASK_SCHEDULER"):
            from ropeway.stages.tokenize.cluster import open_cluster

            pool = stack.enter_context(open_cluster(address, work))
            function = partial(run_single_threaded, function)
        elif (workers := min(count_workers(text_bytes), len(jobs))) > 1:
            pool = stack.enter_context(open_pool(workers))
        else:
            yield from map(function, jobs)  # in this process; the tokenizer's threads use all cores
            return
        print(f"tokenize: {len(jobs)} units to tokenize on {pool.name}", flush=True)
        yield from stack.enter_context(closing(iterate_results(pool, function, jobs, work=work)))


def run_single_threaded(function: Callable[[Job], Result], job: Job) -> Result:
    """Return the job's result, computed without tokenizer threads: a Dask worker runs one job per core already."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return function(job)
