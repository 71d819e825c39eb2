"""The whole run, in order: pull, freeze the inputs, plan, each stage of dvc.yaml, publish, push.

DVC decides whether a stage must run, Prefect shows it and tries again what may pass. Nothing here computes anything,
and no stage is named here: adding one to dvc.yaml changes no Python.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from ropeway.config.addresses import without_secrets
from ropeway.config.edit import choose_profile
from ropeway.config.frozen import FrozenInputs
from ropeway.config.load_params import load_profile, read_block
from ropeway.config.params import Profile
from ropeway.orchestration import dvc_graph as graph
from ropeway.orchestration import run_summary as summary
from ropeway.orchestration.display import Board, Done
from ropeway.orchestration.dvc_stage import Say, Site, bring_up, patiently, run_command
from ropeway.orchestration.publish import check_publishing, measure_champion, publish_package
from ropeway.orchestration.revision import Revision, read_revision
from ropeway.orchestration.run_summary import Result
from ropeway.planning.plan import plan_run
from ropeway.planning.plan_text import outline_plan
from ropeway.runtime.devices import count_ranks
from ropeway.runtime.errors import ConfigError, DataError, RopewayError
from ropeway.runtime.lock import workspace_lock
from ropeway.runtime.manifest import digest_of
from ropeway.runtime.workspace import Workspace

END_SECONDS = 15.0
_STATES = {"ran": "Completed", "restored": "Restored", "unchanged": "Unchanged"}
STEPS = ("pull", "freeze_inputs", "make_plan", "run_stages", "publish", "push", "ask_review")


class Ending:
    """What bounds the end of this process once a run's result, or the error that ended it, is known."""

    def __init__(self, *, exits: bool = False) -> None:
        """Say whether this process is the command's own, hence may be ended; else nothing is bounded."""
        self._exits = exits
        self._telling = threading.Lock()
        self._told = self._armed = False

    def arm(self, code: int, tell: Callable[[], None]) -> None:
        """End this process with a code 15 seconds from now, unless it has ended by itself.

        What it started ends with it: servers and stages have supervisors that watch it, and its lock is a flock.

        `tell` prints the result or the error, unless `tell` of this object has done so before.
        """
        if self._armed or not self._exits:
            return
        self._armed = True
        timer = threading.Timer(END_SECONDS, self._end, (code, tell))
        timer.daemon = True  # and still running while the interpreter waits at exit
        timer.start()

    def tell(self, tell: Callable[[], None]) -> None:
        """Print the result, once."""
        with self._telling:
            if not self._told:
                self._told = True
                tell()

    def _end(self, code: int, tell: Callable[[], None]) -> None:
        self.tell(tell)
        print(
            "the Prefect server did not take the end of this run in time; its page may show the run as running",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(code)


def run_retrain(
    root: Path, profile: str | None = None, *, use_prefect: bool = True, ending: Ending | None = None
) -> Result:
    """Bring a workspace's run up to date, publish what is new, and print what came out.

    The profile is by default the one that the line `profile:` of params.yaml names; another one is written there.

    Raises:
        RopewayError: As its subclasses say. Run again after fixing it: what is done is not done again.
        SystemExit: 143, after SIGTERM and once nothing of the run is left.
    """
    root, ending = root.resolve(), ending or Ending()
    name, _ = load_profile(root / "params.yaml", profile)  # fail in the first second, not after the first hour
    with _exit_on_sigterm():
        if use_prefect:
            return _run_on_prefect(root, name, ending)
        print("without Prefect: a task that you added to flows/retrain.py does not run", flush=True)
        result = run_sequence(root, name, Board())
        summary.print_result(result, None)
        return result


class PipelineRun:
    """One run of a workspace, step by step; its methods are called in the order of `STEPS`.

    flows/retrain.py calls them one after the other on Prefect's pages, `run_sequence` without Prefect.
    """

    def __init__(self, root: Path, profile: str | None, board: Board) -> None:
        """Prepare the run; `lock` must be held from `pull` to the end."""
        self.name, _ = load_profile(root / "params.yaml", profile)
        self.root, self.board = root, board
        self.workspace = Workspace(root, self.name)
        self._began = time.monotonic()
        self._ended: dict[str, str] = {}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the workspace lock."""
        with workspace_lock(self.root, command="ropeway run", profile=self.name) as held:
            choose_profile(self.root, self.name)
            _repair(self.root)
            self._shared = graph.has_remote(self.root)
            self._site = Site(self.root, held, definition=graph.read_definition(self.root))
            yield

    def pull(self) -> None:
        """Take what the DVC remote has, if there is one."""
        if self._shared:
            _step(self.board, "pull", self._pull)

    def freeze_inputs(self) -> None:
        """Take the digests of all inputs; stages read these copies."""
        self._revision = _freeze(self.board, self._site)
        self._frozen = FrozenInputs.load(self.root)
        self._params = load_profile(self._frozen.params_file, self.name)[1]

    def make_plan(self) -> None:
        """Ask DVC which stages must run, and say what they will need."""
        self._plans = patiently(partial(graph.plan, self.root), print)
        _show_plan(self.board, self._plans)
        if any(plan.will_run for plan in self._plans if not plan.refreshes):
            check_publishing(self.workspace)
            _show_budget(self.board, self.workspace, self._params)

    def run_stages(self) -> None:
        """Bring each stage of dvc.yaml up to date, in the graph's order."""
        ledger = before = summary.read_ledger(self.workspace)
        for plan in self._plans:
            if plan.refreshes:
                self._ended[plan.name] = "Unchanged"
            else:
                work = partial(_bring_up if plan.will_run else _leave, self._site, plan)
                self._ended[plan.name] = _step(self.board, plan.name, work, after=plan.deps).state
                ledger = _show_ledger(self.board, self.workspace, known=ledger)
        if ledger == before:
            _show_ledger(self.board, self.workspace, known=[])

    def publish(self) -> None:
        """Register the package as a version, and move `candidate` if the gate passes."""
        read = {dep for plan in self._plans for dep in plan.deps}
        _step(self.board, "publish", self._publish, after=[plan.name for plan in self._plans if plan.name not in read])

    def push(self) -> None:
        """Give the DVC remote what this run made, if there is one."""
        if self._shared:
            _step(self.board, "push", self._push, after=["publish"])

    def ask_review(self) -> None:
        """Start the review of a published version, where somebody serves reviews."""
        published = self._publication.state == "Published"
        review = self.board.ask_review(self._publication.digest) if published else None
        self.result = replace(self._result(), review=review)
        self.board.report("result", summary.draw_report(self.result))

    def _pull(self, say: Say) -> Done:
        # What is missing there is made here, so a remote that lacks something, or is away, stops nothing.
        code, _ = run_command(self._site, "pull", ["dvc", "pull", "--run-cache", "--allow-missing"], say)
        self._site = replace(self._site, pulls=not code)
        return Done("Completed", "the remote gave not everything; going on" if code else "pulled what the remote has")

    def _publish(self, say: Say) -> Done:
        measure = partial(measure_champion, self._site, self.workspace, say=say)
        done = self._publication = publish_package(self.workspace, self._params, self._revision, measure)
        for line in str(done.verdict).splitlines() if done.verdict else ():
            say(line)
        if not self._shared:  # nothing follows that could fail
            self.board.over(self._result())
        return Done(done.state, done.words)

    def _push(self, say: Say) -> Done:
        code, _ = run_command(self._site, "push", ["dvc", "push", "--run-cache"], say)
        self.board.over(self._result())
        failed, words = "THE REMOTE TOOK NOT EVERYTHING; `dvc push` later", "outputs and run-cache are on the remote"
        return Done("Completed", failed if code else words)

    def _result(self) -> Result:
        seconds, edits = time.monotonic() - self._began, find_edits(self.root, self._frozen)
        return Result(self.workspace, self._ended, self._publication, seconds, None, edits)


def run_sequence(root: Path, profile: str, board: Board) -> Result:
    """Run every step without Prefect."""
    run = PipelineRun(root, profile, board)
    with run.lock():
        for step in STEPS:
            getattr(run, step)()
    return run.result


def describe_run(root: Path, profile: str) -> tuple[str, list[str]]:
    """Return a flow run's name and tags: profile, the digest of its params, git revision."""
    revision = read_revision(root, profile)
    params = digest_of(without_secrets(read_block(root / "params.yaml", profile)))[:7]
    tags = [f"profile:{profile}", f"params:{params}", f"git:{str(revision).removesuffix('+')}"]
    return f"{profile}-{params}-{revision}", [*tags, *(["dirty"] if revision.dirty else [])]


def _step(board: Board, name: str, work: Callable[[Say], Done], *, after: Sequence[str] = ()) -> Done:
    """Do one step, shown in the terminal and on the board."""
    began = time.monotonic()

    def shown(record: Say) -> Done:
        def say(line: str) -> None:
            print(f"  {line}", flush=True)
            record(line)

        return work(say)

    done = board.step(name, shown, after=after)
    seconds = time.monotonic() - began
    print(f"{name}: {done.state}, {done.words}" + (f" ({seconds:.0f} s)" if seconds >= 1 else ""), flush=True)
    return done


def _repair(root: Path) -> None:
    for line in patiently(partial(graph.repair_after_kill, root), print):
        print(line, flush=True)


def _freeze(board: Board, site: Site) -> Revision:
    """Take the digests of all inputs; return the revision that they are of."""
    refreshing = [stage.name for stage in graph.load_graph(site.root) if stage.refreshes]
    while True:
        before = read_revision(site.root)
        for name in refreshing:  # they write what the plan must see; they never count as changed
            _step(board, name, partial(_refresh, site, name))
        if (after := read_revision(site.root)) == before:
            return after
        words = f"the workspace went from {before} to {after} while its digests were taken; taking them again"
        print(words, flush=True)


def find_edits(root: Path, frozen: FrozenInputs) -> tuple[str, ...]:
    """Return which keys of this profile were changed in params.yaml since a run froze its inputs."""
    try:
        now, then = (
            without_secrets(read_block(path, frozen.profile_name))
            for path in (root / "params.yaml", frozen.params_file)
        )
    except (ConfigError, KeyError):
        return ("params.yaml",)
    return tuple(key for key in dict.fromkeys([*then, *now]) if then.get(key) != now.get(key))


def _refresh(site: Site, stage: str, say: Say) -> Done:
    bring_up(site, stage, say)
    return Done("Unchanged", "froze params; took digests of code, sources and base")


def _bring_up(site: Site, plan: graph.StagePlan, say: Say) -> Done:
    why = "; ".join(plan.reasons)
    print(f"{plan.name}: {why}", flush=True)
    outcome = bring_up(site, plan.name, say)
    words = {
        "ran": f"ran because {why.replace(' will run', ' ran')}",
        "restored": "its result was in DVC's cache",
        "unchanged": "what it reads turned out the same",
    }
    return Done(_STATES[outcome], words[outcome])


def _leave(_site: Site, plan: graph.StagePlan, _say: Say) -> Done:
    """No child process for what the plan finds unchanged."""
    return Done("Unchanged", "; ".join(plan.reasons))


def _show_plan(board: Board, plans: list[graph.StagePlan]) -> None:
    rows = [
        {"stage": plan.name, "will run": "yes" if plan.will_run else "no", "why": "; ".join(plan.reasons)}
        for plan in plans
    ]
    print(summary.draw_table(rows), flush=True)
    board.table("plan", "What this run will do, and why", rows)


def _show_ledger(board: Board, workspace: Workspace, *, known: list[dict[str, str]]) -> list[dict[str, str]]:
    """Show the ledger if it is another one than is known; return it."""
    rows = summary.read_ledger(workspace)
    if rows and rows != known:
        board.table("ledger", "Where every record and token went", rows)
    return rows


def _show_budget(board: Board, workspace: Workspace, params: Profile) -> None:
    """Show what the run needs before it spends anything. Old data that cannot be read is prepare's to make again."""
    try:
        text = outline_plan(plan_run(workspace, params, ranks=count_ranks()))
    except DataError as error:
        text = f"what the run needs is not known before its data is made again: {error}"
    print(text, flush=True)
    board.report("needs", text)


def _run_on_prefect(root: Path, profile: str, ending: Ending) -> Result:
    """Return the result, printed."""
    from ropeway.orchestration.prefect_server import apply_settings, await_server, open_server

    apply_settings(root)
    with open_server(root) as url:
        # While a temporary server starts: import Prefect and DVC, and find a broken dvc.yaml.
        _repair(root)
        from ropeway.orchestration import prefect_adapter

        graph.load_graph(root)
        flow = prefect_adapter.load_flow(root, "retrain")
        await_server(url, root)
        result, page = prefect_adapter.run_flow(flow, root, profile, url, partial(_bound_end, root, ending))
        ending.tell(partial(_print_result, root, result, page))
    return result


def _bound_end(root: Path, ending: Ending, result: Result | BaseException, page: str) -> None:
    """From here on nothing waits long for a server."""
    if isinstance(result, BaseException):
        stated = result.exit_code if isinstance(result, RopewayError) else getattr(result, "code", None)
        code = stated if isinstance(stated, int) else 1
        ending.arm(code, partial(print, f"ropeway: {result}", file=sys.stderr, flush=True))
    else:
        ending.arm(0, partial(_print_result, root, result, page))


def _print_result(root: Path, result: Result, page: str) -> None:
    from ropeway.orchestration.prefect_server import DEFAULT_URL, page_address, standing_server

    there = standing_server(root)  # it may have come or gone meanwhile
    address = page_address(there, page) if there else f"make ui, then open {page_address(DEFAULT_URL, page)}"
    summary.print_result(result, address)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that blocks that end children are left in order."""
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
