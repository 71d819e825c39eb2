"""`ropeway status`: what runs, what ran, what a run would do, the model's versions, server, schedule and disk.

Everything is read from files, process tables and, for at most a second, servers: no lock is taken, nothing is written,
and neither DVC nor Prefect is imported. What a part cannot find out is said in that part; the others are shown anyway.
"""

import base64
import json
import os
import re
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil

from ropeway.config.load_params import load_profile, read_text
from ropeway.orchestration.cleanup import DiskUsage, measure
from ropeway.orchestration.forecast import Forecast, forecast_run
from ropeway.orchestration.prefect_server import page_address, persistent_server_url, read_server_note
from ropeway.registry import Registry
from ropeway.runtime.errors import RopewayError
from ropeway.runtime.lock import read_last_holder
from ropeway.runtime.manifest import Json, json_mapping
from ropeway.runtime.progress import read_last_record
from ropeway.runtime.slurm import JobRecord
from ropeway.runtime.workspace import Workspace, list_by_time

ALIASES = ("candidate", "production")
ANSWER_SECONDS = 1.0  # for all servers together: registry on S3, Prefect
_MAX_RUNS = 5
_DUE = ("AwaitingConcurrencySlot", "Late")
_STAGE_RECORD = re.compile(r"(.+)\.(?:dvc|exit)\.json")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that needs action: a part of the status, what is wrong, and the command that fixes it."""

    about: str
    words: str
    fix: str


@dataclass(frozen=True, slots=True)
class RunningWork:
    """A command that holds the workspace, and the stage that it runs.

    Attributes:
        holds: Whether the process `pid` lives; if not, it was killed and its stages are still saving.
        step: What the stage has done, from its latest progress record; None if it wrote none yet.
        unit: What `step` and `total_steps` count; None: optimizer steps.
        eta_seconds: Remaining seconds of the stage, from that record.
        pool: The work pool in which the stage runs; None: here.
        worker: The host of its worker; None if no worker has begun.
        sign_seconds: Since the worker's last sign of life that the run saw.
    """

    pid: int
    command: str
    profile: str
    seconds: float
    holds: bool
    stage: str | None = None
    stage_seconds: float | None = None
    step: int | None = None
    total_steps: int | None = None
    unit: str | None = None
    eta_seconds: float | None = None
    pool: str | None = None
    worker: str | None = None
    sign_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class StageEnd:
    """How the stage that ran last ended: exit code, signal, why it was stopped; all None after a kill."""

    stage: str
    code: int | None
    signal: str | None
    at: str
    why: str | None = None
    pool: str | None = None  # the work pool in which it may still run, since the run that called it was killed


@dataclass(frozen=True, slots=True)
class PastRun:
    """A folder of `runs/`: its last complete results. Losses are means over sources in nats/token."""

    profile: str
    at: str
    packaged: bool
    steps: int | None
    base_loss: float | None
    tuned_loss: float | None


@dataclass(frozen=True, slots=True)
class AliasTarget:
    """The version that an alias of the profile's model points to, and the event that moved it."""

    alias: str
    version: str
    digest: str
    at: str
    by: str
    reason: str
    identity: str = "claimed"


@dataclass(frozen=True, slots=True)
class FlowRun:
    """A flow run that the Prefect server knows."""

    name: str
    state: str
    at: str
    page: str


@dataclass(frozen=True, slots=True)
class Schedule:
    """A deployment on the Prefect server: its status there and its cron expressions, those that are active."""

    deployment: str
    ready: bool
    cron: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PrefectView:
    """What the Prefect server says."""

    url: str
    runs: tuple[FlowRun, ...]
    schedules: tuple[Schedule, ...]


