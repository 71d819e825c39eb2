"""The run on Prefect's pages: one task run per step, for the flow `retrain` of flows/retrain.py.

Tasks are called directly and not submitted: cancelling then takes half a second instead of thirty (measured, 3.9.1).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

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
from prefect.states import Completed
from prefect.tasks import Task

from ropeway.config.load_params import load_profile
from ropeway.orchestration.display import RETRIES, Board, Done, may_retry, retry_seconds
from ropeway.orchestration.dvc_stage import Say, log_path, progress_path
from ropeway.orchestration.prefect_server import outlast_outage, page_address, standing_server
from ropeway.orchestration.run_page import Bar, PageLog, suspended_on_request
from ropeway.orchestration.run_summary import Result
from ropeway.orchestration.sequence import PipelineRun, describe_run
from ropeway.runtime.errors import ConfigError

_FILES = {"rollback": "promote"}  # flow -> its file, where the names differ
_FLUSH_SECONDS = 4.0  # each of three: lines, Prefect's own lines, events


OnEnd = Callable[[Result | BaseException, str], None]
_ON_END: ContextVar[OnEnd] = ContextVar("on_end", default=lambda _result, _page: None)


def load_flow(root: Path, name: str) -> Flow[..., object]:
    """Return a flow of the workspace's own flows/, with what its user added; raise ConfigError if it does not load."""
    path = root / "flows" / f"{_FILES.get(name, name)}.py"
    if not path.is_file():
        raise ConfigError(f"{path}: not there, and it is the run itself. `git checkout flows` restores it")
    try:
        return load_flow_from_entrypoint(f"{path}:{name}", use_placeholder_flow=False)
    except Exception as error:
        raise ConfigError(f"{path}: does not load: {type(error).__name__}: {error}") from error


def run_flow(flow: Flow[..., object], root: Path, profile: str, url: str, on_end: OnEnd) -> tuple[Result, str]:
    """Run a flow against the server at `url`; return its result and the path of its page.

    `on_end` is told the result, or the error that ends the run, and the path of its page, as soon as it is known:
    before the server is told. It may be called more than once.

    Raises:
        RopewayError: What a step raised.
    """
    with temporary_settings({PREFECT_API_URL: url}), tags(*describe_run(root, profile)[1]):
        told = _ON_END.set(on_end)
        try:
            state: State[Result] = flow(str(root), profile, return_state=True)  # type: ignore[assignment]
        finally:
            _ON_END.reset(told)
            # A temporary server ends next: what is still queued here must have reached it.
            APILogWorker.drain_all(timeout=_FLUSH_SECONDS)
            EventsWorker.drain_all(timeout=_FLUSH_SECONDS)
        result: Result = state.result()
        return result, f"/runs/flow-run/{state.state_details.flow_run_id}"


def artifact_prefix(name: str) -> str:
    """Return what the keys of a model's artifacts begin with: Prefect allows a-z, 0-9 and dashes."""
    return re.sub("[^a-z0-9]+", "-", name.lower())


def name_run() -> str:
    """Return the flow run's name: profile, digest of its params, git revision."""
    given = runtime.flow_run.parameters
    root = Path(given["root"]).resolve()
    return describe_run(root, load_profile(root / "params.yaml", given["profile"])[0])[0]


@contextmanager
def open_run(root: str, profile: str | None) -> Iterator[PipelineRun]:
    """Open a run on the page of the flow that calls this; the workspace lock is held inside."""
    print(f"watch it at {_run_address(runtime.flow_run.id)}", flush=True)
    folder = Path(root).resolve()
    name, _ = load_profile(folder / "params.yaml", profile)
    log = PageLog(_api())
    try:
        run = PipelineRun(folder, name, PrefectBoard(artifact_prefix(name), folder, log))
        with suspended_on_request(), run.lock():
            yield run
    except BaseException as error:
        _ON_END.get()(error, _page())
        raise
    finally:
        _tell_missing(log.close(_FLUSH_SECONDS), folder)


def end_state(result: Result) -> State[object]:
    """Return the flow's final state: what became of the model, in words."""
    return Completed(name=result.publication.state, message=result.publication.words, data=result)


def _tell_missing(lines: Mapping[str, int], root: Path) -> None:
    """Say which lines the run's page lacks, and where they are."""
    for step, count in lines.items():
        print(
            f"{step}: the server did not take {count:,} lines, so the run's page lacks them; all are in "
            f"{log_path(root, step)}",
            flush=True,
        )


