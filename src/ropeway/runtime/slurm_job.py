"""Trains in a Slurm job from a login shell: submits it, shows its output, passes a stop on, and returns its exit code.

`python -m ropeway.runtime.slurm_job RANKS ARGUMENT…`, with the arguments of a rank. It takes the place of the launcher
under stage `train`. The job runs `slurm_batch`; both read and write `.work` on the file system that they share.

A job that ends before its training because of a preemption, a node or its time limit is submitted again, and resumes.
`settle_earlier_job` handles the job of a start that was killed.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ropeway.runtime.errors import ConfigError, DataError, RopewayError, TemporaryError
from ropeway.runtime.grace import StopFiles, grace_seconds, read_seconds, stated_seconds
from ropeway.runtime.slurm import (
    ARGUMENTS,
    JobRecord,
    JobState,
    SlurmSilentError,
    cancel,
    find_job,
    job_name,
    job_options,
    read_exit,
    read_state,
    record_path,
    stop_ranks,
    submit,
    submits_jobs,
)
from ropeway.runtime.stage_log import LogMirror
from ropeway.runtime.workspace import Workspace

POLL = "ROPEWAY_SLURM_POLL_SECONDS"
_POLL_SECONDS = 10.0  # between two questions to Slurm; every waiting run of a site asks its one controller
_WAKE_SECONDS = 0.2
_SIGNAL_SECONDS = 120.0  # default of --signal: TERM this long before the time limit
_LAST_SECONDS = 4.0  # before the supervisor kills this process
_REMIND_SECONDS = 1800.0  # a job that waits is said again after this time
_STOPPED = TemporaryError.exit_code
_LOST = ("BOOT_FAIL", "NODE_FAIL", "PREEMPTED")
_LIMITS = {
    "DEADLINE": f"it did not start before the deadline in {ARGUMENTS}",
    "OUT_OF_MEMORY": f"raise --mem in {ARGUMENTS}",
    "TIMEOUT": f"no checkpoint was saved within its time limit: raise --time in {ARGUMENTS}, or lower save_minutes",
}
_PASSED_ON = (0, ConfigError.exit_code, DataError.exit_code, _STOPPED)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from the end of a job.

    Attributes:
        code: Exit code of this attempt; None: the job is submitted again.
        words: What happened and what to do.
    """

    code: int | None
    words: str


def judge_end(job: int, end: JobState | None, code: int | None, *, has_progressed: bool) -> Verdict:
    """Return what follows from the end of a job that nobody here stopped.

    Args:
        job: Its id.
        end: Its final state; None if Slurm no longer knows it.
        code: The exit code that it wrote; None if it was killed.
        has_progressed: Whether it saved a checkpoint that was not there at its start.
    """
    state, who = end.state if end else "GONE", f"Slurm job {job}"
    if end and end.reason and end.reason != state.title().replace("_", ""):
        state = f"{state} ({end.reason})"
    kind = end.state if end else None
    if code == 0:
        return Verdict(0, f"{who} ended")
    if kind == "CANCELLED":
        return Verdict(1, f"{who} was canceled, not by this run: {state}. The same command resumes")
    if kind in _LOST or (has_progressed and (kind == "TIMEOUT" or code == _STOPPED)):
        how = "its ranks saved and ended (preemption or time limit)" if code == _STOPPED else state
        return Verdict(None, f"{who} ended: {how}; another one is submitted and resumes")
    if kind in _LIMITS:
        return Verdict(ConfigError.exit_code, f"{who} ended: {state}; {_LIMITS[kind]}")
    if end is None and code is None:
        return Verdict(_STOPPED, f"{who} is no longer known to Slurm and wrote no exit code. The same command resumes")
    number = code if code is not None else end.code if end else 1
    return Verdict(number or 1, f"{who} ended: {state}, exit code {number}")


