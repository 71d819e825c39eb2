"""Run a command so that nothing it started outlives it, whoever ordered it, or a signal.

    flow ── supervise ── dvc ── sh ── ropeway stage train (supervises too) ── stage ── launcher ── ranks

The tree is asked to end (TERM) when this process gets TERM, INT or HUP, or when an ancestor on whose behalf it works
is gone; what is left after the grace is killed. DeepSpeed's launcher must not be asked: TERM to it leaves ranks
running (tried with 0.19.8), so where there are ranks they alone are asked, save a checkpoint, and the rest ends after
them. What another supervisor looks after is left to it.
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
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Self, TypedDict

import psutil

from ropeway.runtime.errors import ConfigError
from ropeway.runtime.manifest import write_json

GRACE_SECONDS = 60.0  # `ROPEWAY_GRACE_SECONDS` sets another; a checkpoint must fit into it
LEFTOVER_SECONDS = 5.0  # for what a command leaves behind when it ends by itself
_POLL_SECONDS = 0.5  # only a fallback: signals and, on Linux, deaths of ancestors wake us at once
_SUPERVISOR_MARK = "ROPEWAY_SUPERVISED_BY"  # inherited, so it still says whose a process is after its parent died
# Adjacent: the launcher's command line names the module too, but not after -m.
_RANK = ("-m", "ropeway.stages.train.rank")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # Source: prctl(2)
_DVC_FAILED = 255  # dvc's code for any failure; not 256 - SIGHUP
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class ExitRecord(TypedDict):
    """How a command ended: its exit code, the signal that the code tells of, and why it was asked to end."""

    stage: str
    code: int
    signal: str | None
    why: str | None
    at: str


def run(
    command: Sequence[str],
    *,
    record: Path,
    grace_seconds: float | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    leader: int | None = None,
) -> int:
    """Return the command's exit code once it and everything it started have ended.

    Call it in a process that has no other children and from its main thread: it takes over signals and reaps every
    child. A signal that was ignored at the start (`nohup`, a background job) stays ignored.

    Args:
        command: What to run, in a session of its own.
        record: Where `{stage, code, signal, why, at}` is written, since DVC hides the exit codes of its stages.
        grace_seconds: From TERM to KILL; default `ROPEWAY_GRACE_SECONDS`, else 60.
        env: The command's environment; default this one's.
        cwd: Its folder; default this one's.
        leader: The ancestor whose death ends the tree. Default: dvc where DVC runs a stage, else nobody, so a
            `nohup ropeway stage train` outlives its terminal.

    Returns:
        The command's exit code. 128 + n when signal n ended it, or when it was asked to end and had nothing better to
        say: 0, and the codes 64, 65 and 75 of errors.py, are passed on.

    Raises:
        ConfigError: There is no such command.
    """
    record.unlink(missing_ok=True)
    if grace_seconds is None:
        grace_seconds = float(os.environ.get("ROPEWAY_GRACE_SECONDS", GRACE_SECONDS))
    watched = _find_watched(leader)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of the tree become our children
    with _SignalPipe(watched or []) as signals:
        if watched is None:
            why: str | None = "dvc or the flow ended before the command began"
            code = 128 + signal.SIGTERM
        else:
            marked = {**(os.environ if env is None else env), _SUPERVISOR_MARK: str(os.getpid())}
            try:
                child = subprocess.Popen(
                    command,
                    env=marked,
                    cwd=cwd,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,  # noqa: PLW1509 - this process has one thread
                )
            except FileNotFoundError as error:
                raise ConfigError(f"{error.filename}: not found; is the environment set up (`make setup`)?") from None
            code, why = _wait_for_exit(child, watched, signals, grace_seconds)
    stage, at = record.name.split(".")[0], datetime.now(UTC).isoformat(timespec="seconds")
    write_json(record, ExitRecord(stage=stage, code=code, signal=signal_of(code), why=why, at=at))
    return code


def _die_with_parent() -> None:
    """In the child, before its program: should this supervisor be killed, the command is asked to end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _wait_for_exit(
    child: subprocess.Popen[bytes], watched: list[psutil.Process], signals: "_SignalPipe", grace_seconds: float
) -> tuple[int, str | None]:
    """Wait for the child or a reason to end it; return its code and that reason with nothing of the tree left."""
    why = None
    while why is None and _reap(child) is None:
        signals.wait()
        why = signals.stop_reason() or next(
            (f"pid {above.pid} above it is gone" for above in watched if _is_gone(above)), None
        )
    if why is not None:
        _say(f"{why}: stopping, within {grace_seconds:g} s")
    _end_tree(child, signals, LEFTOVER_SECONDS if why is None else grace_seconds)
    code = 128 - child.returncode if child.returncode < 0 else child.returncode
    if why is not None and code not in (0, 64, 65, 75):
        code = 128 + (signals.signal or signal.SIGTERM)
    return code, why


