"""Run a command and end its whole process tree when it exits, when a signal arrives or when its parent dies.

    flow ── supervise ── dvc ── sh ── ropeway stage train (also a supervisor) ── stage ── launcher ── ranks

The tree receives SIGTERM when this process receives TERM, INT or HUP, or when the ancestor that started the work dies.
Processes that are still alive after the grace period are killed. DeepSpeed's launcher must not receive TERM: it then
leaves ranks running (verified with 0.19.8). If there are ranks, only they receive TERM; they save a checkpoint, and the
other processes exit after them. Ranks on other machines are asked through a file (`ropeway.runtime.grace`); the
launcher that waits for them receives TERM only after the grace period: DeepSpeed's then ends the launchers on all
machines by name. Processes of another living supervisor receive no signal from this one.
"""

import argparse
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, Self, TypedDict

import psutil

from ropeway.runtime.errors import ConfigError, RopewayError, disk_error
from ropeway.runtime.grace import StopFiles, grace_seconds, stated_seconds
from ropeway.runtime.manifest import write_json
from ropeway.runtime.stage_log import LogMirror

LEFTOVER_SECONDS = 5.0  # grace period of leftover processes after the command has exited
_POLL_SECONDS = 0.5  # fallback: signals and, on Linux, the death of an ancestor end the wait at once
_SUPERVISOR_MARK = "ROPEWAY_SUPERVISED_BY"  # inherited, so it identifies the supervisor even after the parent died
_RANK = "ropeway.stages.train.rank"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # Source: prctl(2)
_DVC_NAMES = ("dvc", "ropeway.orchestration.guarded_dvc")
_DVC_FAILED = 255  # dvc's exit code for any failure; not 256 - SIGHUP
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class ExitRecord(TypedDict):
    """How a command ended: its exit code, the signal that the code encodes, and why it was stopped."""

    stage: str
    code: int
    signal: str | None
    why: str | None
    at: str


@dataclass(frozen=True, slots=True)
class StopOptions:
    """How long a stop may take.

    Attributes:
        grace: Seconds from TERM to KILL; None: `ropeway.runtime.grace.grace_seconds` at the time of the stop.
        margin: Seconds that are added where `grace` is None: an outer supervisor waits longer than the inner one.
    """

    grace: float | None = None
    margin: float = 0.0

    def seconds(self, files: StopFiles) -> float:
        """Return the grace period of a stop that begins now."""
        return grace_seconds(files) + self.margin if self.grace is None else self.grace


def run(  # noqa: PLR0913 - what a process is started with
    command: Sequence[str],
    *,
    record: Path,
    stop: StopOptions | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    leader: int | None = None,
    log: Path | None = None,
) -> int:
    """Run a command and return its exit code after it and all its descendants have exited.

    Call it from the main thread of a process without other children: it installs signal handlers and reaps every
    child. A signal that was ignored at the start (`nohup`, a background job) stays ignored.

    Args:
        command: The command and its arguments; runs in a new session.
        record: File for `{stage, code, signal, why, at}`, because DVC hides the exit codes of its stages. It is missing
            if the disk does not take it.
        stop: How long a stop may take; default: `ROPEWAY_GRACE_SECONDS`, else what the ranks need to save, else 60 s.
        env: The command's environment; default: this process's.
        cwd: The command's working directory; default: this process's.
        leader: Pid of the ancestor whose death ends the tree. Default: dvc if DVC runs the stage, else none, so
            `nohup ropeway stage train` outlives its terminal.
        log: File that the command's output is appended to; this process copies it to its own standard output.

    Returns:
        The command's exit code; 128 + n if signal n ended it. If the supervisor stopped it, 0 and the codes 64, 65
        and 75 of errors.py are passed on, and every other code becomes 128 + n.

    Raises:
        ConfigError: The command does not exist, or `ROPEWAY_GRACE_SECONDS` is not a number; correct it or set up the
            environment.
    """
    stated_seconds()
    record.unlink(missing_ok=True)
    files = stop_files(record)
    files.remove()
    watched = _find_watched(leader)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0
        )  # orphans of the tree become children of this process
    with _SignalPipe(watched or []) as signals:
        if watched is None:
            why: str | None = "dvc or the flow ended before the command started"
            code = 128 + signal.SIGTERM
        else:
            marked = {**(os.environ if env is None else env), _SUPERVISOR_MARK: str(os.getpid())}
            with ExitStack() as opened:
                output = opened.enter_context(log.open("ab")) if log else None
                if log:  # before the command writes
                    signals.mirror = LogMirror(log)
                    opened.callback(signals.mirror.close)
                try:
                    child = subprocess.Popen(
                        command,
                        env=marked,
                        cwd=cwd,
                        start_new_session=True,
                        preexec_fn=_die_with_parent,  # noqa: PLW1509 - this process has one thread
                        stdout=output,
                        stderr=output,
                    )
                except FileNotFoundError as error:
                    raise ConfigError(
                        f"{error.filename}: command not found. Set up the environment with `make setup`"
                    ) from None
                code, why = _wait_for_exit(child, watched, signals, files, stop or StopOptions())
    stage, at = record.name.split(".")[0], datetime.now(UTC).isoformat(timespec="seconds")
    try:
        write_json(record, ExitRecord(stage=stage, code=code, signal=signal_of(code), why=why, at=at))
    except OSError as error:  # the command's own end counts; who needs the record looks at the disk instead
        _print_message(f"the exit record was not written: {disk_error(error) or error}")
    return code