@dataclass(frozen=True, slots=True)
class WorkspaceStatus:
    """Everything that `ropeway status` shows. A part that could not be read is None, with a problem that says why.

    Attributes:
        slurm: The Slurm job that stage `train` submitted, as its start last saw it; None if there is none.
    """

    root: str
    profile: str | None
    running: RunningWork | None
    slurm: JobRecord | None
    last_end: StageEnd | None
    runs: tuple[PastRun, ...]
    forecast: Forecast | None
    versions: tuple[AliasTarget, ...] | None
    registry: str
    prefect: PrefectView | None
    disk: tuple[DiskUsage, ...] | None
    free_bytes: int
    problems: tuple[Problem, ...]


def read_status(root: Path, profile: str | None = None) -> WorkspaceStatus:
    """Return the status of a workspace for a profile, by default the one that params.yaml names."""
    root = root.resolve()
    problems: list[Problem] = []
    name = _choose_profile(root, profile, problems)
    asked = time.monotonic()
    registry = Workspace(root, "").registry_url
    versions = _Background(lambda: _read_versions(registry, name) if name else None)
    prefect = _Background(lambda: _ask_prefect(root))
    disk = _Background(lambda: tuple(measure(root)))
    running = read_running(root)
    forecast = None
    if name and not any(problem.about == "params" for problem in problems):
        try:
            forecast = forecast_run(root, name)
        except RopewayError as error:
            problems.append(Problem("next run", str(error), "ropeway doctor"))
    end = asked + ANSWER_SECONDS
    return WorkspaceStatus(
        root=str(root),
        profile=name,
        running=running,
        slurm=_read_slurm_job(root, problems),
        last_end=None if running else read_last_end(root),
        runs=tuple(_read_runs(root)),
        forecast=forecast,
        versions=versions.take(end, "versions", "ropeway registry list", problems),
        registry=registry,
        prefect=prefect.take(end, "server", "ropeway doctor", problems),
        disk=disk.take(end, "disk", "ropeway clean", problems),
        free_bytes=shutil.disk_usage(root).free,
        problems=tuple(problems),
    )


def _read_slurm_job(root: Path, problems: list[Problem]) -> JobRecord | None:
    try:
        return JobRecord.read(root)
    except RopewayError as error:
        problems.append(Problem("slurm", str(error), "squeue --me"))
        return None


def _choose_profile(root: Path, profile: str | None, problems: list[Problem]) -> str | None:
    """Return the profile's name; if params.yaml is invalid, the name that its line `profile:` has."""
    try:
        return load_profile(root / "params.yaml", profile)[0]
    except RopewayError as error:
        fix = "git diff params.yaml" if (root / "params.yaml").is_file() else "cd CLONE"
        if profile is not None:
            fix = "ropeway status"
        problems.append(Problem("params", str(error), fix))
    with suppress(RopewayError):
        found = re.search(r"(?m)^profile:\s*([A-Za-z0-9._-]+)", read_text(root / "params.yaml"))
        return profile or (found[1] if found else None)
    return profile


class _Background(Generic[T]):
    """A part that may take long, computed in a thread that this process does not wait for at its end."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self._found: list[T] = []
        self._error: Exception | None = None
        self._compute = compute
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found.append(self._compute())
        except Exception as error:  # noqa: BLE001 - the other parts are shown whatever happens here
            self._error = error

    def take(self, deadline: float, about: str, command: str, problems: list[Problem]) -> T | None:
        """Return the part if it is there by the deadline; else None, and a problem with the command that waits."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._found:
            return self._found[0]
        words = str(self._error) if self._error else f"not known after {ANSWER_SECONDS:g} s"
        problems.append(Problem(about, words, command))
        return None


