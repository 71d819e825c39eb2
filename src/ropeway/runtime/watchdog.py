"""Watchdog: a rank that hangs prints the stack of every thread and exits with 75, so that the same command resumes."""

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
SLOW_BYTES_PER_SECOND = 20e6  # a save slower than this counts as hung; a network hard disk writes 50 MB/s
_MEDIAN_WINDOW = 50  # heartbeats
# A thread that hangs while it holds the GIL also blocks the watchdog's thread; faulthandler's thread needs no GIL. It
# can exit only with 1, so it is the fallback.
_FALLBACK_SECONDS = 60.0


class Watchdog:
    """Ends this process when no heartbeat arrives before the deadline.

    The timeouts of NCCL and gloo (10 to 30 minutes per collective) name the collective that waits, but not the rank
    that it waits for. The stacks of all ranks show which rank hangs.
    """

    def __init__(self, *, limit_seconds: float | None) -> None:
        """Start the watchdog.

        Args:
            limit_seconds: Longest time between heartbeats; None: 20 times the median interval, at least 600 s.
        """
        self._fixed_limit = limit_seconds
        self._intervals: deque[float] = deque(maxlen=_MEDIAN_WINDOW)
        self._last = time.monotonic()
        self._limit = self._base_limit()
        self._wakeup = threading.Event()
        self._done = False
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        self._arm_fallback()

    def heartbeat(self) -> None:
        """Record that this rank is alive and restart the timeout."""
        now = time.monotonic()
        self._intervals.append(now - self._last)
        self._set(now, self._base_limit())

    @contextmanager
    def extended_deadline(self, handled_bytes: int) -> Iterator[None]:
        """Extend the deadline by a slow disk's time for `handled_bytes`; this time is not a heartbeat interval."""
        self._set(time.monotonic(), self._base_limit() + handled_bytes / SLOW_BYTES_PER_SECOND)
        try:
            yield
        finally:
            self._set(time.monotonic(), self._base_limit())

    def stop(self) -> None:
        """Stop the watchdog."""
        self._done = True
        self._wakeup.set()
        faulthandler.cancel_dump_traceback_later()

    def _base_limit(self) -> float:
        if self._fixed_limit is not None:
            return self._fixed_limit
        return max(LEAST_SECONDS, TIMES_THE_USUAL * median(self._intervals)) if self._intervals else LEAST_SECONDS

    def _set(self, now: float, limit: float) -> None:
        changed = limit != self._limit
        self._last, self._limit = now, limit
        if changed:
            self._wakeup.set()  # the thread still waits by the old limit
        self._arm_fallback()

    def _arm_fallback(self) -> None:
        faulthandler.dump_traceback_later(self._limit + _FALLBACK_SECONDS, exit=True)

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
            f"rank {rank}: no heartbeat for {self._limit:.0f} s (stop.hang_seconds); stacks of its threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        print(f"rank {rank}: ended; the same command resumes from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(TemporaryError.exit_code)