def stop_files(record: Path) -> StopFiles:
    """Return the files through which the ranks of the stage with this exit record are asked to stop."""
    return StopFiles(record.parent, record.name.split(".")[0])


def _die_with_parent() -> None:
    """Make the kernel send SIGTERM to the command if this supervisor is killed; runs in the child before exec."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _wait_for_exit(
    child: subprocess.Popen[bytes],
    watched: list[psutil.Process],
    signals: "_SignalPipe",
    files: StopFiles,
    stop: StopOptions,
) -> tuple[int, str | None]:
    """Wait until the child exits or must be stopped, end the tree, and return the exit code and the stop reason."""
    why = None
    while why is None and _reap(child) is None:
        signals.wait()
        why = signals.stop_reason() or next(
            (f"parent process {above.pid} died" for above in watched if _is_gone(above)), None
        )
    if why is None:
        _end_tree(child, signals, LEFTOVER_SECONDS)
    else:
        seconds = stop.seconds(files)
        _print_message(f"{why}: stopping the command (grace period {seconds:.0f} s)")
        _end_tree(child, signals, seconds, files)
    code = 128 - child.returncode if child.returncode < 0 else child.returncode
    if why is not None and code not in (0, 64, 65, 75):
        code = 128 + (signals.signal or signal.SIGTERM)
    return code, why


class _SignalPipe:
    """Wakes the supervisor without polling: on signals and, on Linux, on the death of a watched process."""

    def __init__(self, watched: Sequence[psutil.Process]) -> None:
        """Store the watched processes; `with` installs the signal handlers."""
        self.signal: int | None = None
        self.mirror: LogMirror | None = None  # copied whenever this pipe waits
        self._watched = watched
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        """Install the signal handlers and open the pipe and the pidfds."""
        self._wakeup_read, wakeup_write = os.pipe()
        os.set_blocking(wakeup_write, False)
        self._undo.callback(os.close, self._wakeup_read)
        self._undo.callback(os.close, wakeup_write)
        self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False))
        for number in _STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._undo.callback(signal.signal, number, signal.signal(number, self._record_signal))
        self._undo.callback(signal.signal, signal.SIGCHLD, signal.signal(signal.SIGCHLD, lambda *_: None))
        self._pidfds = list(self._open_pidfds())
        return self

    def _open_pidfds(self) -> Iterator[int]:
        for process in self._watched if hasattr(os, "pidfd_open") else ():
            with suppress(OSError):  # already dead, or a kernel before 5.3: polling detects it
                pidfd = os.pidfd_open(process.pid)
                self._undo.callback(os.close, pidfd)
                yield pidfd

    def __exit__(self, *_: object) -> None:
        """Restore the signal handlers and close the descriptors."""
        self._undo.close()

    def _record_signal(self, number: int, _frame: object) -> None:
        self.signal = self.signal or number

    def stop_reason(self) -> str | None:
        """Return which stop signal this process received, or None."""
        return f"received {signal.Signals(self.signal).name}" if self.signal else None

    def wait(self, seconds: float = _POLL_SECONDS) -> None:
        """Wait for a signal or the death of a watched process, at most `seconds`."""
        if self.mirror:
            self.mirror.copy()
        ready, _, _ = select.select([self._wakeup_read, *self._pidfds], [], [], seconds)
        for descriptor in ready:
            if descriptor == self._wakeup_read:
                os.read(self._wakeup_read, 512)
            else:
                self._pidfds.remove(descriptor)  # it stays readable


def _end_tree(
    child: subprocess.Popen[bytes], signals: _SignalPipe, seconds: float, files: StopFiles | None = None
) -> None:
    """Send TERM to each process of the tree once, KILL after the grace period; return when all have exited.

    With `files`, ranks on other machines are asked through them, and TERM to what waits for those ranks is sent only
    after the grace period.
    """
    deadline, signaled, had_ranks = time.monotonic() + seconds, set[psutil.Process](), False
    tree = _tree(child)
    is_asked = (
        files is not None and not any(_has_other_supervisor(each, tree) for each in tree) and files.request_stop()
    )
    # A thread-group leader with running threads is a zombie that cannot be reaped yet: its exit code is unknown.
    while (tree := _tree(child)) or child.returncode is None:
        late = time.monotonic() - deadline
        if late > (LEFTOVER_SECONDS if is_asked and not had_ranks else 0):
            _send(tree, signal.SIGKILL)
        else:
            mine = [process for process in tree if not _has_other_supervisor(process, tree)]
            ranks = [process for process in mine if _is_rank(process)]
            had_ranks |= bool(ranks)
            others_wait = had_ranks or (is_asked and late <= 0)
            now = {*(ranks if others_wait else mine)} - signaled
            _send(now, signal.SIGTERM)
            signaled |= now
        signals.wait(0.1)


def _tree(child: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return all living descendants, then reap: once the list is empty, the command's exit code is known."""
    living = [process for process in psutil.Process().children(recursive=True) if not _is_gone(process)]
    _reap(child)
    return living