def settle_earlier_job(root: Path, name: str, ranks: int, environment: Mapping[str, str]) -> bool:
    """Return whether an earlier start's job trains this very run, so that it is waited for; end any other one.

    Call it before anything in `.checkpoints` is touched: the job may be writing there.

    Args:
        root: The workspace.
        name: Name of the job that this start would submit.
        ranks: Ranks of this start.
        environment: That of this start; with other options another job is needed.

    Raises:
        TemporaryError: Slurm does not answer, or the job has not ended yet: starting another one would be unsafe.
        ConfigError: Slurm's commands are missing here, or the record is damaged.
    """
    record = JobRecord.read(root)
    if record is None:
        return False
    record = _with_id(root, record)
    try:
        now = None if record.job is None else read_state(record.job)
    except SlurmSilentError as error:
        raise SlurmSilentError(f"{_may_run(root, record)}: {error}. Run the same command again later") from None
    except ConfigError as error:
        raise ConfigError(
            f"{_may_run(root, record)}: {error}. Run it where they are, or remove the file if the job has ended"
        ) from None
    files = StopFiles(record_path(root).parent, "train")
    if now is None or now.is_final:
        record.remove(root)
        return False
    is_same = submits_jobs(environment) and (record.name, record.ranks) == (name, ranks)
    if is_same and list(record.options) == job_options(environment) and not files.is_stop_requested():
        print(f"Slurm job {record.job} of an earlier start is {now.state}: waiting for it", flush=True)
        record.write(root)
        return True
    print(
        f"Slurm job {record.job} ({record.name}, {shlex.join(record.options)}) of an earlier start is {now.state} and "
        "is not the one that this start needs: it is asked to save, then canceled",
        flush=True,
    )
    _end_earlier(root, record, now, files.read_seconds() or grace_seconds(files))
    return False


def _may_run(root: Path, record: JobRecord) -> str:
    return f"{record_path(root)}: Slurm job {record.job or record.name} may still train in this workspace"


def _with_id(root: Path, record: JobRecord) -> JobRecord:
    """Return the record with the job's id, which is missing if the process was killed while it submitted the job."""
    return record if record.job is not None else replace(record, job=find_job(root, record.name))


def _end_earlier(root: Path, record: JobRecord, now: JobState, seconds: float) -> None:
    """End a job of an earlier start: it saves first; after `seconds` it is canceled.

    Raises:
        TemporaryError: It still exists a minute after that.
    """
    job = record.job or 0
    began, is_canceled = time.monotonic(), now.is_waiting or not stop_ranks(job)
    if is_canceled:
        cancel(job)
    while not (read_exit(record.exit_file(root)) is not None and is_canceled) and (found := read_state(job)):
        if found.is_final:
            break
        waited = time.monotonic() - began
        if not is_canceled and (waited > seconds or found.is_waiting):
            is_canceled = True
            cancel(job)
        if waited > seconds + 60:
            raise TemporaryError(f"Slurm job {job} is still {found.state} {waited:.0f} s after it was canceled")
        time.sleep(min(1.0, poll_seconds(os.environ)))
    record.remove(root)


def poll_seconds(environment: Mapping[str, str]) -> float:
    """Return the seconds between two questions to Slurm.

    Raises:
        ConfigError: `ROPEWAY_SLURM_POLL_SECONDS` is not a positive number.
    """
    return read_seconds(environment, POLL) or _POLL_SECONDS


