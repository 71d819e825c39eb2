"""The request to stop training: a signal to this rank or, on rank 0, the stop file of the workspace."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ropeway.runtime.grace import StopFiles, StopTimes


class StopRequest:
    """Whether this rank should stop; the training loop calls it and shares the result with all ranks.

    Rank 0 also records how long a stop needs, by what it measures: the supervisor waits that long.
    """

    def __init__(
        self,
        times: StopTimes,
        files: StopFiles | None,
        *,
        stated: float | None,
        warn: Callable[[str], None] = lambda text: print(text, flush=True),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Install the signal handlers; the supervisor signals every rank that it can reach.

        Args:
            times: What this attempt has measured so far.
            files: The files of the stage; None on every rank but the first.
            stated: The grace period that the environment states, in seconds; None if it states none.
            warn: Receives a sentence when the stated grace period turns out too short.
            clock: A monotonic clock, in seconds.
        """
        self.is_requested = False
        self._times, self._files, self._stated = times, files, stated
        self._warn, self._clock = warn, clock
        self._written = 0.0
        self._is_warned = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        if files is not None:
            self._write_times(files)
            files.open()

    def _handle(self, *_: object) -> None:
        self.is_requested = True

    def __call__(self) -> bool:
        """Return whether this rank should stop."""
        self._times.look(self._clock())
        if self._files is not None:
            self._write_times(self._files)
            self.is_requested |= self._files.is_stop_requested()
        return self.is_requested

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Leave the time that training waits for a save out of the time between two looks."""
        began = self._clock()
        yield
        self._times.leave_out(self._clock() - began)

    def saved(self, seconds: float) -> None:
        """Record how long a save took, from its beginning to its end."""
        self._times.record_save(seconds)

    def _write_times(self, files: StopFiles) -> None:
        """Write the needed seconds when they have grown, and warn once if the stated grace period is too short."""
        if not self._times.has_grown(self._written):
            return
        self._written = self._times.needed_seconds
        files.write_seconds(self._written)
        shortage = self._times.describe_shortage(self._stated)
        if shortage is not None and not self._is_warned:
            self._is_warned = True
            self._warn(shortage)