def read_running(root: Path) -> RunningWork | None:
    """Return the command that holds the workspace; None if nothing runs."""
    holder = read_last_holder(root)
    if holder is None:
        return None
    stages = find_stages(root)
    if not holder.holds and not stages:
        return None
    now, seconds = time.time(), 0.0
    with suppress(ValueError):
        seconds = max(0.0, now - datetime.fromisoformat(holder.since).timestamp())  # the clock can have been set
    facts: dict[str, Any] = {}
    name = next(
        iter(stages), holder.command.removeprefix("ropeway stage ") if "ropeway stage" in holder.command else None
    )
    if name:
        began = stages.get(name, now - seconds)
        facts = {"stage": name, "stage_seconds": max(0.0, now - began), **_read_progress(root, name, began, now)}
        facts |= _read_call(root, name, now)
    return RunningWork(holder.pid, holder.command, holder.profile, seconds, holder.holds, **facts)


def _read_call(root: Path, stage: str, now: float) -> dict[str, Any]:
    """Return pool, worker and age of its last sign of life of a stage that a run follows in a work pool."""
    called = _read(Workspace(root, "").work / f"{stage}.pool.json")
    if not called:
        return {}
    at = _timestamp(called.get("sign_at"))
    seconds = None if at is None else max(0.0, now - at)
    return {"pool": called.get("pool"), "worker": called.get("worker"), "sign_seconds": seconds}


def _timestamp(text: object) -> float | None:
    with suppress(ValueError):
        return datetime.fromisoformat(text).timestamp() if isinstance(text, str) else None
    return None


def _read_progress(root: Path, stage: str, began: float, now: float) -> dict[str, Any]:
    path = Workspace(root, "").progress(stage)
    record = read_last_record(path)
    with suppress(OSError):
        written = path.stat().st_mtime
        if record and written >= began:  # else of an earlier start
            eta = record.get("eta_seconds")
            left = None if eta is None else max(0.0, eta - (now - written))
            counts = {key: record.get(key) for key in ("step", "total_steps", "unit")}
            return {**counts, "eta_seconds": left}
    return {}


def find_stages(root: Path) -> dict[str, float]:
    """Return the stages that run here under a supervisor, or that a run here follows in a work pool, and since when."""
    work = Workspace(root, "").work
    found: dict[str, float] = {}
    for process in psutil.process_iter(["cmdline", "create_time"]):
        words = process.info["cmdline"] or []
        if "ropeway.runtime.supervise" in words and "--record" in words[:-1]:
            record = Path(words[words.index("--record") + 1])
            if record.parent == work and (match := _STAGE_RECORD.fullmatch(record.name)):
                found[match[1]] = process.info["create_time"]
    holder = read_last_holder(root)
    for path in list_by_time(work, "*.pool.json") if holder and holder.holds else ():
        found[path.name.split(".")[0]] = _called_at(path)
    return found


def _called_at(path: Path) -> float:
    """Return when a stage was called in a work pool; the file is written again while the stage runs."""
    since = _timestamp(_read(path).get("since"))
    return path.stat().st_mtime if since is None else since


def read_last_end(root: Path) -> StageEnd | None:
    """Return how the stage that ran last ended; a log without an exit record is that of a killed stage."""
    work = Workspace(root, "").work
    logs = list_by_time(work / "logs", "*.log")
    records = list_by_time(work, "*.exit.json")
    if called := list_by_time(work, "*.pool.json"):
        at = datetime.fromtimestamp(_called_at(called[-1]), UTC).isoformat(timespec="seconds")
        return StageEnd(called[-1].name.split(".")[0], None, None, at, pool=str(_read(called[-1]).get("pool")))
    if logs and not (work / f"{logs[-1].stem}.dvc.json").is_file():
        at = datetime.fromtimestamp(logs[-1].stat().st_mtime, UTC).isoformat(timespec="seconds")
        return StageEnd(logs[-1].stem, None, None, at)
    if not records:
        return None
    record = json_mapping(records[-1].read_bytes())
    code, signal = record.get("code"), record.get("signal")
    written = datetime.fromtimestamp(records[-1].stat().st_mtime, UTC).isoformat(timespec="seconds")
    at, stated = str(record.get("at") or written), code if isinstance(code, int) else None
    return StageEnd(records[-1].name.split(".")[0], stated, signal, at, record.get("why"))