class _SignalPipe:
    """What wakes the supervisor: signals, and on Linux the death of a watched process, without polling."""

    def __init__(self, watched: Sequence[psutil.Process]) -> None:
        """Keep whom to listen to; nothing is taken over before `with`."""
        self.signal: int | None = None
        self._watched = watched
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        """Take the signals over."""
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
            with suppress(OSError):  # gone already, or a kernel before 5.3: polling sees it
                pidfd = os.pidfd_open(process.pid)
                self._undo.callback(os.close, pidfd)
                yield pidfd

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        self._undo.close()

    def _record_signal(self, number: int, _frame: object) -> None:
        self.signal = self.signal or number

    def stop_reason(self) -> str | None:
        """Return which signal asked for the end."""
        return f"asked by {signal.Signals(self.signal).name}" if self.signal else None

    def wait(self, seconds: float = _POLL_SECONDS) -> None:
        """Return after a signal, a death or `seconds`."""
        ready, _, _ = select.select([self._wakeup_read, *self._pidfds], [], [], seconds)
        for descriptor in ready:
            if descriptor == self._wakeup_read:
                os.read(self._wakeup_read, 512)
            else:
                self._pidfds.remove(descriptor)  # it stays readable for ever


def _end_tree(child: subprocess.Popen[bytes], signals: _SignalPipe, grace_seconds: float) -> None:
    """Ask the tree to end, each process once, then kill it; return when nothing of it is left."""
    deadline, asked, had_ranks = time.monotonic() + grace_seconds, set[psutil.Process](), False
    # A leader whose other threads are still ending looks dead and cannot be reaped yet: its code is not known.
    while (tree := _tree(child)) or child.returncode is None:
        if time.monotonic() > deadline:
            _send(tree, signal.SIGKILL)
        else:
            mine = [process for process in tree if not _is_elsewhere(process, tree)]
            ranks = [process for process in mine if _is_rank(process)]
            had_ranks |= bool(ranks)
            now = {*(ranks if had_ranks else mine)} - asked
            _send(now, signal.SIGTERM)
            asked |= now
        signals.wait(0.1)


def _tree(child: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return every living process of ours, then reap: none left means the command's code is known."""
    living = [process for process in psutil.Process().children(recursive=True) if not _is_gone(process)]
    _reap(child)
    return living


def _reap(child: subprocess.Popen[bytes]) -> int | None:
    """Reap every dead child, adopted ones too; return the command's code (negative: its signal) once it ended."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == child.pid:
                child.returncode = os.waitstatus_to_exitcode(ended[1])
    return child.returncode


def _send(processes: Sequence[psutil.Process] | set[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            if sys.platform != "linux":  # no subreaper: an orphan can only be reached through its group
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
    return _RANK in pairwise(words)


def _is_elsewhere(process: psutil.Process, tree: Sequence[psutil.Process]) -> bool:
    """Return whether another living supervisor of this tree looks after a process."""
    try:
        by = int(process.environ().get(_SUPERVISOR_MARK, os.getpid()))
    except (psutil.Error, OSError, ValueError):
        return False
    return by != os.getpid() and any(other.pid == by for other in tree)


def _find_watched(leader: int | None) -> list[psutil.Process] | None:
    """Return the ancestors without whom there is nobody to work for; None when one has died already."""
    above: list[psutil.Process] = psutil.Process().parents()
    if leader is not None:
        return next(([process] for process in above if process.pid == leader), None)
    if "DVC_STAGE" not in os.environ:  # DVC 3 sets it for every command
        return []
    for process in above:  # a shell stands between; dvc ends when that does
        if _is_dvc(process):
            return [process]
    # Another program runs DVC through its API: watch what started us, unless that has died.
    return above[:1] if above and above[0].pid != 1 else None


def _is_dvc(process: psutil.Process) -> bool:
    try:
        return any(Path(word).name == "dvc" for word in process.cmdline()[:3])
    except psutil.Error:
        return False


def signal_of(code: int) -> str | None:
    """Return which signal an exit code tells of: 128 + n, or 256 - n as DeepSpeed's launcher (0.19.8) passes it on.

    >>> signal_of(143), signal_of(247), signal_of(1), signal_of(255)
    ('SIGTERM', 'SIGKILL', None, None)
    """
    number = code - 128 if code < 128 + signal.NSIG else 256 - code
    return signal.Signals(number).name if number in set(signal.Signals) and code != _DVC_FAILED else None


def _say(what: str) -> None:
    with suppress(OSError):  # whoever read us may be gone; that is no reason to leave work unsaved
        print(f"supervisor: {what}", flush=True)


def main() -> None:
    """`python -m ropeway.runtime.supervise --record FILE [--leader PID] [--grace S] -- COMMAND…`."""
    parser = argparse.ArgumentParser(prog="ropeway.runtime.supervise")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--leader", type=int)
    parser.add_argument("--grace", type=float)
    parser.add_argument("command", nargs="+")
    asked = parser.parse_args()
    try:
        sys.exit(run(asked.command, record=asked.record, grace_seconds=asked.grace, leader=asked.leader))
    except ConfigError as error:
        _say(str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
