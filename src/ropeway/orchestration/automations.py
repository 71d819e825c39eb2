"""Prefect automations of a workspace's server: mark runs of dead hosts as crashed.

They are created over plain HTTP, so that `ropeway server` need not import Prefect. Source of shapes: prefect 3.9.1.
"""

from typing import Any

from ropeway.orchestration.prefect_requests import ask

CRASHED, ALERT = "ropeway: crashed hosts", "ropeway: alert"
_BLOCK = "ropeway-alert"
_SILENT_SECONDS = 90  # three heartbeats
# Suspended: a review waits for days without heartbeats; without this entry it would be marked crashed (measured).
# Prefect names a run's event after the state's name, not its type, so the final states of our flows are listed too.
# Without them the automation fires for completed runs, which Prefect refuses to mark as crashed (measured).
_ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "Suspended", "Published", "Unchanged", "Rejected", "Promoted")
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
        TemporaryError: The server refused a request, or was busy for a minute.
    """
    automation = crashed_automation(silent_seconds=_SILENT_SECONDS)
    there = {found["name"]: found for found in find_automations(url)}
    if old := there.get(CRASHED):
        ask(url, "PUT", f"/automations/{old['id']}", {**automation, "enabled": old["enabled"]})
    else:
        ask(url, "POST", "/automations/", automation)
    watched = [f"a run without a heartbeat for {_SILENT_SECONDS} s is marked Crashed"]
    if ALERT in there:
        _remove_alerts(url, there[ALERT]["id"])
        watched.append(f"removed '{ALERT}' of an older Ropeway and the address that it stored; `ropeway server` posts")
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


def find_automations(url: str) -> list[_Json]:
    """Return our automations as the server has them."""
    chosen = {"automations": {"name": {"any_": [CRASHED, ALERT]}}}
    found: list[_Json] = ask(url, "POST", "/automations/filter", chosen)
    return found


def _remove_alerts(url: str, automation: str) -> None:
    """Remove the automation of an older Ropeway and its block, from which the API returns the secret address."""
    ask(url, "DELETE", f"/automations/{automation}")
    for found in ask(url, "POST", "/block_documents/filter", {"block_documents": {"name": {"any_": [_BLOCK]}}}):
        ask(url, "DELETE", f"/block_documents/{found['id']}")
