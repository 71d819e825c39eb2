"""Worker processes of a stage: their configured number and the initialization of each worker."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path

from ropeway.runtime.code_digests import check_code_digest
from ropeway.runtime.environment import read_count
from ropeway.runtime.errors import TemporaryError

CODE_CHECK = "ROPEWAY_CODE_CHECK"  # set by a stage for its workers: JSON of stage, digest of its code, cache file


def read_process_count(variable: str, environment: Mapping[str, str]) -> int | None:
    """Return the number of processes set by a variable, None if it is empty; ConfigError if it is not a count."""
    return read_count(environment, variable)


def count_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def init_worker() -> None:
    """Initialize a worker: check its code (DataError), ignore SIGINT, exit when the parent exits."""
    check_worker_code()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def check_worker_code() -> None:
    """Raise DataError if this worker imported other code than the digests of its stage describe."""
    if stated := os.environ.get(CODE_CHECK):
        stage, digest, kept = json.loads(stated)
        check_code_digest(digest, Path(kept), stage)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # a killed parent cannot stop its workers; they would run or wait forever
        os._exit(TemporaryError.exit_code)
