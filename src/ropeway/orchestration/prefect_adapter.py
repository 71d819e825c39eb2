"""Runs the flow `retrain` of flows/retrain.py under Prefect: one task run per step.

Tasks are called directly, not submitted: cancelling then takes 0.5 s instead of 30 s (measured, Prefect 3.9.1).
"""

import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import httpx
from prefect import Flow, runtime, tags, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import DeploymentStatus, State, TaskRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.worker import EventsWorker
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.flows import load_flow_from_entrypoint
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Running
from prefect.tasks import Task

from ropeway.config.load_params import load_profile
from ropeway.orchestration.alerts import report_drift
from ropeway.orchestration.display import RETRIES, RunDisplay, StepResult, may_retry, retry_seconds
from ropeway.orchestration.dvc_stage import LineWriter, progress_path
from ropeway.orchestration.flow_parameters import MAX_TRIGGER, read_profile, read_root, read_switch, read_text
from ropeway.orchestration.prefect_server import await_recovery, page_address, persistent_server_url, prefect_home
from ropeway.orchestration.remote.pool_caller import PoolCaller
from ropeway.orchestration.run_page import PageLog, ProgressArtifact, stop_on_suspend
from ropeway.orchestration.run_queue import WAITING
from ropeway.orchestration.run_summary import Result, print_result
from ropeway.orchestration.sequence import PipelineRun, describe_run
from ropeway.orchestration.source_watcher import CHANGED
from ropeway.reporting.markdown import plain
from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.runtime.lock import is_held, read_last_holder
from ropeway.runtime.stage_log import log_path

_FILES = {"rollback": "promote"}  # flow -> its file, if the names differ
_FREE_SECONDS = 5.0  # between looks at a workspace that another command holds
_FLUSH_SECONDS = 4.0  # for each of: our log lines, Prefect's log lines, events


OnEnd = Callable[[Result | BaseException, str], None]
_ON_END: ContextVar[OnEnd] = ContextVar("on_end", default=lambda _result, _page: None)


def load_flow(root: Path, name: str) -> Flow[..., object]:
    """Return a flow of the workspace's flows/, with tasks that a user added; raise ConfigError if it does not load."""
    path = root / "flows" / f"{_FILES.get(name, name)}.py"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; it defines the flow '{name}'. Run `git checkout flows` to restore it")
    try:
        return load_flow_from_entrypoint(f"{path}:{name}", use_placeholder_flow=False)
    except Exception as error:
        raise ConfigError(
            f"{path} cannot be loaded: {type(error).__name__}: {error}. Correct it, or `git checkout flows`"
        ) from error


def run_flow(
    flow: Flow[..., object], root: Path, profile: str, url: str, on_end: OnEnd, *, rehearse: bool = False
) -> tuple[Result, str]:
    """Run a flow against the server at `url`; return its result and the path of its page.

    `on_end` receives the result, or the error that ended the run, and the path of its page as soon as they are known,
    before the server receives them. It may be called more than once.

    Raises:
        RopewayError: What a step raised.
        TemporaryError: The server failed.
    """
    with _server_failures(url, root), temporary_settings({PREFECT_API_URL: url}), tags(*describe_run(root, profile)[1]):
        token = _ON_END.set(on_end)
        try:
            given = {"rehearse": True} if rehearse else {}  # a flow of an older clone has no such parameter
            state: State[Result] = flow(str(root), profile, **given, return_state=True)  # type: ignore[assignment]
        finally:
            _ON_END.reset(token)
            # A temporary server ends next: flush what is still queued here.
            APILogWorker.drain_all(timeout=_FLUSH_SECONDS)
            EventsWorker.drain_all(timeout=_FLUSH_SECONDS)
        result: Result = state.result()
        return result, f"/runs/flow-run/{state.state_details.flow_run_id}"


@contextmanager
def _server_failures(url: str, root: Path) -> Iterator[None]:
    """Turn a server's failure to record the run into a TemporaryError; errors of the run itself are in its state."""
    try:
        yield
    except httpx.HTTPError as error:
        raise TemporaryError(
            f"the Prefect server at {url} failed ({type(error).__name__}: {str(error).splitlines()[0]}). Check the "
            f"free space of {prefect_home(root)}, or use `ropeway run --no-prefect`. The same command resumes"
        ) from error


def artifact_prefix(name: str) -> str:
    """Return the prefix of a model's artifact keys; Prefect allows a-z, 0-9 and dashes."""
    return re.sub("[^a-z0-9]+", "-", name.lower())


