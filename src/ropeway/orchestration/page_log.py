"""Sends a run's lines to its pages from a bounded queue; nothing waits for the server, what it lacks is counted.

Prefect's own worker (3.9.1) drains its queue at exit without a limit, and a client that is told to be patient repeats
each request for minutes: a stage that printed 20,000 lines kept `ropeway run` from ending for more than 480 s.
"""

import queue
import threading
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

Entry = dict[str, Any]  # as the API takes a line
_MOST_WAITING = 30_000  # lines; some 10 MB
_BATCH_LINES = 400
_PAUSE_SECONDS = 0.2
_AGAIN_SECONDS = 1.0  # after a server that did not answer
_ANSWER_SECONDS = 10.0
_INFO = 20


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
