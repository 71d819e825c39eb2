"""Bounds for connections to a peer that sends or takes a byte now and then: a least rate, and a deadline.

A read timeout bounds the time without a byte only, so one byte per minute keeps a connection alive for days. Here the
time that a connection waits for its peer is added up. When it reaches `WINDOW_SECONDS`, that many seconds times
`LEAST_BYTES_PER_SECOND` must have passed, else SlowTransferError is raised; then the count begins again, as it does
with each request and each response. A response that takes less than the window is never affected.
"""

import io
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

from ropeway.runtime.errors import TemporaryError

WINDOW_SECONDS = 300.0  # S3 may take minutes to complete an upload, and sends spaces meanwhile
LEAST_BYTES_PER_SECOND = 8 << 10  # per connection
_SEND_BYTES = 64 << 10
T = TypeVar("T")


class SlowTransferError(TimeoutError):
    """The peer sent or took less than the least rate."""


class LeastRateSocket:
    """A connected socket, plain or TLS, for HTTP clients that read by `makefile` and write by `sendall`."""

    def __init__(
        self, connected: socket.socket, *, window: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Watch a socket; `window` is in seconds, by default `WINDOW_SECONDS`."""
        self._socket, self._clock = connected, clock
        self._window = WINDOW_SECONDS if window is None else window
        self._direction: Literal["in", "out"] = "out"
        self._waited, self._passed = 0.0, 0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever a socket has
        """Return everything else from the socket."""
        return getattr(self._socket, name)

    def makefile(self, mode: str = "rb", buffering: int | None = None) -> io.BufferedReader | io.RawIOBase:
        """Return a file that reads the socket."""
        if mode not in ("r", "rb"):
            raise ValueError(f"mode {mode!r}: expected 'rb'")
        raw = _Reader(self._socket.makefile("rb", buffering=0), self._count)
        return raw if buffering == 0 else io.BufferedReader(raw)

    def sendall(self, data: Any, flags: int = 0) -> None:  # noqa: ANN401 - any buffer
        """Send everything; the socket's timeout holds for each piece."""
        view = memoryview(data).cast("B")
        while view:
            sent = self._count("out", partial(self._socket.send, view[:_SEND_BYTES], flags))
            view = view[sent:]

    def _count(self, direction: Literal["in", "out"], act: Callable[[], int]) -> int:
        """Return the number of bytes that `act` passes, and add the time that it takes."""
        if direction != self._direction:
            self._direction, self._waited, self._passed = direction, 0.0, 0
        began = self._clock()
        count = act()
        self._waited += self._clock() - began
        self._passed += count
        if self._waited >= self._window:
            if self._passed < self._window * LEAST_BYTES_PER_SECOND:
                raise SlowTransferError(
                    f"{self._passed:,} bytes in {self._waited:.0f} s of waiting, expected "
                    f"{LEAST_BYTES_PER_SECOND:,} bytes/s at least"
                )
            self._waited, self._passed = 0.0, 0
        return count


class _Reader(io.RawIOBase):
    """The unbuffered file of a socket, each of whose reads is counted."""

    def __init__(self, inner: Any, count: Callable[[Literal["in", "out"], Callable[[], int]], int]) -> None:  # noqa: ANN401
        self._inner, self._count = inner, count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:  # noqa: ANN401 - Buffer has a name from Python 3.12 on
        return self._count("in", lambda: self._inner.readinto(buffer) or 0)

    def close(self) -> None:
        self._inner.close()
        super().close()


def finish_within(seconds: float, act: Callable[[], T], *, what: str) -> T:
    """Return the result of `act`, which runs in a thread of its own; its errors are raised here.

    For clients whose sockets cannot be watched. A thread that has not finished is left behind; it ends with the
    process, or with the client's own timeouts.

    Raises:
        TemporaryError: It did not finish in `seconds`; `what` names it in the message.
    """
    found: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(act())
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="request", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not found:
        raise TemporaryError(f"{what}: expected its whole answer within {seconds:g} s, and it has not ended. Try again")
    return found[0]
