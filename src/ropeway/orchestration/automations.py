"""Prefect automations of a workspace's server: mark runs of dead hosts as crashed.

They are created over plain HTTP, so that `ropeway server` need not import Prefect. Source of shapes: prefect 3.9.1.
"""

import os
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ropeway.orchestration.prefect_requests import ask

CRASHED, ALERT = "ropeway: crashed hosts", "ropeway: alert"
_BLOCK = "ropeway-alert"
_SILENT_SECONDS = 90  # three heartbeats
# After the start of a server; it takes up to minutes on a busy machine, and a run's next heartbeat up to 30 s more.
PATIENCE = timedelta(minutes=10)
_DATABASE = "prefect.db"  # in PREFECT_HOME
_DATABASE_URLS = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
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
    old = there.get(CRASHED)
    if old and not _is_part(automation, old):  # an update drops what the automation waits for, as of every run
        ask(url, "PUT", f"/automations/{old['id']}", {**automation, "enabled": old["enabled"]})
    elif not old:
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


def await_heartbeats(home: Path) -> int:
    """Have a server that starts next wait for heartbeats of runs before it marks them as crashed; return how many.

    While a server is away no heartbeat reaches it. Prefect compares the clock with its database as soon as it starts,
    before the heartbeats that runs kept arrive, and has no setting for it; so what it waits for is put off in its
    database. A run whose host did die is marked after `PATIENCE`.

    Raises:
        OSError: The database cannot be changed.
    """
    path = home / _DATABASE
    if any(os.environ.get(name) for name in _DATABASE_URLS) or not path.is_file():
        return 0
    until = (datetime.now(UTC) + PATIENCE).strftime("%Y-%m-%d %H:%M:%S.%f")  # as SQLAlchemy writes it
    change = (
        # A later end is of a clock that was ahead: with it no dead host would be noticed until then.
        'UPDATE automation_bucket SET "end" = :until WHERE "end" <> :until '
        "AND automation_id IN (SELECT id FROM automation WHERE name = :name)"
    )
    try:
        with closing(sqlite3.connect(path)) as database, database:
            known = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'automation_bucket'").fetchone()
            return database.execute(change, {"until": until, "name": CRASHED}).rowcount if known else 0
    except sqlite3.Error as error:
        raise OSError(f"{path}: {error}") from None


def _is_part(wanted: object, found: object) -> bool:
    """Return whether a value of the API has everything that is wanted; lists of words in any order."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(_is_part(one, found.get(key)) for key, one in wanted.items())
    if isinstance(wanted, list | tuple) and isinstance(found, list):
        if all(isinstance(one, str) for one in wanted):
            return sorted(wanted) == sorted(map(str, found))
        return len(wanted) == len(found) and all(map(_is_part, wanted, found))
    return wanted == found


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
