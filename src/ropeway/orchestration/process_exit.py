"""A command ends soon after its result is known: Prefect (3.9.1) waits at exit for its server without a limit."""

import os
import sys
import threading
from collections.abc import Callable

END_SECONDS = 15.0


class Ending:
    """What bounds the end of this process once a run's result, or the error that ended it, is known."""

    def __init__(self, *, exits: bool = False) -> None:
        """Say whether this process is the command's own, hence may be ended; else nothing is bounded."""
        self._exits = exits
        self._telling = threading.Lock()
        self._told = self._armed = False

    def arm(self, code: int, tell: Callable[[], None]) -> None:
        """End this process with a code 15 seconds from now, unless it has ended by itself.

        What it started ends with it: servers and stages have supervisors that watch it, and its lock is a flock.

        Args:
            code: The exit code.
            tell: Prints the result or the error, if `tell` of this object has not done so before.
        """
        if self._armed or not self._exits:
            return
        self._armed = True
        timer = threading.Timer(END_SECONDS, self._end, (code, tell))
        timer.daemon = True  # and still running while the interpreter waits at exit
        timer.start()

    def tell(self, tell: Callable[[], None]) -> None:
        """Print the result, once."""
        with self._telling:
            if not self._told:
                self._told = True
                tell()

    def _end(self, code: int, tell: Callable[[], None]) -> None:
        self.tell(tell)
        print(
            "the Prefect server did not take the end of this run in time; its page may show the run as running",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(code)
