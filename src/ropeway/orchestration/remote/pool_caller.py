"""Calls a stage in a Prefect work pool: starts its flow run, passes its lines on, cancels it, returns its result."""

import json
import math
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
    LogFilterTimestamp,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import LogSort
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelling, Crashed

from ropeway.orchestration.dvc_stage import LineWriter, StageStoppedError, progress_path, quote_lines
from ropeway.orchestration.remote.pool_flow import ENTRYPOINT, FLOW, RESULT, SIGN_OF_LIFE
from ropeway.orchestration.remote.request import StageRequest
from ropeway.runtime.errors import ConfigError, TemporaryError, error_class
from ropeway.runtime.grace import LEAST_SECONDS
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.manifest import Json, write_json
from ropeway.runtime.progress import LiveLine
from ropeway.runtime.stage_log import file_name, log_path, open_log
from ropeway.runtime.workspace import Workspace

SILENCE = "ROPEWAY_WORKER_SILENCE_SECONDS"
_SILENT_SECONDS = 90.0  # 30 signs of life
_POLL_SECONDS = 1.0
_WAITING_SECONDS = 60.0  # how often a call that waits for a worker says why
_CANCEL_SECONDS = LEAST_SECONDS + 60.0
_LINES = 200  # of one request; the server's limit
_OVERLAP = timedelta(seconds=5)  # lines of one flow run can arrive out of order
_HEARTBEAT = {"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", "DO_NOT_TRACK": "1"}}


@dataclass(frozen=True, slots=True)
class PoolCaller:
    """Calls stages of one workspace in work pools of the server that `PREFECT_API_URL` names."""

    root: Path

    @classmethod
    def open(cls, root: Path, pools: Collection[str]) -> "PoolCaller":
        """Return a caller; raise ConfigError if a pool does not exist."""
        with get_client(sync_client=True) as client:
            for pool in sorted(set(pools)):
                try:
                    client.read_work_pool(pool)
                except ObjectNotFound:
                    raise ConfigError(
                        f"the Prefect server has no work pool '{pool}'. Create it: `prefect work-pool create {pool} "
                        f"--type process`, and start a worker: `prefect worker start --pool {pool}`"
                    ) from None
        return cls(root)

    def call(self, pool: str, request: StageRequest, write_line: LineWriter) -> Json:
        """Execute a request in a pool and return its result; continue one that an earlier, killed run started.

        If this process is interrupted, the request is cancelled first: its stage saves a checkpoint and ends.

        Raises:
            ConfigError, DataError, RopewayError: As the stage on the worker.
            TemporaryError: The stage can be repeated, or its worker stopped giving signs of life.
            StageStoppedError: The flow run was cancelled by a person.
        """
        with get_client(sync_client=True) as client:
            run, attempt = _start(client, pool, request)
            how = "started" if run.state is None or run.state.type == StateType.SCHEDULED else "continuing"
            write_line(f"{how} {run.name or FLOW} in work pool {pool}: flow run {run.id}")
            work = Workspace(self.root, "").work
            called, ended = call_record(self.root, request.step), work / f"{file_name(request.step)}.dvc.json"
            ended.unlink(missing_ok=True)
            follower = _Follower(client, self.root, pool, request.step, run.id, write_line, is_retry=attempt > 0)
            follower.record_call()
            try:
                with follower.opened(), temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
                    final = follower.follow()
            except BaseException:
                _cancel(client, run.id, write_line)
                raise
            finally:
                called.unlink(missing_ok=True)
                write_json(ended, {"pool": pool, "flow_run": str(run.id)})
            result = _read_result(client, run.id, final, request, follower.last_lines)
            if lost := result.get("lost_lines"):
                write_line(f"{lost:,} lines of the worker did not reach the Prefect server; its own log has them")
            return result


def _start(client: SyncPrefectClient, pool: str, request: StageRequest) -> tuple[FlowRun, int]:
    """Return the flow run of a request that has not ended, created if there is none, and how many ended before it."""
    flow = client.create_flow_from_name(FLOW)
    deployment = client.create_deployment(
        flow,
        f"{FLOW}-{pool}",
        entrypoint=ENTRYPOINT,
        work_pool_name=pool,
        tags=["ropeway"],
        enforce_parameter_schema=False,
        job_variables=_HEARTBEAT,
        description="Stages that `ropeway run` places in this pool (ROPEWAY_POOL_*).",
    )
    parameters = {"step": request.step, "profile": request.profile, "request": request.to_json()}
    for attempt in count():
        run = client.create_flow_run_from_deployment(
            deployment,
            parameters=parameters,
            name=f"{request.step}-{request.profile}-{request.commit[:7]}",
            idempotency_key=f"{request.key}-{attempt}",
        )
        if run.state is not None and run.state.type == StateType.CANCELLING:
            _await_end(client, run.id)  # its stage still saves a checkpoint
        elif run.state is None or not run.state.is_final():
            return run, attempt
    raise AssertionError  # `count` does not end


