"""The watchdog: a rank that hangs says where, and ends with the code that means "start me again, I resume"."""

import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from ropeway.runtime.errors import TemporaryError

LEAST_SECONDS = 600.0
TIMES_THE_USUAL = 20
SLOW_BYTES_PER_SECOND = 20e6  # a save that is slower than this hangs; a spinning disk over a network does 50 MB/s
_USUAL_OF = 50
# A thread that holds the interpreter's lock while it hangs stops our own thread too; faulthandler's needs no lock. It
# can only exit with 1, so it comes second.
_SECOND_CHANCE_SECONDS = 60.0


class Watchdog:
    """Ends this process when no beat comes for too long.

    NCCL's and gloo's own limits (10 to 30 minutes, of one collective) say which collective waits, never for whom; the
    stacks of every rank say it.
    """

    def __init__(self, *, limit_seconds: float | None) -> None:
        """Start watching; `limit_seconds` None: 20 times the usual beat, at least 10 minutes."""
        self._stated = limit_seconds
        self._beats: deque[float] = deque(maxlen=_USUAL_OF)
        self._last = time.monotonic()
        self._limit = self._plain_limit()
        self._wakeup = threading.Event()
        self._done = False
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        self._arm_second()

    def heartbeat(self) -> None:
        """Say that this rank is alive."""
        now = time.monotonic()
        self._beats.append(now - self._last)
        self._set(now, self._plain_limit())

    @contextmanager
    def extended_deadline(self, handled_bytes: int) -> Iterator[None]:
        """Allow for as long as so many bytes take on a slow disk; that time is no measure of a beat."""
        self._set(time.monotonic(), self._plain_limit() + handled_bytes / SLOW_BYTES_PER_SECOND)
        try:
            yield
        finally:
            self._set(time.monotonic(), self._plain_limit())

    def stop(self) -> None:
        """Stop watching."""
        self._done = True
        self._wakeup.set()
        faulthandler.cancel_dump_traceback_later()

    def _plain_limit(self) -> float:
        if self._stated is not None:
            return self._stated
        return max(LEAST_SECONDS, TIMES_THE_USUAL * median(self._beats)) if self._beats else LEAST_SECONDS

    def _set(self, now: float, limit: float) -> None:
        changed = limit != self._limit
        self._last, self._limit = now, limit
        if changed:
            self._wakeup.set()  # the thread sleeps by the old limit
        self._arm_second()

    def _arm_second(self) -> None:
        faulthandler.dump_traceback_later(self._limit + _SECOND_CHANCE_SECONDS, exit=True)

    def _watch(self) -> None:
        while not self._done:
            left = self._last + self._limit - time.monotonic()
            if left <= 0:
                self._end_process()
            self._wakeup.wait(left)
            self._wakeup.clear()

    def _end_process(self) -> None:
        rank = os.environ.get("RANK", "0")
        print(
            f"rank {rank}: nothing happened for {self._limit:.0f} s (stop.hang_seconds); where it hangs:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        print(f"rank {rank}: ended; the same command resumes from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(TemporaryError.exit_code)
