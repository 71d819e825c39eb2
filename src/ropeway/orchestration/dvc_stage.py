"""Runs `dvc repro` of one stage in a supervised process and passes its output on line by line."""

import codecs
import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from ropeway.orchestration import dvc_graph as graph
from ropeway.runtime.disk_check import find_disk_error
from ropeway.runtime.errors import ConfigError, RopewayError, TemporaryError, error_class
from ropeway.runtime.grace import grace_seconds
from ropeway.runtime.lock import HeldLock
from ropeway.runtime.progress import LiveLine
from ropeway.runtime.stage_log import file_name, log_path, open_log
from ropeway.runtime.supervise import ExitRecord, signal_of, stop_files
from ropeway.runtime.terminal import escape_controls
from ropeway.runtime.workspace import Workspace

LineWriter = Callable[[str], None]
T = TypeVar("T")
_BUSY_TRIES, _BUSY_SECONDS = 20, 3.0  # another dvc hashes its outputs under its lock; a 26 GB model takes 35 s
MARGIN_SECONDS = 15.0  # the outer supervisor waits longer than the inner one needs to kill
_QUOTED_LINES = 15
_POLL_SECONDS = 0.1
_MAX_CHARACTERS = 2000  # Prefect truncates a line at 1 MB (3.9.1); a page is slow long before that
_PROGRESS_SECONDS = 5.0  # how often a line that is overwritten by a carriage return is shown
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_ENDS = re.compile(r"(\r\n|\n|\r)")


class StageStoppedError(TemporaryError):
    """The dvc process was ended from outside: a request to stop, so this run does not retry the stage."""


@dataclass(frozen=True, slots=True)
class Site:
    """A workspace that this process has locked and runs stages in.

    Attributes:
        pulls: Whether a DVC remote answers; outputs that its run-cache knows are then pulled rather than produced.
        definition: What the run was planned from (`graph.read_definition`); no stage runs from a different one.
    """

    root: Path
    held: HeldLock
    pulls: bool = False
    definition: Mapping[str, str] | None = None

    def record(self, name: str, kind: str) -> Path:
        """Return the path of a supervisor's exit record: kind `exit` of the stage, kind `dvc` of its dvc."""
        return self.root / ".work" / f"{file_name(name)}.{kind}.json"

    def log(self, name: str) -> Path:
        """Return the path of a stage's full log."""
        return log_path(self.root, name)


def progress_path(root: Path, name: str) -> Path:
    """Return the path of a stage's progress file; not every stage writes one."""
    return Workspace(root, "").progress(file_name(name))


def update_stage(site: Site, name: str, write_line: LineWriter, *, force: bool = False) -> str:
    """Update one stage; return what DVC did: `ran`, `restored` or `unchanged`.

    `write_line` receives every line, shortened if long; the full text is in `site.log(name)`. `force` runs the stage
    even if DVC finds nothing changed.

    Raises:
        ConfigError: The stage exited with 64 (params.yaml cannot be run as written), or dvc.yaml was edited.
        DataError: The stage exited with 65.
        TemporaryError: The stage exited with 75 or was ended by a signal (run again, it resumes), or another dvc holds
            DVC's locks.
        StageStoppedError: The dvc process was ended from outside.
        RopewayError: Any other failure; the message quotes the stage's last lines.
    """
    if site.definition is not None:
        graph.check_definition(site.root, site.definition)
    before = _lock_entry(site.root, name)
    events = retry_while_busy(partial(_reproduce, site, name, write_line, force=force), write_line)
    return find_outcome(site, name, events, changed=_lock_entry(site.root, name) != before)


def find_outcome(site: Site, name: str, events: Mapping[str, int | None], *, changed: bool) -> str:
    """Return `ran`, `restored` or `unchanged` for a stage that did not fail.

    A stage of this project that ran has an exit record; `changed` says whether its entry in dvc.lock differs. DVC's own
    output (`events`) decides the rest: whether a stage that a user added ran, whether missing files were restored.
    """
    if _read_record(site.record(name, "exit")) is not None:
        return "ran"
    said = next((outcome for outcome in ("ran", "restored", "unchanged") if outcome in events), "unchanged")
    return "restored" if changed and said == "unchanged" else said


