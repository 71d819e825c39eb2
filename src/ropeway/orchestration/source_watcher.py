"""The thread of `ropeway serve --watch` that looks at sources and asks the served deployment for runs.

It is told to look at once by the event `ropeway.data.changed` on the Prefect server, which `ropeway notify-data` or any
HTTP client posts. The watcher reads stored events itself: docs/decisions/0025 says why no automation does.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ropeway.config.load_params import load_profile
from ropeway.orchestration.prefect_requests import ask, post_event, read_events
from ropeway.orchestration.run_queue import WAITING, read_queue
from ropeway.orchestration.source_watch import (
    LookResult,
    WatchState,
    find_baseline,
    has_recorded_since,
    identify_package,
    judge_look,
    look_at_sources,
    used_by_active_run,
)
from ropeway.runtime.errors import RopewayError, TemporaryError
from ropeway.runtime.manifest import digest_of

EVENT = "ropeway.data.changed"
CHANGED = "changed:"  # tag of a run: a source that started it
_POLL_SECONDS = 10.0  # for events; one poll takes 1 ms of CPU here and 7 ms of the server (measured)
_SETTLE_SECONDS = 30.0  # between two looks that must agree
_AGAIN_SECONDS = 300.0  # after a look that could not read something, also where only notifications start looks
_MEMORY = timedelta(hours=1)  # events older than this are not looked for: clocks of senders may differ
_STORED_SECONDS = 60.0  # the server stores events in batches, every 5 s (measured)
_BEFORE_INPUTS = ("Scheduled", "Late", "Pending", "AwaitingConcurrencySlot", WAITING)  # names of states
_PARAMETER = "trigger"
_DEPLOYMENT = "/deployments/name/retrain/retrain"
_MAX_CRASHES = 3
_SHUT_DOWN = "Runner is shutting down"  # message of runs that end with `ropeway serve`; a person's cancel has another


class SourceWatcher:
    """Looks at the sources of profiles in a workspace, every `interval` seconds and when it is told to."""

    def __init__(
        self, root: Path, url: str, profiles: Sequence[str], interval: float | None, *, rehearse: bool = False
    ) -> None:
        """Prepare; `interval` None: look only at the start and when told to. `rehearse` is passed to the runs."""
        self.root, self.url, self.interval, self.rehearse = root, url, interval, rehearse
        self._due = dict.fromkeys(profiles, 0.0)
        self._said: dict[str, tuple[str, ...]] = {}
        self._known: set[str] = set()  # ids of events that were seen
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="source-watcher", daemon=True)

    def start(self) -> None:
        """Start the thread; it ends with this process or with `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current look."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.poll(time.monotonic())
            soonest = min(self._due.values(), default=float("inf"))
            self._stop.wait(max(0.1, min(_POLL_SECONDS, soonest - time.monotonic())))

    def poll(self, now: float) -> None:
        """Read new events, then look at every profile that is due; no error ends the watch."""
        try:
            if self._was_notified():
                self._due = dict.fromkeys(self._due, 0.0)
        except TemporaryError as error:
            self._say("events", (str(error),))
        else:
            self._say("events", ())
        for profile, due in self._due.items():
            if due <= now:
                self._due[profile] = now + self._look(profile)

    def _look(self, profile: str) -> float:
        """Look at one profile; return the seconds to its next look."""
        pause = self.interval or float("inf")
        try:
            result = self.look_once(profile)
        except Exception as error:  # noqa: BLE001 - serving goes on whatever a look meets
            kind = "" if isinstance(error, RopewayError) else f"{type(error).__name__}: "
            self._say(profile, (f"the watch of {profile} could not look: {kind}{error}",))
            return min(pause, _AGAIN_SECONDS)
        self._say(profile, tuple(f"{profile}: {words}" for words in result.words))
        return min(pause, {"settle": _SETTLE_SECONDS, "wait": _AGAIN_SECONDS}.get(result.action, pause))

    def look_once(self, profile: str) -> LookResult:
        """Look at the sources of one profile and ask for a run if one is due.

        Raises:
            RopewayError: params.yaml, the registry or the Prefect server cannot be read.
        """
        state = WatchState.load(self.root, profile)
        handled_at, package = state.handled_at, identify_package(self.root, profile)
        look = look_at_sources(self.root, profile)
        used = used_by_active_run(self.root, profile)
        result = judge_look(state, look, find_baseline(self.root, profile, state), used)
        over = used is not None or has_recorded_since(self.root, profile, state)
        if result.action == "nothing" and not over and self._has_crashed(state):
            run = self._ask_for_run(profile, state, look.identities, state.words)
            state.run, state.crashes = run["id"], state.crashes + 1
            words = f"the run that it asked for crashed; asked for run {run['id']}, which resumes"
            result = LookResult("nothing", result.changed, (*result.words, words))
        if result.action == "run":
            waiting = find_waiting(self.url, profile, load_profile(self.root / "params.yaml")[0])
            if waiting:
                words = f"run {waiting} waits to start and will read this; no second one is asked for"
                result = LookResult("wait", result.changed, (*result.words, words))
            else:
                told = "; ".join(f"source {name} changed: {what}" for name, what in result.changed.items())
                run = self._ask_for_run(profile, state, look.identities, told, changed=result.changed)
                state.handle(look.identities, run=run["id"], words=told)
                result = LookResult("run", result.changed, (*result.words, f"asked for run {run['id']}"))
        if state.handled_at != handled_at:
            state.package = package
        state.save(self.root, profile)
        return result

    def _has_crashed(self, state: WatchState) -> bool:
        """Return whether the run that was asked for last ended with its host or with serve, and may be repeated.

        One that failed is not: what failed once fails again until a person acts.
        """
        if state.run is None or state.crashes >= _MAX_CRASHES:
            return False
        found = ask(self.url, "POST", "/flow_runs/filter", {"flow_runs": {"id": {"any_": [state.run]}}})
        state_now = (found[0].get("state") or {}) if found else {}
        shut_down = state_now.get("type") == "CANCELLED" and str(state_now.get("message")).startswith(_SHUT_DOWN)
        return shut_down or state_now.get("type") == "CRASHED"

    def _ask_for_run(
        self,
        profile: str,
        state: WatchState,
        now: Mapping[str, object],
        words: str,
        *,
        changed: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        deployment = ask(self.url, "GET", _DEPLOYMENT)
        parameters: dict[str, object] = {**deployment["parameters"], "profile": profile, "rehearse": self.rehearse}
        known = (deployment.get("parameter_openapi_schema") or {}).get("properties") or {}
        if _PARAMETER in known:  # flows/retrain.py of an older clone has no such parameter
            parameters[_PARAMETER] = words
        names = list(changed or ())
        run: dict[str, Any] = ask(
            self.url,
            "POST",
            f"/deployments/{deployment['id']}/create_flow_run",
            {
                "parameters": parameters,
                "tags": ["ropeway", "trigger:data", *(f"{CHANGED}{name}" for name in names)],
                "name": f"{profile}: {', '.join(names)} changed" if names else f"{profile}: again after a crash",
                "state": {"type": "SCHEDULED", "name": "Scheduled", "message": words[:1000]},
                # A watch that is killed before it stores its state asks again for the same run.
                "idempotency_key": f"data-{digest_of([profile, state.handled_at, state.run, now])}",
            },
        )
        return run

    def _was_notified(self) -> bool:
        """Return whether an event came since the last call; at the first one every profile is due anyway."""
        ids = {str(event["id"]) for event in read_events(self.url, EVENT, datetime.now(UTC) - _MEMORY)}
        new, self._known = ids - self._known, ids
        return bool(new)

    def _say(self, about: str, words: tuple[str, ...]) -> None:
        """Print each text once, until it no longer applies."""
        for one in words:
            if one not in self._said.get(about, ()):
                print(f"watch: {one}", flush=True)
        self._said[about] = words


def find_waiting(url: str, profile: str, default: str) -> str | None:
    """Return the name of a run of a profile that is due and has not frozen its inputs; None if there is none.

    `default` is the profile of runs that state none.

    Raises:
        TemporaryError: The server does not answer.
    """
    # A run that waits for its retry or was resumed may have frozen the sources before they changed.
    waiting = (run for run in read_queue(url, default) if run.profile == profile and run.state in _BEFORE_INPUTS)
    return next((run.name for run in waiting), None)


def notify_data(url: str, source: str, note: str) -> str:
    """Post the event that makes watches look at their sources; return its id once the server has stored it.

    Raises:
        TemporaryError: No server answers, or it did not store the event within a minute; post it again.
    """
    began = datetime.now(UTC)
    resource = {"prefect.resource.id": "ropeway.data", "prefect.resource.name": source or "data"}
    event = post_event(url, EVENT, resource, {"source": source, "note": note})
    deadline = time.monotonic() + _STORED_SECONDS
    while time.monotonic() < deadline:
        if any(one["id"] == event for one in read_events(url, EVENT, began - timedelta(seconds=1))):
            return event
        time.sleep(0.5)
    raise TemporaryError(f"the Prefect server at {url} did not store the event. Run the same command again")