def _reap(child: subprocess.Popen[bytes]) -> int | None:
    """Reap every dead child, including adopted ones; return the command's exit code (negative: signal) or None."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == child.pid:
                child.returncode = os.waitstatus_to_exitcode(ended[1])
    return child.returncode


def _send(processes: Sequence[psutil.Process] | set[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            if sys.platform != "linux":  # no subreaper: an orphan is reachable only through its process group
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(os.getpgid(process.pid), number)


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def _is_rank(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return runs_rank(words)


def runs_rank(words: Sequence[str]) -> bool:
    """Return whether a command line is that of a rank, not of a launcher that has a rank's as its arguments.

    >>> runs_rank(["python", "-u", "-m", "ropeway.stages.train.rank", "/w"])
    True
    >>> runs_rank(["srun", "--ntasks=16", "python", "-m", "ropeway.stages.train.rank", "/w"])
    False
    """
    module = next((place for place, word in enumerate(words) if word == "-m"), len(words))
    return list(words[module + 1 : module + 2]) == [_RANK] and all(word.startswith("-") for word in words[1:module])


def _has_other_supervisor(process: psutil.Process, tree: Sequence[psutil.Process]) -> bool:
    """Return whether a process belongs to another living supervisor in this tree."""
    try:
        supervisor = int(process.environ().get(_SUPERVISOR_MARK, os.getpid()))
    except (psutil.Error, OSError, ValueError):
        return False
    return supervisor != os.getpid() and any(other.pid == supervisor for other in tree)


def _find_watched(leader: int | None) -> list[psutil.Process] | None:
    """Return the ancestors whose death ends the command; None if one has already died."""
    above: list[psutil.Process] = psutil.Process().parents()
    if leader is not None:
        return next(([process] for process in above if process.pid == leader), None)
    if "DVC_STAGE" not in os.environ:  # DVC 3 sets it for every command
        return []
    for process in above:  # dvc starts stages through a shell and ends when the shell does
        if _is_dvc(process):
            return [process]
    # Another program runs DVC through its API: watch the direct parent, unless it has died.
    return above[:1] if above and above[0].pid != 1 else None


def _is_dvc(process: psutil.Process) -> bool:
    try:
        return any(Path(word).name in _DVC_NAMES for word in process.cmdline()[:3])
    except psutil.Error:
        return False


def signal_of(code: int) -> str | None:
    """Return the signal that an exit code encodes: 128 + n, or 256 - n as DeepSpeed's launcher (0.19.8) encodes it.

    >>> signal_of(143), signal_of(247), signal_of(1), signal_of(255)
    ('SIGTERM', 'SIGKILL', None, None)
    """
    number = code - 128 if code < 128 + signal.NSIG else 256 - code
    return signal.Signals(number).name if number in set(signal.Signals) and code != _DVC_FAILED else None


def _print_message(text: str) -> None:
    with suppress(OSError):  # the reader of stdout may have exited; the ranks must still save
        print(f"supervisor: {text}", flush=True)


def main() -> None:
    """Run `python -m ropeway.runtime.supervise --record FILE [--leader PID] [--grace S | --margin S] -- COMMAND…`."""
    parser = argparse.ArgumentParser(prog="ropeway.runtime.supervise")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--leader", type=int)
    parser.add_argument("--grace", type=float)
    parser.add_argument("--margin", type=float, default=0.0)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    try:
        stop = StopOptions(options.grace, options.margin)
        sys.exit(run(options.command, record=options.record, stop=stop, leader=options.leader))
    except OSError as error:
        if (told := disk_error(error)) is None:
            raise
        _end(told)
    except ConfigError as error:
        _end(error)


def _end(error: RopewayError) -> NoReturn:
    _print_message(str(error))
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
