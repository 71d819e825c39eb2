"""Prefect's settings for a workspace: its database inside it, nothing sent out, a quiet terminal.

They are environment variables, so call `apply_settings` before anything imports prefect. What is set already stays.
"""

import os
from pathlib import Path

_NO_PROXY = "127.0.0.1,localhost"


def apply_settings(root: Path) -> None:
    """Put the settings into this process's environment, where its children find them too."""
    for name, value in plan_settings(root).items():
        os.environ.setdefault(name, value)
    if password := os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):  # who has the server's lock has its key
        os.environ.setdefault("PREFECT_API_AUTH_STRING", password)
    # A company's proxy must not be asked for our own loopback server (httpx and websockets heed these).
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, dict.fromkeys([*os.environ.get(name, "").split(","), _NO_PROXY])))


def prefect_home(root: Path) -> Path:
    """Return where Prefect keeps its database, logs and pages."""
    return Path(os.environ.get("PREFECT_HOME") or plan_settings(root)["PREFECT_HOME"])


def plan_settings(root: Path) -> dict[str, str]:
    """Return the settings. Source of each name: prefect 3.9.1, `prefect config view --show-defaults`."""
    return {
        "PREFECT_HOME": str(root / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",  # the SDK's own switch
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds; a dead host is found after three
        "PREFECT_CLIENT_MAX_RETRIES": "20",  # the server may be away for minutes while a stage ends
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        # What a run says it prints itself; Prefect would print each line again with a prefix, and tracebacks.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    }