class JobWait:
    """A job that this process submitted, or found, and waits for."""

    def __init__(self, ranks: int, arguments: list[str]) -> None:
        """Read the options from the environment; install the signal handlers.

        Args:
            ranks: Number of ranks.
            arguments: Those of a rank: workspace, profile, fingerprint and the verified checkpoint's step.
        """
        self._root, self._ranks, self._arguments = Path(arguments[0]), ranks, arguments
        workspace = Workspace(self._root, arguments[1])
        self._name = job_name(workspace.profile, arguments[2])
        self._checkpoints = workspace.checkpoints / arguments[2]
        self._files = StopFiles(workspace.work, "train")
        self._options, self._poll = job_options(os.environ), poll_seconds(os.environ)
        self._stops = 0  # signals that arrived
        self._is_asked = self._is_canceled = False
        self._is_silent, self._shown_at = False, 0.0
        self._shown: tuple[str, str | None, str] | None = None
        self._deadline = float("inf")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._count_stop)

    def _count_stop(self, *_: object) -> None:
        self._stops += 1

    def run(self) -> int:
        """Return the exit code of the training."""
        found = JobRecord.read(self._root)
        if found is not None and not self._files.exists():
            self._files.open()  # of a job that was requeued: its next start empties it
        while True:
            steps = self._newest_step()
            self._record = found or self._submit()
            found = None
            end = self._wait()
            code = read_exit(self._record.exit_file(self._root))
            if end is not None and not end.is_final:  # canceled, but not ended yet: the next start looks at it
                return _STOPPED
            job, has_progressed = self._record.job or 0, self._newest_step() > steps
            self._record.remove(self._root)
            if self._is_asked:
                code = end.code if code is None and end else code
                return code if code in _PASSED_ON else _STOPPED
            verdict = judge_end(job, end, code, has_progressed=has_progressed)
            print(verdict.words, flush=True)
            if verdict.code is not None:
                return verdict.code
            self._arguments = self._arguments[:3]  # the ranks choose the newest checkpoint

    def _newest_step(self) -> int:
        return max((int(path.name.removeprefix("step-")) for path in self._checkpoints.glob("step-*[0-9]")), default=0)

    def _submit(self) -> JobRecord:
        record = JobRecord.create(self._name, self._ranks, self._options)
        record.write(self._root)  # before the job exists: it is found by its name if this process is killed here
        log = record.log(self._root).with_name("slurm-%j.log")
        seconds = max(stated_seconds() or _SIGNAL_SECONDS, 1)
        defaults = ["--requeue", f"--signal=TERM@{seconds:.0f}"]  # before the user's: sbatch takes the last
        fixed = [f"--job-name={self._name}", f"--chdir={self._root}", f"--output={log}", "--open-mode=append"]
        options = [*defaults, *self._options, *fixed]
        command = [sys.executable, "-m", "ropeway.runtime.slurm_batch", str(self._ranks), *self._arguments]
        try:
            job = submit(options, f"#!/bin/sh\nexec {shlex.join(command)}\n")
        except ConfigError:
            record.remove(self._root)
            raise
        record = replace(record, job=job)
        record.write(self._root)
        print(f"Slurm job {job} submitted: {self._ranks} ranks; sbatch {shlex.join(options)}", flush=True)
        return record

    def _wait(self) -> JobState | None:
        """Return the final state of the job, or its last one where it was canceled and has not ended yet."""
        log = self._record.log(self._root)
        log.touch()
        mirror, asked_at, now = LogMirror(log, from_start=True), float("-inf"), None
        try:
            while True:
                mirror.copy()
                is_near_end = self._wants_stop() or self._record.exit_file(self._root).exists()
                if time.monotonic() - asked_at >= (min(1.0, self._poll) if is_near_end else self._poll):
                    asked_at = time.monotonic()
                    with self._patience():
                        now = read_state(self._record.job or 0)
                        if now is None or now.is_final:
                            return now
                        self._show(now)
                    if self._wants_stop() and self._stop(now):
                        return now
                time.sleep(_WAKE_SECONDS)
        finally:
            mirror.close()

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """Keep waiting while Slurm's controller does not answer; say so once."""
        try:
            yield
            self._is_silent = False
        except SlurmSilentError as error:
            if not self._is_silent:
                print(f"Slurm does not answer, still waiting: {error}", flush=True)
            self._is_silent = True

    def _show(self, now: JobState) -> None:
        """Print and record a new state, reason or list of nodes; a job that waits long is printed again."""
        facts = (now.state, now.reason if now.is_waiting else None, now.nodes)
        is_late = now.is_waiting and time.monotonic() - self._shown_at > _REMIND_SECONDS
        if facts == self._shown and not is_late:
            return
        self._shown, self._shown_at = facts, time.monotonic()
        self._record = self._record.with_state(now)
        self._record.write(self._root)
        words = f"Slurm job {self._record.job} is {now.state}"
        if now.is_waiting:
            words += f", reason {now.reason or 'not stated'}" + (f", requeued {now.restarts}x" if now.restarts else "")
        print(f"{words}{f' on {now.nodes}' if now.nodes else ''}", flush=True)

    def _wants_stop(self) -> bool:
        return self._is_asked or self._stops > 0 or self._files.is_stop_requested()

    def _stop(self, now: JobState | None) -> bool:
        """Ask the ranks to save, or cancel the job where there is nothing to save; return whether to stop waiting."""
        job, is_first = self._record.job or 0, not self._is_asked
        if is_first:
            self._is_asked, self._stops = True, 0
            self._deadline = time.monotonic() + grace_seconds(self._files) - _LAST_SECONDS
        if self._is_canceled:
            return time.monotonic() > self._deadline
        # The supervisor sends TERM to this process when the grace period of a stop through the file is over.
        is_late = self._stops > 0 or time.monotonic() > self._deadline
        if not is_late and now is not None and not now.is_waiting and stop_ranks(job):  # again: they may start just now
            if is_first:
                print(f"Slurm job {job}: its ranks are asked to save and end", flush=True)
            return False
        self._is_canceled = True
        cancel(job)
        print(f"Slurm job {job} is canceled", flush=True)
        self._deadline = time.monotonic() + _LAST_SECONDS
        return False


def main() -> int:
    """Run `python -m ropeway.runtime.slurm_job RANKS ARGUMENT…`."""
    try:
        return JobWait(int(sys.argv[1]), sys.argv[2:]).run()
    except RopewayError as error:
        print(f"ropeway: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
