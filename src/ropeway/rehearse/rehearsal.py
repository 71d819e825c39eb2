"""Starts a rehearsal in a supervised process, displays its steps, and returns what it found."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ropeway.config.load_params import load_profile
from ropeway.orchestration.dvc_stage import Site, run_command
from ropeway.rehearse.rehearse_steps import (
    MARK,
    STATE,
    RehearsalRequest,
    RehearsalState,
    last_lines,
    read_state,
)
from ropeway.runtime.devices import CPU_RANKS, count_local_ranks, count_ranks, list_gpus
from ropeway.runtime.errors import ConfigError, DataError, RopewayError, TemporaryError, TrainingError, error_class
from ropeway.runtime.lock import HeldLock, workspace_lock
from ropeway.runtime.manifest import write_json
from ropeway.runtime.stage_log import log_path
from ropeway.runtime.workspace import Workspace

REQUEST = "rehearsal-request.json"
_STEP = "rehearsal"  # name of its log and exit record
_NAMED = {one.__name__: one for one in (ConfigError, DataError, TemporaryError, TrainingError)}


@dataclass(frozen=True, slots=True)
class RehearsalResult:
    """The result of a rehearsal.

    Attributes:
        profile: Name of the profile.
        ranks: Ranks that trained.
        seconds: Of the whole.
        state: Steps, changes, warnings, what was not rehearsed.
        failure: What a real run would have failed with; None if every step ended.
        stage: The stage in which it would have failed.
        folder: The rehearsal's workspace, if it was kept.
    """

    profile: str
    ranks: int
    seconds: float
    state: RehearsalState
    failure: RopewayError | None
    stage: str | None
    folder: str | None

    def to_json(self) -> dict[str, object]:
        """Return all facts as JSON values."""
        failed = None
        if self.failure is not None:
            code, kind = self.failure.exit_code, type(self.failure).__name__
            failed = {"stage": self.stage, "kind": kind, "code": code, "message": str(self.failure)}
        facts = {key: value for key, value in asdict(self.state).items() if key not in ("running", "stage", "error")}
        return {
            "profile": self.profile,
            "ranks": self.ranks,
            "seconds": round(self.seconds, 1),
            **facts,
            "failed": failed,
            "folder": self.folder,
        }


def rehearsal_folder(root: Path, profile: str) -> Path:
    """Return the folder of a profile's rehearsals; it holds their lock and, while one runs, its workspace."""
    return root / ".work" / "rehearse" / profile


def rehearse(
    root: Path, profile: str | None, *, planned_ranks: int | None, keep: bool, write_line: Callable[[str], None]
) -> RehearsalResult:
    """Run the whole pipeline of a profile on a few records, in a folder of its own.

    Args:
        root: The real workspace, which is only read.
        profile: The profile; None: the selected one.
        planned_ranks: Ranks of the real run, for its plan; None: those of this machine, or that the profile states.
        keep: Keep the folder although nothing failed.
        write_line: Receives each line for the terminal.

    Raises:
        ConfigError: params.yaml is invalid, or the folder cannot be written.
        TemporaryError: A rehearsal of this profile runs already.
    """
    began = time.monotonic()
    root = root.resolve()
    name, _ = load_profile(root / "params.yaml", profile)
    ranks = count_rehearsal_ranks()
    outer = rehearsal_folder(root, name)
    folder = outer / "workspace"
    with workspace_lock(outer, command="ropeway rehearse", profile=name) as held:
        _make_empty(folder)
        request = RehearsalRequest(str(root), name, Workspace(root, name).registry_url, ranks, planned_ranks)
        write_json(folder / ".work" / REQUEST, asdict(request))
        code, lines = _run(folder, held, write_line)
        state = read_state(folder / ".work" / STATE)
        failure = _explain(state, code, lines, log_path(folder, _STEP)) if code else None
        kept = keep or failure is not None
        if not kept:
            shutil.rmtree(folder)
    place = str(folder) if kept else None
    return RehearsalResult(name, ranks, time.monotonic() - began, state, failure, state.stage, place)


def _make_empty(folder: Path) -> None:
    """Make an empty workspace; raise ConfigError if a left one cannot be removed, or a new one not be written."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
        (folder / ".work").mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: the rehearsal's workspace cannot be made ({error.strerror}: {error.filename}). Remove the "
            "folder, or make it writable for this user"
        ) from error


def count_rehearsal_ranks() -> int:
    """Return the ranks of a rehearsal: the real run's on this machine, at most one for each GPU; 2 on a CPU."""
    gpus = len(list_gpus())
    return min(count_local_ranks(os.environ, count_ranks()), gpus) if gpus else CPU_RANKS


def read_request(folder: Path) -> RehearsalRequest:
    """Return the request in a rehearsal's workspace."""
    return RehearsalRequest(**json.loads((folder / ".work" / REQUEST).read_bytes()))


def _run(folder: Path, held: HeldLock, write_line: Callable[[str], None]) -> tuple[int, list[str]]:
    device = {} if list_gpus() else {"DS_ACCELERATOR": "cpu"}
    site = Site(folder, HeldLock(held.handle, {**held.environment, **device}))
    command = [sys.executable, "-m", "ropeway.cli.main", "execute-rehearsal", str(folder)]

    def show(line: str) -> None:
        if line.startswith(MARK):
            write_line(line.removeprefix(MARK))

    with suppress(OSError):
        (folder / ".work" / STATE).unlink(missing_ok=True)
    return run_command(site, _STEP, command, show)


def _explain(state: RehearsalState, code: int, lines: list[str], log: Path) -> RopewayError:
    """Return the error that a real run would have ended with."""
    error = state.error or {"kind": "", "code": code, "message": ""}
    kind = _NAMED.get(str(error["kind"])) or error_class(int(error["code"]))
    where = f"stage {state.stage} of a real run" if state.stage else "the rehearsal"
    if error["message"]:
        return kind(f"{where} would fail: {error['message']}\n  full log: {log}")
    how = f"{where} would end with exit code {error['code']}"
    return kind(f"{how}; last lines:\n{last_lines(lines)}\n  full log: {log}")
