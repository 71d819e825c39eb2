"""Who encodes: this process, worker processes of this machine, or a Dask cluster; the work and its bytes are the same.

Where it runs is environment: `ROPEWAY_TOKENIZE_WORKERS` (default: the cores this process may use), or
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

from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.runtime.worker_processes import begin_worker, count_asked, count_cores

Job = TypeVar("Job")
Result = TypeVar("Result")

_OLD_NAME = "ROPEWAY_PREPARE_WORKERS"
_WORTH_BYTES = 1 << 22  # a second of one core, about as long as a process takes to start
_LOOK_SECONDS = 2.0  # how often a cluster is asked whether anybody still works


@dataclass(frozen=True, slots=True)
class Workforce:
    """An executor and how to see that nobody works for it any more.

    Attributes:
        name: For the log.
        died: What `Future.result` raises when a worker is gone for good.
        check: Raises TemporaryError when the work cannot go on although no future says so.
    """

    name: str
    executor: Executor
    died: tuple[type[BaseException], ...]
    check: Callable[[], None]


def count_workers(text_bytes: int) -> int:
    """Return how many processes encode this much text: as many as asked for, else as many as are worth their start.

    Raises:
        ConfigError: `ROPEWAY_TOKENIZE_WORKERS` is not a count, or is set under its old name.
    """
    if _OLD_NAME in os.environ:
        raise ConfigError(f"{_OLD_NAME} is set, which nothing reads any more: it is ROPEWAY_TOKENIZE_WORKERS now")
    asked = count_asked("ROPEWAY_TOKENIZE_WORKERS", os.environ)
    return min(count_cores(), text_bytes // _WORTH_BYTES) if asked is None else asked


def do_with(
    workforce: Workforce, function: Callable[[Job], Result], jobs: Sequence[Job], *, work: Path
) -> Generator[Result]:
    """Yield results as they come.

    Args:
        workforce: Who works.
        function: A module's own function, so that another process finds it.
        jobs: Its arguments.
        work: Where they leave what they make; said when a worker dies.

    Raises:
        TemporaryError: A worker died, or nobody is left to work.
    """
    waiting = {workforce.executor.submit(function, job) for job in jobs}
    done = 0
    try:
        while waiting:
            ready, waiting = wait(waiting, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
            for future in ready:
                yield future.result()
                done += 1
            if waiting:
                workforce.check()
    except workforce.died as error:
        raise TemporaryError(
            f"tokenize: a worker died ({type(error).__name__}: killed, out of memory, or its machine is gone) after "
            f"{done} of {len(jobs)} units; whole units are kept in {work}. Run the same command again: it makes only "
            "those that are missing"
        ) from None
    finally:
        for future in waiting:
            future.cancel()


@contextmanager
def open_pool(workers: int) -> Iterator[Workforce]:
    """Yield worker processes of this machine; together the tokenizers in them have as many threads as there are cores.

    They are spawned, not forked: a forked tokenizer's threads can hang.
    """
    threads = max(1, count_cores() // workers)
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(threads,)
    )
    try:
        yield Workforce(f"{workers} processes", pool, (BrokenProcessPool,), lambda: None)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(threads: int) -> None:
    """In a worker: take one's share of the cores."""
    begin_worker()
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"


def make(function: Callable[[Job], Result], jobs: Sequence[Job], *, text_bytes: int, work: Path) -> Iterator[Result]:
    """Yield the results of these jobs in any order, made by whom the environment names.

    Args:
        function: A module's own function, so that another process finds it.
        jobs: Its arguments.
        text_bytes: How much text they are in all.
        work: Where they leave what they make.

    Raises:
        ConfigError: The environment names what is not there.
        TemporaryError: A worker died.
    """
    if not jobs:
        return
    with ExitStack() as stack:
        if address := os.environ.get("ROPEWAY_DASK_SCHEDULER"):
            from ropeway.stages.tokenize.cluster import open_cluster

            force = stack.enter_context(open_cluster(address, work))
            function = partial(do_in_one_thread, function)
        elif (workers := min(count_workers(text_bytes), len(jobs))) > 1:
            force = stack.enter_context(open_pool(workers))
        else:
            yield from map(function, jobs)  # here; the tokenizer's threads use all cores
            return
        print(f"tokenize: {len(jobs)} units for {force.name}", flush=True)
        yield from stack.enter_context(closing(do_with(force, function, jobs, work=work)))


def do_in_one_thread(function: Callable[[Job], Result], job: Job) -> Result:
    """Return the result, made without the tokenizer's own threads: a Dask worker has as many jobs as it has cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return function(job)
