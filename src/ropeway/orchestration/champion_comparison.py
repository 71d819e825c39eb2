"""A fair opponent for the gate: the champion, measured on this run's validation rows if they are not its own."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ropeway.orchestration.dvc_stage import Say, Site, run_command
from ropeway.registry import Version
from ropeway.runtime.workspace import Workspace


def measure_champion(
    site: Site, workspace: Workspace, champion: Version, rows: str, say: Say
) -> Mapping[str, Any] | None:
    """Return the champion's metrics on the rows whose digest is `rows`; None, with the reason said, if it cannot be.

    Args:
        site: Where its process runs.
        workspace: Whose rows.
        champion: Its package is pulled, every byte verified, and removed afterwards.
        rows: What this run's eval.json calls `validation`.
        say: Gets the lines.
    """
    place = site.root / ".work" / "champion" / f"{champion.digest[:12]}-{rows[:12]}"
    out = place.with_suffix(".json")  # kept: the same question may come again
    if not out.exists():
        say(f"{champion} was measured on other validation rows; measuring it on these")
        champion.pull(place)
        try:
            code, _ = run_command(site, "champion", command(workspace, place, out), say)
        finally:
            shutil.rmtree(place)
        if code:
            say(f"{champion} cannot be measured on these rows, so nothing can be said against it or for it")
            return None
    metrics: Mapping[str, Any] = json.loads(out.read_bytes())
    return metrics


def command(workspace: Workspace, folder: Path, out: Path) -> list[str]:
    """Return the command that measures a package on a workspace's rows."""
    program = [sys.executable, "-m", "ropeway.stages.evaluate.champion"]
    return [*program, str(workspace.root), workspace.profile, str(folder), str(out)]
