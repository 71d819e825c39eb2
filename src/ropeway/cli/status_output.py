"""The output of `ropeway status`: facts line by line; a line about a problem ends with the command that fixes it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from rich.console import RenderableType

from ropeway.orchestration.forecast import Forecast
from ropeway.orchestration.status import ALIASES, Problem, RunningWork, StageEnd, WorkspaceStatus
from ropeway.registry.aliases import name_author
from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.runtime.manifest import Json
from ropeway.runtime.progress import describe_count, format_seconds
from ropeway.runtime.terminal import SHORT_DIGITS, AlignedTable, Paragraph, format_moment, printable
from ropeway.runtime.workspace import format_bytes

_MIB = 2**20
_MAX_COMMENT = 60  # characters of a promotion's reason
_MAX_REASONS = 3  # of a stage; `--json` has all
_EXIT_FIX = {ConfigError.exit_code: "ropeway doctor", TemporaryError.exit_code: "ropeway run"}  # else the log says it


def describe_status(status: WorkspaceStatus) -> list[RenderableType]:
    """Return the parts to show."""
    facts = [*_facts(status)]
    width = max(len(name) for name, _ in facts)
    lines = [
        Paragraph(f"{'' if number else name:<{width}}  {line}", indent=width + 2 if name and not number else 0)
        for name, words in facts
        for number, line in enumerate(words.splitlines())
    ]
    plan = [AlignedTable(("stage", "will run", "why"), _plan_rows(status))] if status.forecast else []
    return [*lines, *([""] if plan else []), *plan]


def status_json(status: WorkspaceStatus) -> Json:
    """Return the values for `--json`."""
    disk = None if status.disk is None else [asdict(part) | {"path": str(part.path)} for part in status.disk]
    return {**asdict(status), "disk": disk, "problems": [asdict(one) for one in list_problems(status)]}


def list_problems(status: WorkspaceStatus) -> list[Problem]:
    """Return what needs action: parts that could not be read, and a stage that failed or was killed."""
    found = list(status.problems)
    if end := status.last_end:
        profile = f" --profile {status.profile}" if status.profile else ""
        if end.pool:
            fix = f"ROPEWAY_POOL_{end.stage.upper()}={end.pool} ropeway run{profile}"
            found.append(Problem("last stage", _end_words(end), fix))
        elif end.code is None:
            found.append(Problem("last stage", _end_words(end), f"ropeway run{profile}"))
        elif end.code:
            fix = "ropeway run" if end.signal else _EXIT_FIX.get(end.code, f"ropeway logs {end.stage}")
            found.append(Problem("last stage", _end_words(end), fix + (profile if fix == "ropeway run" else "")))
    return found


def _with_fix(problem: Problem) -> str:
    return f"{problem.words}{'' if problem.words.endswith(('.', '?')) else '.'} Fix: {problem.fix}"


def _end_words(end: StageEnd) -> str:
    at = format_moment(end.at)
    if end.pool:
        return f"{end.stage} was called in work pool {end.pool} at {at} and may still run there; a run follows it"
    if end.code is None:
        return f"{end.stage} was killed or lost its machine, its log ends at {at}; a run resumes"
    if end.code == TemporaryError.exit_code and not end.signal:
        return f"{end.stage} stopped at {at} ({end.why or 'a temporary failure'}); a run resumes"
    how = f"was ended by {end.signal}" if end.signal else f"failed with exit code {end.code}"
    return f"{end.stage} {how} at {at}; `ropeway logs {end.stage}` has its lines"


def _facts(status: WorkspaceStatus) -> Iterator[tuple[str, str]]:
    """Yield (name, words) of every line."""
    problems = {problem.about: problem for problem in list_problems(status)}

    def part(name: str, words: str, about: str = "") -> tuple[str, str]:
        problem = problems.get(about or name)
        return name, _with_fix(problem) if problem else words

    yield "profile", status.profile or "not known"
    if "params" in problems:
        yield part("params", "")
    yield "running", _running_words(status.running) if status.running else "nothing"
    if status.slurm or "slurm" in problems:
        yield part("slurm", _slurm_words(status) if status.slurm else "")
    if "last stage" in problems:
        yield part("last stage", "")
    for number, run in enumerate(status.runs):
        losses = [f"{one:.3f}" for one in (run.base_loss, run.tuned_loss) if one is not None]
        facts = [
            f"{run.profile}, {format_moment(run.at)}",
            *([f"{run.steps:,} steps"] if run.steps is not None else []),
            *([f"mean validation loss {' -> '.join(losses)} nats/token"] if losses else []),
            "packaged" if run.packaged else "not packaged yet",
        ]
        yield "results" if not number else "", ", ".join(facts)
    if not status.runs:
        yield "results", "none: nothing has run here. To run: ropeway run"
    yield part("next run", _next_words(status.forecast, status.running is not None))
    for note in status.forecast.notes if status.forecast else ():
        yield "", note
    yield from _version_facts(status, problems.get("versions"))
    yield from _server_facts(status, problems.get("server"))
    yield part("disk", _disk_words(status))


def _running_words(running: RunningWork) -> str:
    who = f"{running.command} of {running.profile}" if running.profile else running.command
    if not running.holds:
        return f"{who} (pid {running.pid}) was killed; stage {running.stage} is still saving. In a minute: ropeway run"
    words = f"{who} (pid {running.pid}) for {format_seconds(running.seconds)}"
    if running.stage:
        words += f"; stage {running.stage} for {format_seconds(running.stage_seconds or 0)}"
    if running.pool:
        words += f" in work pool {running.pool}, "
        words += f"on worker {running.worker}" if running.worker else "waiting for a worker"
    if running.step is not None:
        words += f", {describe_count(asdict(running))}"
    if running.eta_seconds is not None:
        words += f", {format_seconds(running.eta_seconds)} left"
    if running.sign_seconds is not None:
        words += f"; last sign of life {format_seconds(running.sign_seconds)} ago"
    return words


def _slurm_words(status: WorkspaceStatus) -> str:
    job = status.slurm
    if job is None:
        return ""
    words = f"job {job.job or 'being submitted'} ({job.name}), {job.ranks} ranks, {job.state}"
    words += f" on {job.nodes}" if job.nodes else f", reason {job.reason}" if job.reason else ""
    if status.running is None:
        words += ", when its run was killed. To wait for it: ropeway run"
    return f"{words}, submitted {format_moment(job.since)}"


def _next_words(forecast: Forecast | None, is_running: bool) -> str:  # noqa: FBT001 - a private function
    if forecast is None:
        return "not known while params.yaml is invalid"
    count = sum(stage.will_run is not False for stage in forecast.stages)
    if not count:
        return "no stage: everything is up to date" if not forecast.notes else "no stage, as far as this shows:"
    words = f"{count} of {len(forecast.stages)} stages, if DVC's cache does not have their results"
    return f"as of now, {words}" if is_running else f"{words}. To run them: ropeway run"


def _version_facts(status: WorkspaceStatus, problem: Problem | None) -> Iterator[tuple[str, str]]:
    if problem or status.versions is None:
        yield "registry", _with_fix(problem) if problem else "not known without a profile"
        return
    by_alias = {target.alias: target for target in status.versions}
    for alias in ALIASES:
        if target := by_alias.get(alias):
            reason = target.reason if len(target.reason) <= _MAX_COMMENT else f"{target.reason[:_MAX_COMMENT]}…"
            who = name_author(asdict(target))
            words = f"{target.version} ({target.digest[:SHORT_DIGITS]}), {format_moment(target.at)}, by {who}"
            yield alias, f"{words}: {' '.join(reason.split())}"
        else:
            words = f"none in {status.registry}"
            if alias == "production" and "candidate" in by_alias:
                words += f". To decide: ropeway review {status.profile}@candidate"
            yield alias, words


def _server_facts(status: WorkspaceStatus, problem: Problem | None) -> Iterator[tuple[str, str]]:
    view = status.prefect
    if problem:
        yield "server", _with_fix(problem)
    elif view is None:
        yield "server", "none; a run starts a temporary one. To start it: ropeway server"
    if view is None:
        yield "schedule", "not known: no server"
        return
    yield "server", view.url.removesuffix("/api")
    for number, run in enumerate(view.runs):
        yield "flow runs" if not number else "", f"{run.name}: {run.state}, {format_moment(_to_minute(run.at))}"
    crons = [f"{one.deployment} at '{cron}' (UTC)" for one in view.schedules if one.ready for cron in one.cron]
    served = ", ".join(one.deployment for one in view.schedules if one.ready)
    without = f"none; served are {served}" if served else "none: nothing is served. To serve: ropeway serve"
    yield "schedule", "; ".join(crons) or without


def _to_minute(at: str) -> str:
    try:
        return datetime.fromisoformat(at).astimezone(UTC).isoformat(timespec="seconds")
    except ValueError:
        return at or "not started"


def _disk_words(status: WorkspaceStatus) -> str:
    parts = [f"{part.name} {format_bytes(part.bytes)}" for part in status.disk or () if part.bytes >= _MIB]
    free = format_bytes(status.free_bytes)
    return f"{', '.join(parts) or 'less than 1 MiB'}; {free} free. To see what can go: ropeway clean"


def _shorten(reasons: Sequence[str]) -> str:
    more = len(reasons) - _MAX_REASONS
    return "; ".join([*reasons[:_MAX_REASONS], *([f"and {more} more"] if more > 0 else [])])


def _plan_rows(status: WorkspaceStatus) -> list[tuple[str, str, str]]:
    running = status.running.stage if status.running else None
    words = {True: "yes", False: "no", None: "?"}
    return [
        (
            stage.name,
            "running" if stage.name == running else words[stage.will_run],
            printable(_shorten(stage.reasons)).plain,
        )
        for stage in (status.forecast.stages if status.forecast else ())
    ]