def call_record(root: Path, step: str) -> Path:
    """Return the file that exists while a run of this workspace follows a stage in a work pool."""
    return Workspace(root, "").work / f"{file_name(step)}.pool.json"


@dataclass
class _Follower:
    """Passes on what a flow run prints and how far it is, until it has ended."""

    client: SyncPrefectClient
    root: Path
    pool: str
    step: str
    flow_run: UUID
    write_line: LineWriter
    is_retry: bool
    last_lines: list[str] = field(default_factory=list)
    _seen: dict[UUID, datetime] = field(default_factory=dict)
    _sign: str | None = None
    _sign_at: float = field(default_factory=time.monotonic)
    _said_at: float = field(default_factory=time.monotonic)
    _is_down: bool = False
    _log: Any = None
    _live: LiveLine | None = None
    _since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def record_call(self, worker: str | None = None, sign_at: str | None = None) -> None:
        """Write where the stage is, for `ropeway status`: its worker once that gave a sign of life, and when."""
        facts = {"pool": self.pool, "flow_run": str(self.flow_run), "since": self._since}
        write_json(call_record(self.root, self.step), {**facts, "worker": worker, "sign_at": sign_at})

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep the stage's log and the live line open."""
        path = progress_path(self.root, self.step)
        path.unlink(missing_ok=True)
        self._live = LiveLine(path)
        with open_log(log_path(self.root, self.step), resumes=self.is_retry) as self._log:
            try:
                yield
            finally:
                self._live.erase()

    def follow(self) -> State[Any]:
        """Return the final state.

        Raises:
            TemporaryError: The worker gave no sign of life for 90 seconds.
        """
        while True:
            try:
                state = self.client.read_flow_run(self.flow_run).state
                self._pass_lines()
                self._pass_progress()
            except (httpx.HTTPError, PrefectException) as error:
                self._tell_down(error)
                state = None
            else:
                self._is_down = False
            if state and state.is_final():
                return state
            if state:
                self._check_life(state)
            if self._live:
                self._live.draw()
            time.sleep(_POLL_SECONDS)

    def _pass_lines(self) -> None:
        """Pass on lines that arrived since the last look."""
        after = max(self._seen.values()) - _OVERLAP if self._seen else None
        wanted = LogFilter(
            flow_run_id=LogFilterFlowRunId(any_=[self.flow_run]),
            timestamp=LogFilterTimestamp.model_validate({"after_": after}) if after else None,
        )
        for offset in count(0, _LINES):
            found = self.client.read_logs(wanted, limit=_LINES, offset=offset, sort=LogSort.TIMESTAMP_ASC)
            for each in found:
                if each.id not in self._seen:
                    self._seen[each.id] = each.timestamp
                    if each.name == "ropeway":  # not Prefect's own lines
                        self._pass_line(each.message)
            if len(found) < _LINES:
                break
        if after:
            self._seen = {key: at for key, at in self._seen.items() if at >= after - _OVERLAP}

    def _pass_line(self, line: str) -> None:
        if self._live:
            self._live.erase()
        self.write_line(line)
        self.last_lines = [*self.last_lines, line][-15:]
        if self._log:
            self._log.write(f"{line}\n".encode())
            self._log.flush()

    def _pass_progress(self) -> None:
        found = self.client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[SIGN_OF_LIFE])),
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[self.flow_run])),
        )
        sign = str(found[0].data) if found else None
        if sign == self._sign:
            return
        self._sign, self._sign_at = sign, time.monotonic()
        with suppress(ValueError, AttributeError):
            facts = parse_json((sign or "").strip("`"))
            self.record_call(facts.get("host"), facts.get("at"))
            if record := facts.get("progress"):
                with progress_path(self.root, self.step).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")

    def _check_life(self, state: State[Any]) -> None:
        """Raise TemporaryError if a worker that began is silent; say why a run waits that none began."""
        now = time.monotonic()
        if state.type in (StateType.SCHEDULED, StateType.PENDING):
            self._sign_at = now
            if now - self._said_at >= _WAITING_SECONDS:
                self._said_at = now
                self.write_line(_explain_waiting(self.client, self.pool, state))
            return
        silent = _silent_seconds()
        if now - self._sign_at < silent:
            return
        with suppress(httpx.HTTPError, PrefectException):
            lost: State[Any] = Crashed(message=f"its worker gave no sign of life for {silent:g} s")
            self.client.set_flow_run_state(self.flow_run, lost, force=True)
        raise TemporaryError(
            f"stage {self.step}: the worker in pool {self.pool} gave no sign of life for {silent:g} s ({SILENCE}); its "
            "machine or its network may be down. A retry goes to another worker and resumes from the last checkpoint "
            "that it finds"
        )

    def _tell_down(self, error: Exception) -> None:
        """Say once that the server does not answer; signs of life cannot be seen meanwhile."""
        self._sign_at = time.monotonic()
        if not self._is_down:
            self._is_down = True
            self.write_line(f"the Prefect server does not answer ({type(error).__name__}); the stage goes on, waiting")