def _lock_entry(root: Path, name: str) -> object:
    """Return a stage's entry of dvc.lock, or None if it cannot be read; DVC itself then reports the fault."""
    with suppress(OSError, ConfigError):
        stages: object = graph.parse_lock((root / "dvc.lock").read_bytes()).get("stages")
        return stages.get(name) if isinstance(stages, dict) else None
    return None


def retry_while_busy(work: Callable[[], T], write_line: LineWriter) -> T:
    """Return what `work` returns; retry for a minute while another dvc holds DVC's locks."""
    for _ in range(_BUSY_TRIES):
        try:
            return work()
        except graph.BusyError:
            write_line(f"another dvc process is running in this workspace; retrying in {_BUSY_SECONDS:g} s")
            time.sleep(_BUSY_SECONDS)
    return work()


def run_command(site: Site, name: str, command: list[str], write_line: LineWriter) -> tuple[int, list[str]]:
    """Run another command (dvc pull, evaluating a champion) like a stage; return its exit code and last lines."""
    code, _, lines = _run(site, name, command, write_line)
    return code, list(lines)


def quote_lines(lines: Iterable[str]) -> str:
    """Return the last lines of a process, indented, as an error message shows them."""
    return "\n".join(f"    {line}" for line in lines)


def _reproduce(site: Site, name: str, write_line: LineWriter, *, force: bool) -> dict[str, int | None]:
    """Run `dvc repro` of one stage; return the events read from its output."""
    code, events, lines = _run(site, name, graph.reproduce_command(name, force=force, pull=site.pulls), write_line)
    if code and "busy" in events and "ran" not in events:
        raise graph.BusyError(f"stage {name}: another dvc process is running in this workspace. Wait for it or stop it")
    if code:
        raise _explain_failure(site, name, code, events, lines)
    return events


def _run(
    site: Site, name: str, command: list[str], write_line: LineWriter
) -> tuple[int, dict[str, int | None], deque[str]]:
    """Run a command under a supervisor; return its exit code, DVC's events, and the last lines that are not DVC's."""
    earlier = _read_record(site.record(name, "exit"))
    resumes = earlier is not None and earlier.get("code") == TemporaryError.exit_code
    for kind in ("exit", "dvc"):
        site.record(name, kind).unlink(missing_ok=True)
    progress_path(site.root, name).unlink(missing_ok=True)  # that of an earlier start must not be shown for this one
    events: dict[str, int | None] = {}
    lines: deque[str] = deque(maxlen=_QUOTED_LINES)
    log = site.log(name)
    # The child writes to the file, not to a pipe to this process: it can still print and save after this process dies.
    with open_log(log, resumes=resumes) as file:
        start = log.stat().st_size
        child = _start(site, name, command, file.fileno())
        live = LiveLine(progress_path(site.root, name))
        try:
            for line in _follow(log, start, child, live.draw):
                live.erase()
                event = graph.read_event(line)
                if event:
                    events[event[0]] = event[1]
                    if event[0] == "ran":
                        lines.clear()  # the lines before are DVC's own
                elif graph.is_hint(line):
                    continue
                if not event and not line.startswith("> "):
                    lines.append(line)
                write_line(line)
        finally:
            live.erase()
            end_supervised(child, site.record(name, "dvc"))
    return child.returncode, events, lines


def _start(site: Site, name: str, command: list[str], output: int) -> subprocess.Popen[bytes]:
    bin_folder = str(Path(sys.executable).parent)  # `ropeway` and `dvc` of this environment, activated or not
    environment = {
        **os.environ,
        **site.held.environment,
        "PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
    }
    supervisor = [sys.executable, "-m", "ropeway.runtime.supervise", "--record", str(site.record(name, "dvc"))]
    supervisor += ["--leader", str(os.getpid()), "--margin", str(MARGIN_SECONDS), "--", *command]
    return subprocess.Popen(
        supervisor,
        cwd=site.root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches this process, which then terminates the child
        pass_fds=[]
        if site.held.handle is None
        else [site.held.handle],  # the lock is held as long as the process tree lives
    )


