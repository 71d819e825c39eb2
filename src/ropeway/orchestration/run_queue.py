"""The queue of runs in one workspace: why a run waits, and which waiting run another one makes superfluous.

The deployment `retrain` lets one run start at a time, since the workspace lock lets one run work. Prefect keeps the
others as `AwaitingConcurrencySlot` without saying for whom; a thread of `ropeway serve` says it on their pages.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from ropeway.orchestration.prefect_requests import ask, now_text
from ropeway.runtime.errors import TemporaryError

WAITING = "Waiting"  # state of a run that has its slot, but not the workspace
_POLL_SECONDS = 10.0
_QUEUED_AHEAD = timedelta(minutes=2)  # future runs of a schedule are created days ahead
_WAITING = ("AwaitingConcurrencySlot", "Late")
_BEGUN = ("RUNNING", "PENDING", "CANCELLING")
_INFO = 20


@dataclass(frozen=True, slots=True)
class QueuedRun:
    """A run of the deployment that is due and has not ended.

    Attributes:
        since: When it started, or was due.
        state: Name of its state, e.g. `AwaitingConcurrencySlot`.
        begun: Whether it has its slot.
        parameters: Its parameters, with the profile filled in.
        by_schedule: Whether a schedule made it.
    """

    number: str
    name: str
    profile: str
    since: str
    state: str
    begun: bool
    parameters: Mapping[str, Any]
    by_schedule: bool


def read_queue(url: str, default: str) -> list[QueuedRun]:
    """Return the runs of the deployment `retrain` that are due and have not ended, oldest first.

    `default` is the profile of runs that state none.

    Raises:
        TemporaryError: The server does not answer.
    """
    deployment = ask(url, "GET", "/deployments/name/retrain/retrain")
    wanted = {
        "deployments": {"id": {"any_": [deployment["id"]]}},
        "flow_runs": {
            "state": {"type": {"any_": ["SCHEDULED", *_BEGUN]}},
            "expected_start_time": {"before_": (datetime.now(UTC) + _QUEUED_AHEAD).isoformat()},
        },
        "sort": "EXPECTED_START_TIME_ASC",
        "limit": 200,
    }
    found = []
    for run in ask(url, "POST", "/flow_runs/filter", wanted):
        state = run.get("state") or {}
        profile = str(run["parameters"].get("profile") or deployment["parameters"].get("profile") or default)
        found.append(
            QueuedRun(
                str(run["id"]),
                str(run["name"]),
                profile,
                str(run.get("start_time") or run.get("expected_start_time") or ""),
                str(state.get("name")),
                state.get("type") in _BEGUN,
                {**run["parameters"], "profile": profile},
                bool(run.get("auto_scheduled")),
            )
        )
    return found


def explain_waiting(queue: Sequence[QueuedRun]) -> dict[str, str]:
    """Return id -> why, for each run that waits for its slot while another run has it."""
    active = next((run for run in queue if run.begun), None)
    if active is None:
        return {}
    since = active.since[:16].replace("T", " ")
    words = f"waits for run {active.name} of profile {active.profile}, began at {since} UTC"
    return {run.number: words for run in queue if run.state in _WAITING}


def find_superfluous(queue: Sequence[QueuedRun]) -> dict[str, QueuedRun]:
    """Return id -> the run that replaces it, for scheduled runs that wait beside a later one with the same parameters.

    A run reads its inputs when it starts, so the later one does all that the earlier one would do.
    """
    waiting = [run for run in queue if run.state in _WAITING and run.by_schedule]
    return {
        run.number: later
        for place, run in enumerate(waiting)
        if (later := next((one for one in reversed(waiting[place + 1 :]) if one.parameters == run.parameters), None))
    }


class QueueKeeper:
    """Thread that shows on the page of each waiting run what it waits for, and cancels superfluous ones."""

    def __init__(self, url: str, default: str) -> None:
        """Prepare; `default` is the profile of runs that state none."""
        self._url, self._default = url, default
        self._told: dict[str, str] = {}
        self._failing = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run-queue", daemon=True)

    def start(self) -> None:
        """Start the thread; it ends with this process or with `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            words = ""
            try:
                self.look()
            except TemporaryError as error:
                words = str(error)
            except Exception as error:  # noqa: BLE001 - serving goes on whatever happens here
                words = f"{type(error).__name__}: {error}"
            if words and words != self._failing:
                print(f"queue: {words}", flush=True)
            self._failing = words

    def look(self) -> None:
        """Read the queue, and say and cancel what is new.

        Raises:
            TemporaryError: The server does not answer.
        """
        queue = read_queue(self._url, self._default)
        superfluous = find_superfluous(queue)
        for number, later in superfluous.items():
            words = f"run {later.name} waits for the same profile and reads what is there when it starts"
            state = {"type": "CANCELLED", "name": "Cancelled", "message": words}
            ask(self._url, "POST", f"/flow_runs/{number}/set_state", {"state": state})
            print(f"queue: canceled a scheduled run of {later.profile}: {words}", flush=True)
        reasons = {number: words for number, words in explain_waiting(queue).items() if number not in superfluous}
        names = {run.number: run for run in queue}
        for number, words in reasons.items():
            if self._told.get(number) != words:
                self._tell(names[number], words)
        self._told = reasons

    def _tell(self, run: QueuedRun, words: str) -> None:
        print(f"queue: run {run.name} of profile {run.profile} {words}", flush=True)
        line = {"name": "ropeway", "level": _INFO, "message": words, "timestamp": now_text(), "flow_run_id": run.number}
        ask(self._url, "POST", "/logs/", [line])
        page = {"key": "queue", "type": "markdown", "data": f"This run {words}.", "flow_run_id": run.number}
        ask(self._url, "POST", "/artifacts/", page)
