"""A Prefect server for one run, where none stands: our own process, kept up as long as the run goes on.

Not Prefect's ephemeral server (3.9.1): that one is left behind when its flow is killed, makes the flow import the whole
server (1.5 s), starts only when the flow does, and has no UI.
"""

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ropeway.orchestration.prefect_server import (
    LOOPBACK,
    START_SECONDS,
    await_answer,
    server_arguments,
    standing_server,
    start_process,
)
from ropeway.orchestration.prefect_settings import prefect_home
from ropeway.runtime.errors import TemporaryError

_GIVEN_SECONDS = 10.0  # for one that should be running; a temporary one is said to be slow after that
_EXIT = "server.exit.json"
_RESTARTS = 5  # of a server that had answered and then ended: somebody, or the kernel for want of memory, killed it


@contextmanager
def open_server(root: Path) -> Iterator[str]:
    """Yield the API's URL: the one of `PREFECT_API_URL`, of the running `ropeway server`, or of a temporary server.

    The temporary one starts in the background and ends with the block; wait for it with `await_server`. It runs under
    a supervisor, so it also ends when this process is killed. Should it end by itself, it is started again.
    """
    if url := standing_server(root):
        yield url
        return
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    url, home = f"http://{LOOPBACK}:{port}/api", prefect_home(root)
    home.mkdir(parents=True, exist_ok=True)
    # Runs are started by hand here: no scheduler, no search for late ones.
    arguments = [*server_arguments(LOOPBACK, port), "--no-scheduler", "--no-late-runs"]
    with (home / "server.log").open("wb") as log:
        server = _KeptUp(url, partial(start_process, root, arguments, url, record=_EXIT, output=log))
        try:
            yield url
        finally:
            server.end()
            (home / _EXIT).unlink(missing_ok=True)


class _KeptUp:
    """A server that is started again, at the same address over the same database, when it ends by itself."""

    def __init__(self, url: str, start: Callable[[], "subprocess.Popen[bytes]"]) -> None:
        self._url, self._start = url, start
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._server = start()
        self._watch = threading.Thread(target=self._keep_up, name="temporary-server", daemon=True)
        self._watch.start()

    def _keep_up(self) -> None:
        for _ in range(_RESTARTS):
            if not await_answer(self._url, START_SECONDS, lambda: self._server.poll() is not None, pause_seconds=0.5):
                return  # it cannot come up; `await_server` says so
            self._server.wait()
            with self._lock:
                if self._closing.is_set():
                    return
                print("the temporary Prefect server ended by itself; starting it again", flush=True)
                self._server = self._start()

    def end(self) -> None:
        """End the server that there is now."""
        with self._lock:
            self._closing.set()
            self._server.terminate()
        self._server.wait()
        self._watch.join()


def await_server(url: str, root: Path) -> None:
    """Return once a server answers.

    Raises:
        TemporaryError: It does not.
    """
    home = prefect_home(root)
    has_ended, log = (home / _EXIT).exists, home / "server.log"
    is_up = await_answer(url, _GIVEN_SECONDS, has_ended)
    if not (is_up or has_ended() or "PREFECT_API_URL" in os.environ):
        print(
            f"the temporary Prefect server is still starting; a busy machine takes minutes. Its log: {log}", flush=True
        )
        is_up = await_answer(url, START_SECONDS, has_ended)
    if not is_up:
        raise TemporaryError(
            f"no Prefect server answers at {url}. Start one with `ropeway server`, unset PREFECT_API_URL, or run "
            f"without Prefect: `ropeway run --no-prefect`. A temporary server's log: {log}"
        )
