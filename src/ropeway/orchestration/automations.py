"""Prefect automations of a workspace's server: mark runs of dead hosts as crashed, and post alerts.

They are created over plain HTTP, so that `ropeway server` need not import Prefect. Source of shapes: prefect 3.9.1.
"""

import os
from typing import Any
from urllib.parse import urlsplit

from ropeway.orchestration.prefect_requests import ask
from ropeway.runtime.errors import ConfigError

CRASHED, ALERT = "ropeway: crashed hosts", "ropeway: alert"
_BLOCK = "ropeway-alert"
_SILENT_SECONDS = 90  # three heartbeats
# Suspended: a review waits for days without heartbeats; without this entry it would be marked crashed (measured).
# Prefect names a run's event after the state's name, not its type, so the final states of our flows are listed too.
# Without them the automation fires for completed runs, which Prefect refuses to mark as crashed (measured).
_ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "Suspended", "Published", "Unchanged", "Rejected", "Promoted")
_ALERTED = ("Failed", "Crashed", "TimedOut", "Rejected", "Suspended")  # a suspended run waits for a reviewer
# Rendered by the server's Jinja: `~` joins strings, `tojson` quotes.
_WORDS = "(flow.name ~ ' ' ~ flow_run.name ~ ': ' ~ flow_run.state.name ~ ' ' ~ (flow_run.state.message or ''))"
_Json = dict[str, Any]
_OF_RUNS: _Json = {
    "type": "event",
    "match": {"prefect.resource.id": "prefect.flow-run.*"},
    "for_each": ["prefect.resource.id"],
    "threshold": 1,
}


def apply_automations(url: str) -> list[str]:
    """Create or update the automations; return a description of each. One disabled in the UI stays disabled.

    Raises:
        ConfigError: ROPEWAY_ALERT_URL is not an http(s) URL.
        TemporaryError: The server refused a request, or was busy for a minute.
    """
    hook = os.environ.get("ROPEWAY_ALERT_URL")
    if hook and (urlsplit(hook).scheme not in ("http", "https") or not urlsplit(hook).hostname):
        raise ConfigError("ROPEWAY_ALERT_URL: expected an https:// URL, to which alerts are posted as JSON")
    wanted = [crashed_automation(silent_seconds=_SILENT_SECONDS)]
    watched = [f"a run without a heartbeat for {_SILENT_SECONDS} s is marked Crashed"]
    if hook:
        wanted.append(alert_automation(_save_hook(url, hook)))
        watched.append(f"runs that enter {', '.join(_ALERTED)} are posted to {urlsplit(hook).hostname}")
    there = {found["name"]: found for found in find_automations(url)}
    for automation in wanted:
        old = there.get(automation["name"])
        if old:
            ask(url, "PUT", f"/automations/{old['id']}", {**automation, "enabled": old["enabled"]})
        else:
            ask(url, "POST", "/automations/", automation)
    if not hook and ALERT in there:
        ask(url, "DELETE", f"/automations/{there[ALERT]['id']}")
    return watched


def crashed_automation(*, silent_seconds: int) -> _Json:
    """Return the automation that marks runs as crashed whose heartbeats stopped before they ended."""
    heartbeat = "prefect.flow-run.heartbeat"
    return {
        "name": CRASHED,
        "description": "No heartbeat: the host died or lost its network.",
        "trigger": {
            **_OF_RUNS,
            "posture": "Proactive",
            "after": [heartbeat],
            "expect": [heartbeat, *(f"prefect.flow-run.{name}" for name in _ENDS)],
            "within": silent_seconds,
        },
        "actions": [
            {
                "type": "change-flow-run-state",
                "state": "CRASHED",
                "name": "Crashed",
                "message": f"no heartbeat for {silent_seconds} s: its host died or lost its network. Run again",
            }
        ],
    }


def alert_automation(block_id: str) -> _Json:
    """Return the automation that posts `{"text": …}` to the webhook if a run fails or waits for a review."""
    return {
        "name": ALERT,
        "description": "Posts to ROPEWAY_ALERT_URL.",
        "trigger": {
            **_OF_RUNS,
            "posture": "Reactive",
            "expect": [f"prefect.flow-run.{name}" for name in _ALERTED],
            "within": 0,
        },
        "actions": [
            {
                "type": "call-webhook",
                "block_document_id": block_id,
                "payload": '{"text": {{ ' + _WORDS + '|tojson }}, "page": {{ flow_run|ui_url|tojson }}}',
            }
        ],
    }


def find_automations(url: str) -> list[_Json]:
    """Return our automations as the server has them."""
    chosen = {"automations": {"name": {"any_": [CRASHED, ALERT]}}}
    found: list[_Json] = ask(url, "POST", "/automations/filter", chosen)
    return found


def _save_hook(url: str, hook: str) -> str:
    """Store the URL in a webhook block of the server, encrypted; return the block's id."""
    kind = ask(url, "GET", "/block_types/slug/webhook")
    schemas = ask(url, "POST", "/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}})
    data = {"method": "POST", "url": hook}
    for found in ask(url, "POST", "/block_documents/filter", {"block_documents": {"name": {"any_": [_BLOCK]}}}):
        if found["block_type_id"] == kind["id"]:
            ask(url, "PATCH", f"/block_documents/{found['id']}", {"data": data})
            return str(found["id"])
    block = {"name": _BLOCK, "data": data, "block_type_id": kind["id"], "block_schema_id": schemas[0]["id"]}
    return str(ask(url, "POST", "/block_documents/", block)["id"])