def name_run() -> str:
    """Return the flow run's name: profile, digest of its params, git revision, and which sources started it."""
    given = runtime.flow_run.parameters
    root = read_root(given["root"])
    name = describe_run(root, load_profile(root / "params.yaml", read_profile(given["profile"]))[0])[0]
    changed = [tag.removeprefix(CHANGED) for tag in runtime.flow_run.tags or () if tag.startswith(CHANGED)]
    return f"{name} ({', '.join(changed)} changed)" if changed else name


@contextmanager
def open_run(root: str, profile: str | None) -> Iterator[PipelineRun]:
    """Open a run for the flow run that calls this; the workspace lock is held inside.

    A served run prints its result at its end; `ropeway run` prints it itself.
    """
    print(f"Prefect UI of this run: {_run_address(runtime.flow_run.id)}", flush=True)
    folder = read_root(root)
    name, _ = load_profile(folder / "params.yaml", read_profile(profile))
    given = runtime.flow_run.parameters
    trigger = read_text("trigger", given.get("trigger", ""), is_empty_allowed=True, most=MAX_TRIGGER)
    read_switch("rehearse", given.get("rehearse", False))  # before anything is started
    log = PageLog(_api())
    try:
        display = PrefectDisplay(artifact_prefix(name), folder, log)
        _show_trigger(display, trigger)
        served = bool(runtime.deployment.id)
        run = PipelineRun(folder, name, display, served=served)
        with stop_on_suspend(), _lock_when_free(run, log) if served else run.lock():
            yield run
        if served and (result := getattr(run, "result", None)):  # a user's flow may have no last step
            print_result(result, _run_address(runtime.flow_run.id))
    except BaseException as error:
        _ON_END.get()(error, _page())
        raise
    finally:
        _tell_missing(log.close(_FLUSH_SECONDS), folder)


@contextmanager
def _lock_when_free(run: PipelineRun, log: PageLog) -> Iterator[None]:
    """Hold the run's lock; while another command holds the workspace, show in the run's state whom it waits for."""
    told = ""
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(run.lock())
                break
            except TemporaryError:
                holder = read_last_holder(run.root)
                if holder is None or not is_held(run.root):
                    raise
            words = (
                f"waits for `{holder.command}` of profile {holder.profile or '-'} (pid {holder.pid}), began at "
                f"{holder.since[:16].replace('T', ' ')}"
            )
            if words != told:
                print(words, flush=True)
                log.add("queue", words, flow_run=str(runtime.flow_run.id), task_run=None)
                _show_state(Running(name=WAITING, message=words))
                told = words
            time.sleep(_FREE_SECONDS)
        if told:
            _show_state(Running())
        yield


def _show_state(state: State[object]) -> None:
    with _shown_if_possible("the run's state"), get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID(str(runtime.flow_run.id)), state, force=True)


def _show_trigger(display: "PrefectDisplay", trigger: str) -> None:
    """Print why the run was started, and show it in the log and as an artifact of its page."""
    if trigger:
        print(f"started because {trigger}", flush=True)
        display.log.add("trigger", f"started because {trigger}", flow_run=str(runtime.flow_run.id), task_run=None)
        display.report("trigger", "\n".join(f"- {plain(one)}" for one in trigger.split("; ")))


def end_state(result: Result) -> State[object]:
    """Return the flow's final state: Published, Unchanged or Rejected, with one sentence."""
    return Completed(name=result.publication.state, message=result.publication.words, data=result)


def _tell_missing(lines: Mapping[str, int], root: Path) -> None:
    """Print which lines the run's page lacks, and where they are."""
    for step, count in lines.items():
        print(
            f"{step}: {count:,} log lines did not reach the Prefect server; its page lacks them. Full log: "
            f"{log_path(root, step)}",
            flush=True,
        )


def _may_pass(_task: Task[..., object], _run: TaskRun, state: State[object]) -> bool:
    """Return whether a failed task may be retried."""
    failure = state.result(raise_on_failure=False)
    return isinstance(failure, BaseException) and may_retry(failure)


@task(name="step", cache_policy=NO_CACHE, persist_result=False, retries=RETRIES, retry_condition_fn=_may_pass)
def _step(step: str, work: Callable[[], StepResult]) -> object:  # noqa: ARG001 - `step` is shown as its parameter
    done = work()
    # No data: Prefect 3.9.1 draws an edge between tasks whose results share a string, e.g. the word "Completed".
    return Completed(name=done.state, message=done.words)