def _silent_seconds() -> float:
    stated = os.environ.get(SILENCE, str(_SILENT_SECONDS))
    try:
        seconds = float(stated)
    except ValueError:
        seconds = 0.0
    if not (math.isfinite(seconds) and seconds > 0):
        raise ConfigError(f"{SILENCE}: expected a number of seconds above 0, found {stated!r}")
    return seconds


def _explain_waiting(client: SyncPrefectClient, pool: str, state: State[Any]) -> str:
    """Return why no worker has begun."""
    with suppress(httpx.HTTPError, PrefectException):
        found = client.read_work_pool(pool)
        if found.is_paused:
            return f"waiting: work pool {pool} is paused; resume it in the Prefect UI"
        workers = client.read_workers_for_work_pool(pool)
        online = [each.name for each in workers if str(each.status).upper().endswith("ONLINE")]
        if not online:
            return f"waiting: no worker of pool {pool} is online; start one: `prefect worker start --pool {pool}`"
        limit = "" if found.concurrency_limit is None else f", concurrency limit {found.concurrency_limit}"
        return f"waiting: state {state.name}; {len(online)} workers of pool {pool} are online{limit}"
    return f"waiting: state {state.name}"


def _cancel(client: SyncPrefectClient, flow_run: UUID, write_line: LineWriter) -> None:
    """Cancel a flow run and wait until it ended: its stage saves a checkpoint first."""
    try:
        state = client.read_flow_run(flow_run).state
        if state is None or state.is_final():
            return
        write_line(f"cancelling flow run {flow_run}; its stage saves a checkpoint and ends")
        client.set_flow_run_state(flow_run, Cancelling(), force=state.type == StateType.RUNNING)
        if not _await_end(client, flow_run):
            write_line(f"flow run {flow_run} has not ended after {_CANCEL_SECONDS:g} s; its worker ends it")
    except (httpx.HTTPError, PrefectException) as error:
        write_line(
            f"flow run {flow_run} could not be cancelled ({type(error).__name__}); it goes on. Cancel it in the "
            "Prefect UI, or run the same command again, which continues it"
        )


def _await_end(client: SyncPrefectClient, flow_run: UUID) -> bool:
    """Return whether a flow run that is being cancelled ended in time."""
    until = time.monotonic() + _CANCEL_SECONDS
    while time.monotonic() < until:
        state = client.read_flow_run(flow_run).state
        if state is None or state.is_final():
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _read_result(
    client: SyncPrefectClient, flow_run: UUID, final: State[Any], request: StageRequest, lines: list[str]
) -> Json:
    """Return the result that the worker left; raise the error that it reports."""
    result: Json | None = None
    with suppress(httpx.HTTPError, PrefectException, ValueError):
        result = parse_json(client.read_flow_run_input(flow_run, RESULT))
    if final.type == StateType.CANCELLED:
        raise StageStoppedError(
            f"stage {request.step}: its flow run {flow_run} was cancelled. Run the same command again; it resumes"
        )
    if result is None:
        quote = quote_lines(lines)
        raise TemporaryError(
            f"stage {request.step}: flow run {flow_run} ended as {final.name} without a result ({final.message}); last "
            f"lines:\n{quote}"
        )
    if error := result.get("error"):
        raise error_class(error["exit_code"])(f"on worker {result.get('host', 'of the pool')}: {error['message']}")
    return result
