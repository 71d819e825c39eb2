"""What a run sends to its page, its lines and a progress bar, and what it hears from there: Suspend.

Lines go through a bounded queue; nothing waits for the server, and what it lacks is counted.

Prefect's own worker (3.9.1) drains its queue at exit without a limit, and a client that is told to be patient repeats
each request for minutes: a stage that printed 20,000 lines kept `ropeway run` from ending for more than 480 s.
"""

import json
import os
import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import runtime
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import Pause, PrefectException
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from ropeway.orchestration.prefect_server import is_answering

Entry = dict[str, Any]  # as the API takes a line
_MOST_WAITING = 30_000  # lines; some 10 MB
_BATCH_LINES = 400
_PAUSE_SECONDS = 0.2
_AGAIN_SECONDS = 1.0  # after a server that did not answer
_ANSWER_SECONDS = 10.0
_INFO = 20
_BAR_SECONDS = 5.0
_TAIL_BYTES = 1 << 16  # a record is some 1 kB
_LOOK_SECONDS = 2.0


class PageLog:
    """The lines of a run on their way to its server."""

    def __init__(self, url: str) -> None:
        """Start sending to the API at `url`."""
        self.url = url
        self._lost: Counter[str] = Counter()
        self._sending: list[tuple[str, Entry]] = []
        self._waiting: queue.Queue[tuple[str, Entry]] = queue.Queue(_MOST_WAITING)
        self._closing, self._deadline = threading.Event(), float("inf")
        self._thread = threading.Thread(target=self._send, name="page-log", daemon=True)
        self._thread.start()

    def add(self, step: str, line: str, *, flow_run: str, task_run: str | None) -> None:
        """Take a line; one that finds no place is counted."""
        entry = {
            "name": "ropeway",
            "level": _INFO,
            "message": line,
            "timestamp": datetime.now(UTC).isoformat(),
            "flow_run_id": flow_run,
            "task_run_id": task_run,
        }
        try:
            self._waiting.put_nowait((step, entry))
        except queue.Full:
            self._lost[step] += 1

    def close(self, seconds: float) -> dict[str, int]:
        """Send what is left, no longer than so many seconds; return how many lines of which step were not delivered.

        Lines of a request without an answer are counted: the server may have them all the same.
        """
        self._deadline = time.monotonic() + seconds
        self._closing.set()
        self._thread.join(seconds + _AGAIN_SECONDS)
        left = Counter(self._lost)
        left.update(step for step, _ in self._sending)
        with suppress(queue.Empty):
            while True:
                left[self._waiting.get_nowait()[0]] += 1
        return dict(left)

    def _send(self) -> None:
        settings = {PREFECT_API_URL: self.url, PREFECT_CLIENT_MAX_RETRIES: 0}
        with temporary_settings(settings), get_client({"timeout": _ANSWER_SECONDS}, sync_client=True) as client:
            while time.monotonic() < self._deadline:
                self._sending = self._sending or self._take()
                if not self._sending:
                    if self._closing.is_set():
                        return
                    self._closing.wait(_PAUSE_SECONDS)
                elif _post(client, [entry for _, entry in self._sending]):
                    self._sending = []
                else:
                    time.sleep(_PAUSE_SECONDS if self._closing.wait(_AGAIN_SECONDS) else 0)

    def _take(self) -> list[tuple[str, Entry]]:
        taken: list[tuple[str, Entry]] = []
        with suppress(queue.Empty):
            while len(taken) < _BATCH_LINES:
                taken.append(self._waiting.get_nowait())
        return taken


def _post(client: SyncPrefectClient, entries: list[Entry]) -> bool:
    try:
        client.create_logs(entries)
    except Exception:  # noqa: BLE001 - whatever it is, the page is a mirror and the run goes on
        return False
    return True


def read_progress(path: Path) -> tuple[int, int] | None:
    """Return (step, steps of the whole run) of a progress file's last whole record; None where it has none.

    A record without its newline is still being written. A stage that writes no such file has no progress to show.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            *lines, _ = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            step, steps = int(record["step"]), int(record["total_steps"])
            if 0 <= step <= steps and steps:
                return step, steps
    return None


class Bar:
    """The bar of one stage; it is moved at most every five seconds.

    Nobody waits for the bar: where the server is away it stays as it is, and moves at a later refresh.
    """

    def __init__(self, path: Path, key: str, url: str) -> None:
        """Keep the progress file, the artifact's key and the API's address."""
        self._path, self._key, self._url = path, key, url
        self._artifact: UUID | None = None
        self._shown: tuple[int, int] | None = None
        self._looked = float("-inf")

    def refresh(self, *, last: bool = False) -> None:
        """Show how far the stage has come; `last` is its end, which does not wait for the five seconds."""
        now = time.monotonic()
        if not last and now - self._looked < _BAR_SECONDS:
            return
        self._looked = now
        found = read_progress(self._path)
        if found is None or found == self._shown or not is_answering(self._url):
            return
        (step, steps), self._shown = found, found
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), suppress(httpx.HTTPError):
            percent, words = round(100 * step / steps, 1), f"step {step} of {steps}"
            if self._artifact is None:
                made = create_progress_artifact(percent, key=self._key, description=words)
                self._artifact = made if isinstance(made, UUID) else None  # never a coroutine: no loop runs here
            else:
                update_progress_artifact(self._artifact, percent, description=words)


@contextmanager
def suspended_on_request() -> Iterator[None]:
    """Watch a deployment's flow run; when it is suspended, end the block as SIGTERM does and leave the run Suspended.

    Raises:
        Pause: It was suspended. Prefect ends the process and leaves the state as it is.
    """
    if not runtime.deployment.id:  # Prefect suspends no other run: it could not start it again
        yield
        return
    found: list[State[object]] = []
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(runtime.flow_run.id, found, done), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        if not found:
            raise
        pause = Pause("suspended on the run's page")
        pause.state = found[0]
        raise pause from error
    finally:
        done.set()
        watcher.join()


def _watch(flow_run: str, found: list[State[object]], done: threading.Event) -> None:
    while not done.wait(_LOOK_SECONDS):
        with suppress(httpx.HTTPError, PrefectException), get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run)).state
            if state and state.type == StateType.PAUSED:
                found.append(state)
                print(
                    "suspended on the run's page: the stage is ended and saves; Resume there goes on from it, as does "
                    "`ropeway run`",
                    flush=True,
                )
                os.kill(os.getpid(), signal.SIGTERM)
                return
