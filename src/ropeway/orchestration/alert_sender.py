"""The thread of `ropeway server` that posts alerts to ROPEWAY_ALERT_URL: once per run and reason, with bounded retries.

What was sent is kept beside Prefect's database, so neither a restart nor a repeated state sends an alert twice. Runs
do not wait for it. Messages name the receiver's host only, since its path is a secret. docs/decisions/0025 says why
no automation of Prefect does this.
"""

import os
import ssl
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from ropeway.orchestration.alerts import (
    DRIFT_EVENT,
    ENDED,
    SEVERITIES,
    WAITING,
    Alert,
    AlertLimits,
    alert_body,
    alerts_of_events,
    find_alerts,
    read_time,
)
from ropeway.orchestration.prefect_requests import ask, read_events
from ropeway.orchestration.prefect_server import prefect_home
from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.runtime.least_rate import finish_within
from ropeway.runtime.manifest import json_mapping, write_json
from ropeway.runtime.tls import find_tls_fault

_FILE = "ropeway-alerts.json"
_POLL_SECONDS = 10.0
_TIMEOUT_SECONDS = 10.0
_ANSWER_SECONDS = 3 * _TIMEOUT_SECONDS  # the timeout is without a byte, this is for the whole answer
_ATTEMPTS, _PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 10, 10.0, 600.0  # an outage of about 40 minutes is bridged
_WINDOW, _KEPT = timedelta(days=7), timedelta(days=60)
_MAX_WAITING = 1000
_MAX_LIMIT = 1e6  # hours or minutes
_SHOWN = 200  # characters
_TEMPORARY = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
_PAGE = 200  # runs in one answer of the API


def read_hook() -> str | None:
    """Return ROPEWAY_ALERT_URL; None if it is not set.

    Raises:
        ConfigError: It is not an http(s) URL.
    """
    hook = os.environ.get("ROPEWAY_ALERT_URL")
    try:
        parts = urlsplit(hook or "https://none")
        host = parts.hostname or ""
        name = host if ":" in host else host.encode("idna")
        valid = parts.scheme in ("http", "https") and bool(name) and parts.port != 0  # reading it checks the port
    except ValueError:  # UnicodeError, too
        valid = False
    if not valid:
        raise ConfigError("ROPEWAY_ALERT_URL: expected an https:// URL, to which alerts are posted as JSON")
    return hook or None


def read_limits() -> AlertLimits:
    """Return the limits that the environment states.

    Raises:
        ConfigError: A value is not a positive number.
    """
    found = []
    for name, default in (("ROPEWAY_ALERT_REVIEW_HOURS", "24"), ("ROPEWAY_ALERT_LATE_MINUTES", "30")):
        text = os.environ.get(name, default)
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= _MAX_LIMIT:
            raise ConfigError(f"{name}={text!r}: expected a number above 0, e.g. {default}")
        found.append(value)
    return AlertLimits(*found)


@dataclass(slots=True)
class AlertRecord:
    """What was sent and what waits, stored beside Prefect's database.

    Attributes:
        since: ISO time of the first start; what happened before is not alerted.
        sent: Key of an alert -> when it was sent, or given up.
        waiting: Alerts that are to be sent, oldest first, with the attempts made.
    """

    since: str
    sent: dict[str, str] = field(default_factory=dict)
    waiting: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, now: datetime) -> "AlertRecord":
        """Return the stored record; a new one if there is none or it is damaged."""
        try:
            found = cls(**json_mapping(path.read_bytes()))
            for at in (found.since, *found.sent.values()):
                read_time(at)
            for one in found.waiting:
                if Alert(**one["alert"]).reason not in SEVERITIES or not isinstance(one["attempts"], int):
                    raise ValueError  # noqa: TRY301 - handled as any damage
        except (OSError, TypeError, ValueError, KeyError, AttributeError, RecursionError):
            return cls(now.isoformat())
        return found

    def add(self, alerts: list[Alert]) -> bool:
        """Queue the alerts that are neither sent nor queued; return whether there are any."""
        known = {*self.sent, *(Alert(**one["alert"]).key for one in self.waiting)}
        new = {alert.key: alert for alert in reversed(alerts) if alert.key not in known}  # of equal keys the first
        free = _MAX_WAITING - len(self.waiting)
        self.waiting += [{"alert": asdict(alert), "attempts": 0} for alert in list(reversed(new.values()))[:free]]
        return bool(new)

    def end(self, entry: dict[str, Any], now: datetime) -> None:
        """Record that an alert was sent or given up; forget what is too old to be found again.

        Too old by two clock readings, the one of the last alert and this one: after one wrong reading, alerts that were
        sent would be sent again.
        """
        self.waiting.remove(entry)
        last = max((read_time(at) for at in self.sent.values()), default=now)
        before = min(now, last + _WINDOW) - _KEPT
        self.sent[Alert(**entry["alert"]).key] = max(now, last).isoformat()
        self.sent = {key: at for key, at in self.sent.items() if read_time(at) > before}


