"""Sends a run's log lines and progress bar to the Prefect server, and receives Suspend from it.

Lines go through a bounded queue; nothing waits for the server, and lines that do not reach it are counted.

Prefect's own worker (3.9.1) drains its queue at exit without a time limit, and a client with many retries repeats each
request for minutes: after a stage that printed 20,000 lines `ropeway run` did not end for more than 480 s.
"""

import contextvars
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
from ropeway.runtime.progress import read_last_record

Entry = dict[str, Any]  # a line in the shape of the API
_MAX_QUEUED = 30_000  # lines; about 10 MB
_BATCH_LINES = 400
_PAUSE_SECONDS = 0.2
_RETRY_SECONDS = 1.0  # after a request without an answer
_ANSWER_SECONDS = 10.0
_INFO = 20
_BAR_SECONDS = 5.0
_POLL_SECONDS = 2.0


class PageLog:
    """Queue of a run's log lines and the thread that sends them to the Prefect server."""

    def __init__(self, url: str) -> None:
        """Start sending to the API at `url`."""
        self.url = url
        self._lost: Counter[str] = Counter()
        self._sending: list[tuple[str, Entry]] = []
        self._waiting: queue.Queue[tuple[str, Entry]] = queue.Queue(_MAX_QUEUED)
        self._closing, self._deadline = threading.Event(), float("inf")
        self._thread = threading.Thread(target=self._send, name="page-log", daemon=True)
        self._thread.start()

    def add(self, step: str, line: str, *, flow_run: str, task_run: str | None) -> None:
        """Queue a line; count it as lost if the queue is full."""
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
        """Send the queued lines for at most `seconds`; return how many lines of each step were not delivered.

        Lines of a request without an answer count as not delivered, although the server may have them.
        """
        self._deadline = time.monotonic() + seconds
        self._closing.set()
        self._thread.join(seconds + _RETRY_SECONDS)
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
                    time.sleep(_PAUSE_SECONDS if self._closing.wait(_RETRY_SECONDS) else 0)

    def _take(self) -> list[tuple[str, Entry]]:
        taken: list[tuple[str, Entry]] = []
        with suppress(queue.Empty):
            while len(taken) < _BATCH_LINES:
                taken.append(self._waiting.get_nowait())
        return taken


def _post(client: SyncPrefectClient, entries: list[Entry]) -> bool:
    try:
        client.create_logs(entries)
    except Exception:  # noqa: BLE001 - the run does not depend on its page
        return False
    return True


class ProgressArtifact:
    """The progress bar of one stage on its page, updated at most every five seconds.

    If the server does not answer, the bar is updated at a later refresh.
    """

    def __init__(self, path: Path, key: str, url: str) -> None:
        """Keep the progress file, the artifact's key and the API's address."""
        self._path, self._key, self._url = path, key, url
        self._artifact: UUID | None = None
        self._shown: tuple[int, int] | None = None
        self._refreshed_at = float("-inf")

    def refresh(self, *, last: bool = False) -> None:
        """Update the bar; `last` marks the end of the stage and ignores the five seconds."""
        now = time.monotonic()
        if not last and now - self._refreshed_at < _BAR_SECONDS:
            return
        self._refreshed_at = now
        record = read_last_record(self._path)
        found = (int(record["step"]), int(record["total_steps"])) if record and record["total_steps"] else None
        if found is None or found == self._shown or not is_answering(self._url):
            return
        (step, steps), self._shown = found, found
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), suppress(httpx.HTTPError):
            percent, words = round(100 * step / steps, 1), f"step {step} of {steps}"
            if self._artifact is None:
                made = create_progress_artifact(percent, key=self._key, description=words)
                self._artifact = made if isinstance(made, UUID) else None  # never a coroutine: no event loop runs here
            else:
                update_progress_artifact(self._artifact, percent, description=words)


@contextmanager
def stop_on_suspend() -> Iterator[None]:
    """Poll the state of a deployment's flow run; when it is suspended, end the block as SIGTERM does.

    Raises:
        Pause: The run was suspended. Prefect then ends the process and keeps the state Suspended.
    """
    if not runtime.deployment.id:  # Prefect cannot suspend other runs, since it could not restart them
        yield
        return
    found: list[State[object]] = []
    done = threading.Event()
    here = contextvars.copy_context()  # with the settings that name this run's server
    watcher = threading.Thread(target=here.run, args=(_watch, runtime.flow_run.id, found, done), daemon=True)
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
    while not done.wait(_POLL_SECONDS):
        with suppress(httpx.HTTPError, PrefectException), get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run)).state
            if state and state.type == StateType.PAUSED:
                found.append(state)
                print(
                    "suspended in the Prefect UI: the stage saves a checkpoint and ends. Resume there or `ropeway run` "
                    "continues from it",
                    flush=True,
                )
                os.kill(os.getpid(), signal.SIGTERM)
                return