def _follow(log: Path, start: int, child: subprocess.Popen[bytes], on_wait: Callable[[], None]) -> Iterator[str]:
    """Yield a growing file's lines until the child has ended and everything is read; call `on_wait` at each wait."""
    fold = LineCollapser()
    with log.open("rb") as file:
        file.seek(start)
        ended = False
        while not ended:
            ended = child.poll() is not None  # checked before reading, so that the last lines are read
            while data := file.read(1 << 16):
                yield from fold.feed(data)
            if not ended:
                on_wait()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(_POLL_SECONDS)
    yield from fold.feed(b"", last=True)


def end_supervised(child: subprocess.Popen[Any], record: Path, *, margins: int = 2) -> None:
    """End a supervisor, which ends its process tree; `margins`: one more than there are supervisors below it."""
    if child.poll() is None:
        seconds = grace_seconds(stop_files(record)) + margins * MARGIN_SECONDS
        child.terminate()
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _explain_failure(
    site: Site, name: str, code: int, events: dict[str, int | None], lines: deque[str]
) -> RopewayError:
    """Return the error that describes a failed stage; its class decides whether a retry makes sense."""
    own, outer = _read_record(site.record(name, "exit")), _read_record(site.record(name, "dvc"))
    end = f"; full log: {site.log(name)}"
    how = "its supervisor was killed" if code < 0 else signal_of(code)
    if outer and code >= 0:
        how = outer["why"] or outer["signal"]
    if how:
        return StageStoppedError(
            f"stage {name}: dvc was ended from outside ({how}). Run the same command again; it resumes{end}"
        )
    stage_code = own["code"] if own else events.get("failed") or code
    ended_by = own["signal"] if own else f"signal {-stage_code}" if stage_code < 0 else None
    what = f"was ended by {ended_by}" if ended_by else f"failed with exit code {stage_code}"
    quote = quote_lines(lines)
    kind, remedy = TemporaryError if ended_by else error_class(stage_code), ""
    if kind is RopewayError and (told := find_disk_error(site.root, lines)):
        kind, remedy = type(told), f"\n  {told}"
    return kind(f"stage {name} {what}; last lines:\n{quote}\n  full log: {site.log(name)}{remedy}")


def _read_record(path: Path) -> ExitRecord | None:
    """Return a supervisor's exit record, or None if the file is missing or not an exit record."""
    with suppress(OSError, ValueError):
        record = json.loads(path.read_bytes())
        if isinstance(record, dict) and {"code", "signal", "why"} <= record.keys():
            return cast("ExitRecord", record)
    return None


@dataclass
class LineCollapser:
    """Splits a byte stream into lines; of text that a carriage return overwrites only one state per 5 s is kept."""

    clock: Callable[[], float] = time.monotonic
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )
    _line: str = ""
    _overwritten: str = ""
    _shown_at: float = float("-inf")

    def feed(self, data: bytes, *, last: bool = False) -> Iterator[str]:
        """Yield the lines that `data` completes and, if `last`, the rest."""
        text = self._decoder.decode(data, final=last)
        if text.endswith("\r") and not last:  # its newline may follow
            text, pending = text[:-1], "\r"
        else:
            pending = ""
        for part in _ENDS.split(self._line + text):
            if part in ("\n", "\r\n"):
                yield from self._show(self._line or self._overwritten)
                self._overwritten = ""
            elif part == "\r":
                self._overwritten = self._line or self._overwritten
                if self.clock() - self._shown_at >= _PROGRESS_SECONDS:
                    yield from self._show(self._overwritten)
                    self._shown_at, self._overwritten = self.clock(), ""
            self._line = "" if _ENDS.fullmatch(part) else part
        self._line += pending
        if last:
            yield from self._show(self._line or self._overwritten)
            self._line = self._overwritten = ""

    @staticmethod
    def _show(line: str) -> Iterator[str]:
        line = escape_controls(_ESCAPES.sub("", line).expandtabs().rstrip())
        if len(line) > _MAX_CHARACTERS:
            line = f"{line[:_MAX_CHARACTERS]}… (and {len(line) - _MAX_CHARACTERS:,} characters; the log file has them)"
        if line:
            yield line