def _passes(_task: Task[..., object], _run: TaskRun, state: State[object]) -> bool:
    """Return whether a failed task is worth another try."""
    failure = state.result(raise_on_failure=False)
    return isinstance(failure, BaseException) and may_retry(failure)


@task(name="step", cache_policy=NO_CACHE, persist_result=False, retries=RETRIES, retry_condition_fn=_passes)
def _step(step: str, work: Callable[[], Done]) -> object:  # noqa: ARG001 - `step` is shown as its parameter
    done = work()
    # No data: Prefect 3.9.1 draws an edge between tasks whose results share a string, e.g. the word "Completed".
    return Completed(name=done.state, message=done.words)


@dataclass
class PrefectBoard(Board):
    """Shows steps as task runs, whose lines go to `log`, and tables and reports as artifacts with keys of `prefix`."""

    prefix: str
    root: Path
    log: PageLog
    _states: dict[str, State[object]] = field(default_factory=dict)
    _over: bool = False

    def step(self, name: str, work: Callable[[Say], Done], *, after: Sequence[str] = ()) -> Done:
        """Do one step as a task run; its edges are drawn from the states it waits for."""
        run_step = _step.with_options(task_run_name=name, retry_delay_seconds=retry_seconds())
        ended: list[Done] = []

        def keep() -> Done:
            flow_run, task_run = runtime.flow_run.id, runtime.task_run.id

            bar = Bar(progress_path(self.root, name), artifact_prefix(f"{self.prefix}-{name}-progress"), _api())

            def say(line: str) -> None:
                self.log.add(name, line, flow_run=flow_run, task_run=task_run)
                bar.refresh()  # a line is the occasion; nothing is read from it

            try:
                try:
                    ended.append(work(say))
                finally:
                    bar.refresh(last=True)
            except BaseException as error:
                if may_retry(error):
                    outlast_outage(_api())
                else:  # this ends the run, which waits for no server
                    _ON_END.get()(error, _page())
                raise
            if not self._over:
                outlast_outage(_api())  # the step's end is told next
            return ended[-1]

        above = [self._states[other] for other in after if other in self._states]
        outlast_outage(_api())
        state: State[object] = run_step(name, keep, return_state=True, wait_for=above)
        self._states[name] = state
        state.result()  # raises what the step raised
        return ended[-1]

    def over(self, result: Result) -> None:
        """Bound what is left: from here on a server that is away is not waited for."""
        self._over = True
        _ON_END.get()(result, _page())

    def table(self, key: str, title: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Publish a table artifact."""
        outlast_outage(_api())
        with _shown_if_possible(title):
            create_table_artifact(key=f"{self.prefix}-{key}", table=[dict(row) for row in rows], description=title)

    def report(self, key: str, text: str) -> None:
        """Publish a markdown artifact."""
        if not self._over:
            outlast_outage(_api())
        with _shown_if_possible(key):
            create_markdown_artifact(key=f"{self.prefix}-{key}", markdown=text)

    def ask_review(self, digest: str) -> str | None:
        """Start a review's flow run if somebody serves its deployment; return its page."""
        if not standing_server(self.root):
            return None
        with _shown_if_possible("the review"), get_client(sync_client=True) as client:
            try:
                deployment = client.read_deployment_by_name("review/review")
            except ObjectNotFound:
                return None
            if is_served(deployment):
                # Once for a version, whoever repeats the run.
                asked = client.create_flow_run_from_deployment(
                    deployment.id, parameters={"digest": digest}, idempotency_key=f"review-{digest}"
                )
                return _run_address(asked.id)
        return None


@contextmanager
def _shown_if_possible(what: str) -> Iterator[None]:
    """A page is a mirror: one that the server refuses loses no run."""
    try:
        yield
    except (httpx.HTTPError, PrefectException) as error:
        print(
            f"{what}: not on the run's page, the Prefect server refused it ({type(error).__name__}: {error})",
            flush=True,
        )


def _page() -> str:
    return f"/runs/flow-run/{runtime.flow_run.id}"


def _api() -> str:
    return str(PREFECT_API_URL.value())


def _run_address(run: object) -> str:
    return page_address(_api(), f"/runs/flow-run/{run}")


def is_served(deployment: DeploymentResponse) -> bool:
    """Return whether a runner or a worker has asked for its runs lately."""
    return not deployment.paused and deployment.status == DeploymentStatus.READY