@dataclass
class PrefectDisplay(RunDisplay):
    """Displays steps as task runs with their lines in `log`, and tables and reports as artifacts named `prefix-key`."""

    prefix: str
    root: Path
    log: PageLog
    _states: dict[str, State[object]] = field(default_factory=dict)
    _finished: bool = False

    def step(self, name: str, work: Callable[[LineWriter], StepResult], *, after: Sequence[str] = ()) -> StepResult:
        """Run one step as a task run; its parents in the graph are the states it waits for."""
        run_step = _step.with_options(task_run_name=name, retry_delay_seconds=retry_seconds())
        ended: list[StepResult] = []

        def keep() -> StepResult:
            flow_run, task_run = runtime.flow_run.id, runtime.task_run.id

            bar = ProgressArtifact(
                progress_path(self.root, name), artifact_prefix(f"{self.prefix}-{name}-progress"), _api()
            )

            def write_line(line: str) -> None:
                self.log.add(name, line, flow_run=flow_run, task_run=task_run)
                bar.refresh()  # a line only triggers it; the bar reads the progress file

            try:
                try:
                    ended.append(work(write_line))
                finally:
                    bar.refresh(last=True)
            except BaseException as error:
                if may_retry(error):
                    print(f"{name}: {error}", flush=True)
                    self.log.add(name, str(error), flow_run=flow_run, task_run=task_run)
                    await_recovery(_api())
                else:  # this ends the run, which does not wait for the server
                    _ON_END.get()(error, _page())
                raise
            if not self._finished:
                await_recovery(_api())  # the step's final state is sent next
            return ended[-1]

        above = [self._states[other] for other in after if other in self._states]
        await_recovery(_api())
        state: State[object] = run_step(name, keep, return_state=True, wait_for=above)
        self._states[name] = state
        state.result()  # raises what the step raised
        return ended[-1]

    def finish(self, result: Result) -> None:
        """Start the exit deadline; from here on an unreachable server is not waited for."""
        self._finished = True
        _ON_END.get()(result, _page())

    def table(self, key: str, title: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Publish a table artifact."""
        await_recovery(_api())
        with _shown_if_possible(title):
            create_table_artifact(key=f"{self.prefix}-{key}", table=[dict(row) for row in rows], description=title)

    def report(self, key: str, text: str) -> None:
        """Publish a markdown artifact."""
        if not self._finished:
            await_recovery(_api())
        with _shown_if_possible(key):
            create_markdown_artifact(key=f"{self.prefix}-{key}", markdown=text)

    def report_drift(self, version: str, digest: str, words: str) -> None:
        """Record an event, which `ropeway server` posts as an alert."""
        try:
            report_drift(_api(), version=version, digest=digest, words=words, page=page_address(_api(), _page()))
        except TemporaryError as error:
            print(f"the drift of {version} could not be recorded for alerts: {error}", flush=True)

    def open_pools(self, pools: Collection[str]) -> PoolCaller:
        """Return what calls stages in these work pools, which exist on a server that outlives this run."""
        if not persistent_server_url(self.root):
            return super().open_pools(pools)
        return PoolCaller.open(self.root, pools)

    def ask_review(self, digest: str) -> str | None:
        """Start a flow run of the review deployment if it is served; return the URL of its page."""
        if not persistent_server_url(self.root):
            return None
        with _shown_if_possible("the review"), get_client(sync_client=True) as client:
            try:
                deployment = client.read_deployment_by_name("review/review")
            except ObjectNotFound:
                return None
            if is_served(deployment):
                # One review per version, even if the run is repeated.
                review = client.create_flow_run_from_deployment(
                    deployment.id, parameters={"digest": digest}, idempotency_key=f"review-{digest}"
                )
                return _run_address(review.id)
        return None


@contextmanager
def _shown_if_possible(what: str) -> Iterator[None]:
    """Print an error of the Prefect server and continue: the run does not depend on what its page shows."""
    try:
        yield
    except (httpx.HTTPError, PrefectException) as error:
        print(
            f"{what}: the Prefect server refused it, so the run's page lacks it ({type(error).__name__}: {error})",
            flush=True,
        )


def _page() -> str:
    return f"/runs/flow-run/{runtime.flow_run.id}"


def _api() -> str:
    return str(PREFECT_API_URL.value())


def _run_address(run: object) -> str:
    return page_address(_api(), f"/runs/flow-run/{run}")


def is_served(deployment: DeploymentResponse) -> bool:
    """Return whether a runner or worker polled for its runs recently."""
    return not deployment.paused and deployment.status == DeploymentStatus.READY
