"""Who encodes: this process, worker processes of this machine, or a Dask cluster; the work and its bytes are the same.

Where it runs is environment: `ROPEWAY_PREPARE_WORKERS` (default: the cores this process may use), or
`ROPEWAY_DASK_SCHEDULER`, the address of a cluster (see `ropeway.prepare.cluster`).
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from ropeway.errors import ConfigError, TemporaryError

Job = TypeVar("Job")
Result = TypeVar("Result")

_WORTH_BYTES = 1 << 22  # a second of one core, about as long as a process takes to start
_LOOK_SECONDS = 2.0  # how often a cluster is asked whether anybody still works


@dataclass(frozen=True, slots=True)
class Workforce:
    """An executor and how to see that nobody works for it any more.

    Attributes:
        died: What `Future.result` raises when a worker is gone for good.
        check: Raises TemporaryError when the work cannot go on although no future says so.
    """

    executor: Executor
    died: tuple[type[BaseException], ...]
    check: Callable[[], None]


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_workers(text_bytes: int) -> int:
    """Return how many processes encode this much text: as many as asked for, else as many as are worth their start.

    Raises:
        ConfigError: `ROPEWAY_PREPARE_WORKERS` is not a count.
    """
    asked = os.environ.get("ROPEWAY_PREPARE_WORKERS", "")
    if not asked:
        return min(count_cores(), text_bytes // _WORTH_BYTES)
    if not asked.isdecimal() or int(asked) < 1:
        raise ConfigError(f"ROPEWAY_PREPARE_WORKERS is {asked!r}; expected a number of processes, 1 or more")
    return int(asked)


def do_with(
    workforce: Workforce, function: Callable[[Job], Result], jobs: Sequence[Job], *, kept: str
) -> Generator[Result]:
    """Yield results as they come.

    Args:
        workforce: Who works.
        function: A module's own function, so that another process finds it.
        jobs: Its arguments.
        kept: Said when a worker dies: what is left for the next try.

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
            f"prepare: a worker died ({type(error).__name__}: killed, out of memory, or its machine is gone) after "
            f"{done} of {len(jobs)} units; {kept}"
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
        yield Workforce(pool, (BrokenProcessPool,), lambda: None)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(threads: int) -> None:
    """In a worker: end with the parent, leave the terminal's ^C to it, and take one's share of the cores."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # a killed parent says nothing, and its workers would wait for work for ever
        os._exit(TemporaryError.exit_code)


def make(function: Callable[[Job], Result], jobs: Sequence[Job], *, text_bytes: int, kept: str) -> Iterator[Result]:
    """Yield the results of these jobs in any order, made by whom the environment names.

    Args:
        function: A module's own function, so that another process finds it.
        jobs: Its arguments.
        text_bytes: How much text they are in all.
        kept: Said when a worker dies: what is left for the next try.

    Raises:
        ConfigError: The environment names what is not there.
        TemporaryError: A worker died.
    """
    workers = min(count_workers(text_bytes), len(jobs))
    if workers <= 1:
        yield from map(function, jobs)  # here; the tokenizer's threads use all cores
        return
    with open_pool(workers) as workforce, closing(do_with(workforce, function, jobs, kept=kept)) as results:
        yield from results
