"""What stages that start worker processes on this machine share: how many were asked for, and how a worker begins."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path

from ropeway.runtime.code_digests import check_code_digest
from ropeway.runtime.errors import ConfigError, TemporaryError

CODE_CHECK = "ROPEWAY_CODE_CHECK"  # set by a stage for its workers: JSON of stage, digest of its code, cache file


def read_process_count(variable: str, environment: Mapping[str, str]) -> int | None:
    """Return the number of processes a variable asks for, None where it is empty; raise ConfigError for no count."""
    asked = environment.get(variable, "")
    if not asked:
        return None
    if not asked.isdecimal() or int(asked) < 1:
        raise ConfigError(f"{variable} is {asked!r}; expected a number of processes, 1 or more")
    return int(asked)


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def init_worker() -> None:
    """In a worker: end with the parent, leave ^C to it; raise DataError when it imported other code than recorded."""
    check_worker_code()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def check_worker_code() -> None:
    """Raise DataError when this worker imported other code than its stage's digests are of."""
    if asked := os.environ.get(CODE_CHECK):
        stage, digest, kept = json.loads(asked)
        check_code_digest(digest, Path(kept), stage)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # a killed parent says nothing, and its workers would work on, or wait for work for ever
        os._exit(TemporaryError.exit_code)
