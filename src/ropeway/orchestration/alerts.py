"""What is worth an alert: its reason, severity and JSON. Pure values; `alert_sender` sends them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from ropeway.orchestration.prefect_requests import post_event
from ropeway.orchestration.prefect_server import page_address

# Reason -> severity. One alert per run and reason, or per version and reason.
SEVERITIES = {
    "failed": "error",
    "crashed": "error",
    "rejected": "warning",  # by the gate, or by a reviewer
    "drift": "warning",
    "review": "info",
    "review_overdue": "warning",
    "schedule_missed": "error",
}
DRIFT_EVENT = "ropeway.drift"
_COLORS = {"error": "#c62828", "warning": "#f9a825", "info": "#1565c0"}  # of Slack's bar, not of our pages
_ENDS = {"Failed": "failed", "TimedOut": "failed", "Crashed": "crashed", "Rejected": "rejected"}
ENDED, WAITING = tuple(_ENDS), ("Suspended", "Late")  # names of states
_MAX_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert.

    Attributes:
        subject: What it is about: the id of a flow run, or of an event's resource. With `reason` it is sent once.
        text: One sentence.
        page: Address of the page that shows it; empty if there is none.
        at: When it happened, ISO.
    """

    subject: str
    reason: str
    text: str
    page: str
    at: str

    @property
    def key(self) -> str:
        """Identify the alert, also for receivers."""
        return f"{self.subject} {self.reason}"


@dataclass(frozen=True, slots=True)
class AlertLimits:
    """Hours after which a review, and minutes after which a scheduled run, counts as overdue."""

    review_hours: float
    late_minutes: float


def find_alerts(
    runs: Iterable[Mapping[str, Any]], flows: Mapping[str, str], limits: AlertLimits, now: datetime, url: str
) -> list[Alert]:
    """Return the alerts of flow runs as the API at `url` describes them; `flows` are names of flows by id."""
    found = []
    for run in runs:
        state, flow = run.get("state") or {}, flows.get(str(run["flow_id"]), "flow")
        name, message = str(state.get("name")), str(state.get("message") or "")
        since = read_time(str(state.get("timestamp") or run.get("expected_start_time")))
        expected = read_time(str(run.get("expected_start_time") or since.isoformat()))
        reasons = [_ENDS[name]] if name in _ENDS else []
        if name == "Suspended" and flow == "review":
            reasons = ["review"]
            if now - since > timedelta(hours=limits.review_hours):
                reasons.append("review_overdue")
                message = f"nobody has answered for {(now - since) / timedelta(hours=1):.0f} h"
        if name == "Late" and now - expected > timedelta(minutes=limits.late_minutes):
            reasons = ["schedule_missed"]
            profile = (run.get("parameters") or {}).get("profile")
            whose = f"run of profile {profile}, " if profile else ""
            message = f"{whose}due at {expected:%Y-%m-%d %H:%M} UTC, not started: is `ropeway serve` running?"
        text = f"{flow} {run['name']}: {name} {message}"
        page = page_address(url, f"/runs/flow-run/{run['id']}")
        found += [Alert(str(run["id"]), reason, text, page, since.isoformat()) for reason in reasons]
    return found


def alerts_of_events(events: Iterable[Mapping[str, Any]]) -> list[Alert]:
    """Return the alerts of events named `ropeway.drift`; see `report_drift`."""
    found = []
    for event in events:
        resource, payload = event.get("resource") or {}, event.get("payload") or {}
        subject = str(resource.get("prefect.resource.id") or event["id"])
        name = str(resource.get("prefect.resource.name") or subject)
        text = f"{name}: drift {payload.get('words') or 'above its limit'}"
        found.append(Alert(subject, "drift", text, str(payload.get("page") or ""), str(event.get("occurred") or "")))
    return found


def report_drift(url: str, *, version: str, digest: str, words: str, page: str = "") -> None:
    """Record on the Prefect server that a version's data drifted above its limit; one alert per version follows.

    Args:
        url: Address of the API, e.g. `persistent_server_url(root)`.
        version: E.g. `laptop@v3`.
        digest: The version's digest.
        words: What drifted, from what to what, and its limit.
        page: Address of the page that shows it.

    Raises:
        TemporaryError: The server does not answer.
    """
    resource = {"prefect.resource.id": f"ropeway.version.{digest}", "prefect.resource.name": version}
    post_event(url, DRIFT_EVENT, resource, {"words": words, "page": page})


def alert_body(alert: Alert) -> dict[str, Any]:
    """Return the JSON that is posted: fields for programs, and `text` and `attachments` as Slack reads them."""
    severity = SEVERITIES[alert.reason]
    text = alert.text.strip()[:_MAX_CHARACTERS].replace("<", "&lt;")  # else Slack reads <!channel> in an error message
    return {
        "text": text,
        "page": alert.page[:_MAX_CHARACTERS],
        "severity": severity,
        "reason": alert.reason,
        "at": alert.at,
        "id": alert.key[:_MAX_CHARACTERS],  # the same if it is posted twice
        "attachments": [
            {
                "color": _COLORS[severity],
                "fallback": text,
                "title": f"{severity}: {alert.reason.replace('_', ' ')}",
                **({"title_link": alert.page[:_MAX_CHARACTERS]} if alert.page else {}),
                "fields": [
                    {"title": "severity", "value": severity, "short": True},
                    {"title": "reason", "value": alert.reason, "short": True},
                ],
            }
        ],
    }


def read_time(text: str) -> datetime:
    """Return an ISO time; one without a zone is UTC."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)
