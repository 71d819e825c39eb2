"""Run something in a child process with a limit on its memory; return what it raised and what it needed."""

import os
import pickle
import resource
from dataclasses import dataclass
from pathlib import Path

MEMORY_BYTES = 2 << 30  # of address space, beyond what the process has
CPU_SECONDS = 20


@dataclass(frozen=True)
class Outcome:
    """What an act led to: the class of its error and its message, and the growth of its resident memory at its peak."""

    error: str
    message: str
    megabytes: int


def run_bounded(act):
    """Call `act` in a forked process; return its `Outcome`."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writer, pickle.dumps(_measure(act)))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as sent:
        data = sent.read()
    status = os.waitpid(child, 0)[1]
    assert data, f"the process ended with status {status}, by its limits or a crash"
    return Outcome(*pickle.loads(data))  # noqa: S301 - from our own child


def _measure(act):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before, error, message = _peak(), "", ""
    try:
        act()
    except Exception as raised:  # noqa: BLE001 - named in the outcome
        error, message = type(raised).__name__, str(raised)[:2000]
    return error, message, (_peak() - before) >> 10


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