def _read_runs(root: Path) -> list[PastRun]:
    """Return the newest runs of `runs/`, newest first."""
    found = []
    for folder in (root / "runs").glob("*"):
        workspace = Workspace(root, folder.name)
        files = [workspace.package / "manifest.json", workspace.evaluation, workspace.train_metrics, workspace.ledger]
        newest = next((path for path in files if path.is_file()), None)
        if newest is None:
            continue
        at = datetime.fromtimestamp(newest.stat().st_mtime, UTC).isoformat(timespec="seconds")
        mean = _read(workspace.evaluation).get("mean") or {}
        steps = _read(workspace.train_metrics).get("steps")
        found.append(PastRun(folder.name, at, files[0].is_file(), steps, mean.get("base"), mean.get("tuned")))
    return sorted(found, key=lambda run: run.at, reverse=True)[:_MAX_RUNS]


def _read(path: Path) -> Json:
    try:
        return json_mapping(path.read_bytes())
    except OSError:
        return {}


def _read_versions(url: str, model: str) -> tuple[AliasTarget, ...]:
    """Return what `candidate` and `production` of a model point to; those that exist."""
    artifact = Registry.open(url).artifact(model)
    found = []
    for alias in ALIASES:
        for last in artifact.describe_history(alias, limit=1).events:
            number = f"v{last['version']}" if last["version"] else last["digest"][:12]
            version = f"{model}@{number}"
            identity = str(last.get("identity") or "claimed")  # older events have none
            found.append(AliasTarget(alias, version, last["digest"], last["at"], last["by"], last["reason"], identity))
    return tuple(found)


def _ask_prefect(root: Path) -> PrefectView | None:
    """Return what the Prefect server says; None if none runs.

    Raises:
        OSError: It does not answer, or refuses.
    """
    url = persistent_server_url(root)
    if not url and (noted := read_server_note(root)):
        raise ConnectionError(f"{page_address(noted)} does not answer: `ropeway server` is starting, or busy")
    if not url:
        return None
    # A schedule has a hundred future runs; those that wait for another run, or are late, count.
    begun = {"state": {"operator": "or_", "type": {"not_any_": ["SCHEDULED"]}, "name": {"any_": list(_DUE)}}}
    wanted = {"flow_runs": begun, "limit": _MAX_RUNS, "sort": "EXPECTED_START_TIME_DESC"}
    runs = _post(url, "flow_runs/filter", wanted)
    deployments = _post(url, "deployments/filter", {"limit": 50})
    return PrefectView(
        url,
        tuple(
            FlowRun(
                run["name"],
                str((run.get("state") or {}).get("name")),
                str(run.get("start_time") or run.get("expected_start_time") or ""),
                page_address(url, f"/runs/flow-run/{run['id']}"),
            )
            for run in runs
        ),
        tuple(
            Schedule(each["name"], each.get("status") == "READY" and not each.get("paused"), _active_crons(each))
            for each in deployments
        ),
    )


def _active_crons(deployment: Json) -> tuple[str, ...]:
    schedules = [one for one in deployment.get("schedules") or [] if one.get("active")]
    return tuple(str((one.get("schedule") or {}).get("cron") or "other") for one in schedules)


def _post(url: str, path: str, body: Json) -> list[Json]:
    """Return the list with which the API answers. Not Prefect's client, whose import takes more than a second."""
    request = urllib.request.Request(  # noqa: S310 - the address of the user's own server
        f"{url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    password = os.environ.get("PREFECT_API_AUTH_STRING") or os.environ.get("PREFECT_SERVER_API_AUTH_STRING")
    if password:
        request.add_header("Authorization", f"Basic {base64.b64encode(password.encode()).decode()}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=ANSWER_SECONDS) as answer:
        found = json.load(answer)
    return found if isinstance(found, list) else []
