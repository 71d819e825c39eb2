"""The whole run, in order: pull, freeze the inputs, plan, each stage of dvc.yaml, publish, push.

DVC decides whether a stage must run; Prefect displays it and retries temporary failures. Nothing here computes anything
and no stage is named here: adding a stage to dvc.yaml changes no Python.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from ropeway.config.addresses import without_secrets
from ropeway.config.edit import borrow_profile, choose_profile
from ropeway.config.frozen import FrozenInputs
from ropeway.config.load_params import load_profile, read_block
from ropeway.config.params import Profile
from ropeway.orchestration import dvc_exchange as exchange
from ropeway.orchestration import dvc_graph as graph
from ropeway.orchestration import run_summary as summary
from ropeway.orchestration.display import RunDisplay, StepResult
from ropeway.orchestration.dvc_recovery import repair, sync_results
from ropeway.orchestration.dvc_stage import LineWriter, Site, quote_lines, retry_while_busy, run_command, update_stage
from ropeway.orchestration.guarded_dvc import COMMAND as DVC
from ropeway.orchestration.publish import Publication, check_publishing, measure_champion, publish_package
from ropeway.orchestration.remote.placement import Placement
from ropeway.orchestration.remote.request import PUBLISH, read_pools
from ropeway.orchestration.revision import Revision, read_revision
from ropeway.orchestration.run_summary import Result
from ropeway.orchestration.stage_process import check_local_base
from ropeway.planning.plan import plan_run
from ropeway.planning.plan_text import outline_plan
from ropeway.registry import Version
from ropeway.runtime.devices import count_ranks
from ropeway.runtime.errors import DataError, RopewayError, error_class
from ropeway.runtime.lock import workspace_lock
from ropeway.runtime.manifest import digest_of
from ropeway.runtime.workspace import Workspace

EXIT_SECONDS = 15.0
_SHOWN = 5  # files in a message
_STATES = {"ran": "Completed", "restored": "Restored", "unchanged": "Unchanged"}
STEPS = ("pull", "freeze_inputs", "make_plan", "rehearse", "run_stages", "publish", "push", "ask_review")
ASKED = ("rehearse",)  # steps that a run has only if it was asked for them


class ExitDeadline:
    """Limits how long this process may take to exit once the run's result, or the error that ended it, is known."""

    def __init__(
        self, *, exits: bool = False, show_result: Callable[[Result, str | None], None] = summary.print_result
    ) -> None:
        """Set a deadline only if `exits`: this process then belongs to the command and may be ended.

        `show_result` prints a run's result and where its page is, once.
        """
        self.show_result = show_result
        self._exits = exits
        self._printing = threading.Lock()
        self._printed = self._started = False

    def start(self, code: int, show: Callable[[], None]) -> None:
        """End this process with exit code `code` in 15 seconds, unless it has exited by then.

        Its children end with it: servers and stages have supervisors that watch this process, and its lock is a flock.
        `show` prints the result or the error, unless `show_once` printed it before.
        """
        if self._started or not self._exits:
            return
        self._started = True
        timer = threading.Timer(EXIT_SECONDS, self._end, (code, show))
        timer.daemon = True  # and still running while the interpreter waits at exit
        timer.start()

    def show_once(self, show: Callable[[], None]) -> None:
        """Print the result, unless it was printed before."""
        with self._printing:
            if not self._printed:
                self._printed = True
                show()

    def _end(self, code: int, show: Callable[[], None]) -> None:
        self.show_once(show)
        print(
            f"the Prefect server did not record the end of this run within {EXIT_SECONDS:g} s; its page may still "
            "show the run as running. The result above is complete",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(code)


def run_retrain(
    root: Path,
    profile: str | None = None,
    *,
    use_prefect: bool = True,
    rehearse: bool = False,
    ending: ExitDeadline | None = None,
) -> Result:
    """Run the stages that are out of date, publish a new package, and print the result.

    The default profile is the one in the line `profile:` of params.yaml; another profile is written there. `rehearse`:
    run the pipeline on a few records first, and end if that fails.

    Raises:
        RopewayError: See its subclasses. Fix the cause and run again: completed stages do not run again.
        SystemExit: 143, after SIGTERM, once every process of the run has ended.
    """
    root, ending = root.resolve(), ending or ExitDeadline()
    name, chosen = load_profile(root / "params.yaml", profile)  # fail at once, not after an hour
    check_local_base(root, chosen)  # before Prefect's server starts
    with _exit_on_sigterm():
        if use_prefect:
            return _run_on_prefect(root, name, ending, rehearse=rehearse)
        print("running without Prefect: tasks that you added to flows/retrain.py do not run", flush=True)
        result = run_sequence(root, name, RunDisplay(), rehearse=rehearse)
        ending.show_result(result, None)
        return result


class PipelineRun:
    """One run of a workspace; its methods are called in the order of `STEPS`.

    flows/retrain.py calls them under Prefect, `run_sequence` without.
    """

    def __init__(self, root: Path, profile: str | None, display: RunDisplay, *, served: bool = False) -> None:
        """Prepare the run; hold `lock` from `pull` to the end. `served`: `profile:` of params.yaml is put back then."""
        self.name, _ = load_profile(root / "params.yaml", profile)
        self.root, self.display = root, display
        self.workspace = Workspace(root, self.name)
        self._select = borrow_profile if served else _select_profile
        self._began = time.monotonic()
        self._ended: dict[str, str] = {}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the workspace lock."""
        with (
            workspace_lock(self.root, command="ropeway run", profile=self.name) as held,
            self._select(self.root, self.name),
        ):
            _repair(self.root)
            self._shared = graph.has_remote(self.root)
            self._site = Site(self.root, held, definition=graph.read_definition(self.root))
            self._placement = self._place()
            yield

    def _place(self) -> Placement | None:
        """Return which stages are in work pools; None if all run here."""
        names = [stage.name for stage in graph.load_graph(self.root) if not stage.refreshes]
        if not (pools := read_pools(os.environ, names)):
            return None
        caller = self.display.open_pools(pools.values())
        placement = Placement.check(pools, self._site, self.name, caller, read_revision(self.root, self.name))
        print(f"in work pools: {', '.join(f'{step} in {pool}' for step, pool in pools.items())}", flush=True)
        return placement

    def pull(self) -> None:
        """Pull outputs and run-cache from the DVC remote, if one is configured."""
        if self._shared:
            _step(self.display, "pull", self._pull)

    def freeze_inputs(self) -> None:
        """Copy all params and take fingerprints of all inputs; stages read these copies."""
        self._revision = _freeze(self.display, self._site)
        self._frozen = FrozenInputs.load(self.root)
        self._params = load_profile(self._frozen.params_file, self.name)[1]

    def make_plan(self) -> None:
        """Ask DVC which stages must run, and show what they will need."""
        elsewhere = self._placement.pools if self._placement else {}
        self._plans = retry_while_busy(partial(graph.plan, self.root, elsewhere=elsewhere), print)
        _show_plan(self.display, self._plans)
        if any(plan.will_run for plan in self._plans if not plan.refreshes):
            if PUBLISH not in elsewhere:
                check_publishing(self.workspace)
            _show_budget(self.display, self.workspace, self._params)
            if self._revision.dirty:
                more = len(self._revision.dirty) - _SHOWN
                print(
                    f"uncommitted: {', '.join(self._revision.dirty[:_SHOWN])}"
                    f"{f' and {more} more' if more > 0 else ''}; the version can be registered, but not "
                    "approved for production. Commit before a run that is to be approved",
                    flush=True,
                )

    def rehearse(self) -> None:
        """Run the pipeline on a few records first, if a stage that takes long will run.

        Raises:
            RopewayError: What the real run would have ended with; its class is that of the rehearsal's failure.
        """
        if any(plan.will_run for plan in self._plans if not plan.refreshes):
            _step(self.display, "rehearse", self._rehearse)

    def run_stages(self) -> None:
        """Update each stage of dvc.yaml, in the graph's order."""
        ledger = before = summary.read_ledger(self.workspace)
        for plan in self._plans:
            if plan.refreshes:
                self._ended[plan.name] = "Unchanged"
            else:
                update = partial(_update, self._placement) if plan.will_run else _skip
                work = partial(update, self._site, plan, dict(self._ended))
                self._ended[plan.name] = _step(self.display, plan.name, work, after=plan.parents).state
                ledger = _show_ledger(self.display, self.workspace, known=ledger)
        if ledger == before:
            _show_ledger(self.display, self.workspace, known=[])

    def publish(self) -> None:
        """Register the package as a version, and move `candidate` if the gate passes."""
        read = {dep for plan in self._plans for dep in plan.deps}
        _step(
            self.display, "publish", self._publish, after=[plan.name for plan in self._plans if plan.name not in read]
        )

    def push(self) -> None:
        """Push outputs and run-cache to the DVC remote, if one is configured."""
        if self._shared:
            _step(self.display, "push", self._push, after=["publish"])

    def ask_review(self) -> None:
        """Start the review of a published version, if the review deployment is served."""
        published = self._publication.state == "Published"
        verdict = self._publication.verdict
        if verdict and verdict.needs_person:
            words = "; ".join(verdict.needs_person)
            self.display.report_drift(self._publication.version, self._publication.digest, words)
        review = self.display.ask_review(self._publication.digest) if published else None
        self.result = replace(self._result(), review=review)
        self.display.report("result", summary.draw_report(self.result))
        is_new = self._publication.state != "Unchanged" or not self.workspace.history.is_file()
        if is_new and (text := summary.write_history(self.workspace)):
            self.display.report("history", text)

    def _pull(self, write_line: LineWriter) -> StepResult:
        # A missing output is produced here, so an incomplete or unreachable remote does not stop the run.
        only = self._placement.small_outputs() if self._placement else []  # folders when a stage here reads them
        if self._placement and not only:
            self._site = replace(self._site, pulls=True)
            return StepResult("Completed", "dvc.lock names nothing to pull")
        code, _ = run_command(self._site, "pull", [*DVC, "pull", "--run-cache", "--allow-missing", *only], write_line)
        self._site = replace(self._site, pulls=not code)
        return StepResult(
            "Completed",
            "the remote did not return every output; missing ones are produced here"
            if code
            else "pulled from the remote",
        )

    def _rehearse(self, write_line: LineWriter) -> StepResult:
        command = [sys.executable, "-m", "ropeway.cli.main", "rehearse", "--profile", self.name]
        code, lines = run_command(self._site, "rehearse", command, write_line)
        if code:
            quote = quote_lines(lines)
            raise error_class(code)(
                f"the rehearsal failed with exit code {code}, so no stage was started; last lines:\n{quote}"
            )
        return StepResult("Completed", "every stage ended on a few records")

    def _publish(self, write_line: LineWriter) -> StepResult:
        done = self._publication = self._publish_where_placed(write_line)
        if not self._shared:  # no later step can fail
            self.display.finish(self._result())
        return StepResult(done.state, done.words)

    def _publish_where_placed(self, write_line: LineWriter) -> Publication:
        seconds = time.monotonic() - self._began
        parts = (self.workspace.package, self.workspace.pages)
        paths = [path.relative_to(self.root).as_posix() for path in parts]
        if self._placement:
            made = {path for outs in exchange.outputs(self.root).values() for path in outs}
            paths = [path for path in paths if path in made]
            if PUBLISH in self._placement.pools:
                return self._placement.publish(paths, seconds, write_line)
            self._placement.fetch_inputs(paths, write_line)
        measure = partial(self._measure_champion, write_line=write_line)
        done = publish_package(self.workspace, self._params, self._revision, measure, run_seconds=seconds)
        for line in str(done.verdict).splitlines() if done.verdict else ():
            write_line(line)
        return done

    def _measure_champion(
        self, champion: Version, sections: Mapping[str, str], write_line: LineWriter
    ) -> Mapping[str, object] | None:
        if self._placement:
            self._placement.fetch_inputs(exchange.inputs(self.root, "evaluate"), write_line)
        return measure_champion(self._site, self.workspace, champion, sections, write_line)

    def _push(self, write_line: LineWriter) -> StepResult:
        code, _ = run_command(self._site, "push", [*DVC, "push", "--run-cache"], write_line)
        self.display.finish(self._result())
        failed, words = "the push is INCOMPLETE; run `dvc push` again", "outputs and run-cache are on the remote"
        return StepResult("Completed", failed if code else words)

    def _result(self) -> Result:
        seconds, edits = time.monotonic() - self._began, self._frozen.edited_params(self.root)
        return Result(self.workspace, self._ended, self._publication, seconds, None, edits)


@contextmanager
def _select_profile(root: Path, name: str) -> Iterator[None]:
    choose_profile(root, name)
    yield


def run_sequence(root: Path, profile: str, display: RunDisplay, *, rehearse: bool = False) -> Result:
    """Run every step without Prefect."""
    run = PipelineRun(root, profile, display)
    with run.lock():
        for step in STEPS:
            if rehearse or step not in ASKED:
                getattr(run, step)()
    return run.result


def describe_run(root: Path, profile: str) -> tuple[str, list[str]]:
    """Return a flow run's name and tags: profile, digest of its params, git revision."""
    revision = read_revision(root, profile)
    params = digest_of(without_secrets(read_block(root / "params.yaml", profile)))[:7]
    tags = [f"profile:{profile}", f"params:{params}", f"git:{str(revision).removesuffix('+')}"]
    return f"{profile}-{params}-{revision}", [*tags, *(["dirty"] if revision.dirty else [])]


def _step(
    display: RunDisplay, name: str, work: Callable[[LineWriter], StepResult], *, after: Sequence[str] = ()
) -> StepResult:
    """Run one step, shown in the terminal and by `display`."""
    began = time.monotonic()

    def printed(record: LineWriter) -> StepResult:
        def write_line(line: str) -> None:
            print(f"  {line}", flush=True)
            record(line)

        return work(write_line)

    done = display.step(name, printed, after=after)
    seconds = time.monotonic() - began
    print(f"{name}: {done.state}, {done.words}" + (f" ({seconds:.0f} s)" if seconds >= 1 else ""), flush=True)
    return done


def _repair(root: Path) -> None:
    for line in retry_while_busy(partial(repair, root), print):
        print(line, flush=True)


def _freeze(display: RunDisplay, site: Site) -> Revision:
    """Take fingerprints of all inputs; return the git revision they belong to."""
    refreshing = [stage.name for stage in graph.load_graph(site.root) if stage.refreshes]
    while True:
        before = read_revision(site.root)
        for name in refreshing:  # the plan reads what they write; they never count as changed
            _step(display, name, partial(_refresh, site, name))
        if (after := read_revision(site.root)) == before:
            return after
        print(
            f"the git revision changed from {before} to {after} while fingerprints were taken; taking them again",
            flush=True,
        )


def _refresh(site: Site, stage: str, write_line: LineWriter) -> StepResult:
    update_stage(site, stage, write_line)
    return StepResult("Unchanged", "froze params; refreshed fingerprints of code, sources and base")


def _update(
    placement: Placement | None, site: Site, plan: graph.StagePlan, ended: Mapping[str, str], write_line: LineWriter
) -> StepResult:
    why = "; ".join(_past_reasons(plan, ended))
    print(f"{plan.name}: {why or 'no stage before it ran; DVC checks its inputs'}", flush=True)
    if placement and plan.name in placement.pools:
        outcome = placement.run_stage(plan.name, write_line)
    else:
        with placement.inputs_here(plan.name, write_line) if placement else nullcontext():
            outcome = update_stage(site, plan.name, write_line)
            if outcome != "unchanged":
                sync_results(site.root, plan.name, outcome)
    words = {
        "ran": f"ran because {why or 'DVC found its inputs changed'}",
        "restored": "its outputs were in DVC's cache",
        "unchanged": "its inputs are unchanged",
    }
    return StepResult(_STATES[outcome], words[outcome])


def _past_reasons(plan: graph.StagePlan, ended: Mapping[str, str]) -> list[str]:
    """Return the plan's reasons now that the stages before it ended; a stage that was unchanged is no reason."""
    past = {"Completed": "ran", "Restored": "was restored"}
    expected = {f"{name} will run": name for name in plan.deps}
    return [
        f"{expected[reason]} {past[ended[expected[reason]]]}" if reason in expected else reason
        for reason in plan.reasons
        if reason not in expected or ended[expected[reason]] in past
    ]


def _skip(_site: Site, plan: graph.StagePlan, _ended: Mapping[str, str], _write: LineWriter) -> StepResult:
    """Start no process for a stage that the plan finds unchanged."""
    return StepResult("Unchanged", "; ".join(plan.reasons))


def _show_plan(display: RunDisplay, plans: list[graph.StagePlan]) -> None:
    rows = [
        {"stage": plan.name, "will run": "yes" if plan.will_run else "no", "why": "; ".join(plan.reasons)}
        for plan in plans
    ]
    print(summary.draw_table(rows), flush=True)
    if any(plan.will_run for plan in plans):
        print("(a stage that will run is restored instead if DVC's cache has its result)", flush=True)
    display.table("plan", "Stages of this run", rows)


def _show_ledger(display: RunDisplay, workspace: Workspace, *, known: list[dict[str, str]]) -> list[dict[str, str]]:
    """Show the ledger if it differs from `known`; return it."""
    rows = summary.read_ledger(workspace)
    if rows and rows != known:
        display.table("ledger", "Ledger: where every record and token went", rows)
    return rows


def _show_budget(display: RunDisplay, workspace: Workspace, params: Profile) -> None:
    """Show memory, disk and time before anything is spent. Prepare writes unreadable data again."""
    try:
        text = outline_plan(plan_run(workspace, params, ranks=count_ranks()))
    except DataError as error:
        text = f"memory, disk and time are unknown until the data is prepared again: {error}"
    print(text, flush=True)
    display.report("needs", text)


def _run_on_prefect(root: Path, profile: str, ending: ExitDeadline, *, rehearse: bool) -> Result:
    """Return the result, printed."""
    from ropeway.orchestration.prefect_server import apply_settings, await_server, open_server

    apply_settings(root)
    with open_server(root) as url:
        # While a temporary server starts: import Prefect and DVC, and detect a broken dvc.yaml.
        _repair(root)
        from ropeway.orchestration import prefect_adapter

        graph.load_graph(root)
        flow = prefect_adapter.load_flow(root, "retrain")
        await_server(url, root)
        on_end = partial(_arm_deadline, root, ending)
        result, page = prefect_adapter.run_flow(flow, root, profile, url, on_end, rehearse=rehearse)
        ending.show_once(partial(_show_result, root, result, page, ending))
    return result


def _arm_deadline(root: Path, deadline: ExitDeadline, result: Result | BaseException, page: str) -> None:
    """Start the exit deadline: a server that does not answer must not keep this process alive."""
    if isinstance(result, BaseException):
        stated = result.exit_code if isinstance(result, RopewayError) else getattr(result, "code", None)
        code = stated if isinstance(stated, int) else 1
        deadline.start(code, partial(print, f"ropeway: {result}", file=sys.stderr, flush=True))
    else:
        deadline.start(0, partial(_show_result, root, result, page, deadline))


def _show_result(root: Path, result: Result, page: str, ending: ExitDeadline) -> None:
    from ropeway.orchestration.prefect_server import DEFAULT_URL, page_address, persistent_server_url

    there = persistent_server_url(root)  # it may have started or stopped during the run
    address = page_address(there, page) if there else f"make ui, then open {page_address(DEFAULT_URL, page)}"
    ending.show_result(result, address)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that context managers end the child processes."""
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    except SystemExit:
        print("ended by SIGTERM; the same command resumes", flush=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