class AlertSender:
    """Finds alerts on the Prefect server at `url` and posts them to `hook`."""

    def __init__(self, root: Path, url: str, hook: str, limits: AlertLimits) -> None:
        """Read the record of earlier starts."""
        self._url, self._hook, self._limits = url, hook, limits
        self._host = urlsplit(hook).hostname
        self._path = prefect_home(root) / _FILE
        self._record = AlertRecord.load(self._path, datetime.now(UTC))
        self._flows: dict[str, str] = {}
        self._try_at = 0.0
        self._failing = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_until_stopped, name="alerts", daemon=True)
        write_json(self._path, asdict(self._record))

    def start(self) -> None:
        """Start the thread; it ends with this process or with `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current request."""
        self._stop.set()
        self._thread.join(_TIMEOUT_SECONDS)

    def _send_until_stopped(self) -> None:
        while not self._stop.is_set():
            try:
                self.find(datetime.now(UTC))
                self.deliver(time.monotonic())
                self._note("")
            except TemporaryError as error:
                self._note(str(error))
            except Exception as error:  # noqa: BLE001 - the server goes on whatever happens here
                self._note(f"{type(error).__name__} in the alerts")
            self._stop.wait(_POLL_SECONDS)

    def find(self, now: datetime) -> None:
        """Queue what happened since the last call.

        Raises:
            TemporaryError: The Prefect server does not answer.
        """
        if (
            read_time(self._record.since) > now
        ):  # the clock was ahead at the first start; else nothing is alerted until then
            self._record.since = now.isoformat()
            write_json(self._path, asdict(self._record))
        since = max(read_time(self._record.since), now - _WINDOW)
        ended = {"state": {"name": {"any_": list(ENDED)}}, "end_time": {"after_": since.isoformat()}}
        waiting = {"state": {"name": {"any_": list(WAITING)}}, "expected_start_time": {"after_": since.isoformat()}}
        runs = [
            run
            for chosen, sort in ((ended, "END_TIME_DESC"), (waiting, "EXPECTED_START_TIME_DESC"))
            for run in ask(self._url, "POST", "/flow_runs/filter", {"flow_runs": chosen, "sort": sort, "limit": _PAGE})
        ]
        if {str(run["flow_id"]) for run in runs} - self._flows.keys():
            self._flows = {flow["id"]: flow["name"] for flow in ask(self._url, "POST", "/flows/filter", {})}
        alerts = find_alerts(runs, self._flows, self._limits, now, self._url)
        if self._record.add(alerts + alerts_of_events(read_events(self._url, DRIFT_EVENT, since))):
            write_json(self._path, asdict(self._record))

    def deliver(self, now: float) -> None:
        """Post what waits; after a failure pause, twice as long each time, and give an alert up after ten attempts."""
        if now < self._try_at:
            return
        for entry in list(self._record.waiting):
            alert = Alert(**entry["alert"])
            fault = self._post(alert)
            entry["attempts"] += 1
            given_up = fault.is_final or entry["attempts"] >= _ATTEMPTS
            if not fault.words or given_up:
                if fault.words:
                    count = entry["attempts"]
                    print(
                        f"alerts: {self._host} {fault.words}; given up after {count} attempts: {alert.reason} of "
                        f"{alert.text[:_SHOWN]}",
                        flush=True,
                    )
                self._record.end(entry, datetime.now(UTC))
            write_json(self._path, asdict(self._record))
            if fault.words and not fault.is_final:
                pause = min(_MAX_PAUSE_SECONDS, _PAUSE_SECONDS * 2 ** (entry["attempts"] - 1))
                self._try_at = now + pause
                print(
                    f"alerts: {self._host} {fault.words}; {len(self._record.waiting)} wait for {pause:.0f} s",
                    flush=True,
                )
                return

    def _post(self, alert: Alert) -> "_Fault":
        """Post one alert; return what is wrong, without words if it was received."""
        try:
            with httpx.Client(timeout=_TIMEOUT_SECONDS, verify=ssl.create_default_context()) as client:
                answer = finish_within(
                    _ANSWER_SECONDS, lambda: client.post(self._hook, json=alert_body(alert)), what="its answer"
                )
        except TemporaryError:
            return _Fault(f"did not end its answer within {_ANSWER_SECONDS:g} s")
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:  # whose text has the address
            fault = find_tls_fault(error, "SSL_CERT_FILE")
            return _Fault(f"cannot be reached: {fault}" if fault else f"cannot be reached ({type(error).__name__})")
        code = answer.status_code
        refused = HTTPStatus.BAD_REQUEST <= code < HTTPStatus.INTERNAL_SERVER_ERROR and code not in _TEMPORARY
        return _Fault("" if answer.is_success else f"answered {code} {_phrase(code)}", is_final=refused)

    def _note(self, words: str) -> None:
        if words and words != self._failing:
            print(f"alerts: {words}", flush=True)
        self._failing = words


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why an alert was not received, in words; `is_final`: the receiver refuses this alert, whenever it is posted."""

    words: str
    is_final: bool = False


def _phrase(code: int) -> str:
    return HTTPStatus(code).phrase if code in HTTPStatus._value2member_map_ else ""
