"""Requests to a Prefect server over plain HTTP, for code that need not import Prefect, which takes more than a second.

Source of paths and shapes: prefect 3.9.1, `prefect.server.api`.
"""

import os
import ssl
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import httpx

from ropeway.runtime.errors import TemporaryError

# After an outage the runs that waited write at once, and the server's SQLite is locked for a while (measured).
_BUSY, _BUSY_SECONDS, _PAUSE_SECONDS = (429, 503), 60.0, 1.0
_TIMEOUT_SECONDS = 30.0


def ask(url: str, method: str, path: str, body: Mapping[str, object] | list[Any] | None = None) -> Any:  # noqa: ANN401 - the server's JSON
    """Return the JSON with which the API at `url` answers; a busy server is asked again for a minute.

    Raises:
        TemporaryError: The server does not answer, refuses the request, or stays busy.
    """
    user, _, password = (
        os.environ.get("PREFECT_API_AUTH_STRING") or os.environ.get("PREFECT_SERVER_API_AUTH_STRING") or ""
    ).partition(":")
    auth = (user, password) if user else None
    until = time.monotonic() + _BUSY_SECONDS
    # No proxy from the environment, but this machine's certificates; a server on http needs none, and loading them
    # takes 20 ms of CPU, which a poll would pay each time.
    verify = ssl.create_default_context() if url.startswith("https") else False
    while True:
        try:
            answer = httpx.request(
                method, url + path, json=body, auth=auth, timeout=_TIMEOUT_SECONDS, trust_env=False, verify=verify
            )
        except httpx.HTTPError as error:
            raise TemporaryError(f"the Prefect server at {url} does not answer ({error}). Start it again") from None
        if answer.status_code not in _BUSY or time.monotonic() > until:
            break
        time.sleep(_PAUSE_SECONDS)
    if answer.is_error:
        raise TemporaryError(
            f"the Prefect server refused {method} {path}: {answer.status_code} {answer.content[:300]!r}"
        )
    return answer.json() if answer.content else None


def post_event(url: str, event: str, resource: Mapping[str, str], payload: Mapping[str, object]) -> str:
    """Record an event on the server; return its id.

    `resource` has at least `prefect.resource.id`, what the event is about.

    Raises:
        TemporaryError: As in `ask`.
    """
    number = str(uuid.uuid4())
    body = {"id": number, "event": event, "resource": dict(resource), "payload": dict(payload), "occurred": now_text()}
    ask(url, "POST", "/events", [body])
    return number


def read_events(url: str, event: str, since: datetime) -> list[dict[str, Any]]:
    """Return the events of this name that occurred since then, oldest first.

    Raises:
        TemporaryError: As in `ask`.
    """
    chosen = {"event": {"name": [event]}, "occurred": {"since": since.isoformat()}, "order": "ASC"}
    found: list[dict[str, Any]] = ask(url, "POST", "/events/filter", {"filter": chosen})["events"]
    return found


def now_text() -> str:
    """Return the current time in ISO format, UTC."""
    return datetime.now(UTC).isoformat()
