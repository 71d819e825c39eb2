"""A fair opponent for the gate: the champion, measured on this run's validation rows if they are not its own."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ropeway import registry
from ropeway.orchestration.dvc_stage import Say, Site, run_command
from ropeway.runtime.workspace import Workspace
from ropeway.storage import Store


def measure_champion(
    site: Site, workspace: Workspace, store: Store, reference: str, rows: str, say: Say
) -> Mapping[str, Any] | None:
    """Return the champion's metrics on the rows whose digest is `rows`; None, with the reason said, if it cannot be.

    Args:
        site: Where its process runs.
        workspace: Whose rows.
        store: Where the champion is; its package is pulled, every byte verified, and removed afterwards.
        reference: E.g. `laptop@v7`.
        rows: What this run's eval.json calls `validation`.
        say: Gets the lines.
    """
    digest = registry.resolve(store, reference)
    place = site.root / ".work" / "champion" / f"{digest[:12]}-{rows[:12]}"
    out = place.with_suffix(".json")  # kept: the same question may come again
    if not out.exists():
        say(f"{reference} was measured on other validation rows; measuring it on these")
        registry.pull(store, f"{workspace.profile}@{digest}", place)
        try:
            code, _ = run_command(site, "champion", command(workspace, place, out), say)
        finally:
            shutil.rmtree(place)
        if code:
            say(f"{reference} cannot be measured on these rows, so nothing can be said against it or for it")
            return None
    metrics: Mapping[str, Any] = json.loads(out.read_bytes())
    return metrics


def command(workspace: Workspace, folder: Path, out: Path) -> list[str]:
    """Return the command that measures a package on a workspace's rows."""
    program = [sys.executable, "-m", "ropeway.stages.evaluate.champion"]
    return [*program, str(workspace.root), workspace.profile, str(folder), str(out)]
