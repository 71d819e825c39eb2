"""One stage, brought up to date by `dvc repro` in a supervised process of its own; its lines as they come."""

import codecs
import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from ropeway.orchestration import dvc_graph as graph
from ropeway.runtime.errors import ConfigError, DataError, RopewayError, TemporaryError
from ropeway.runtime.lock import Held
from ropeway.runtime.supervise import GRACE_SECONDS, ExitRecord
from ropeway.runtime.workspace import Workspace

Say = Callable[[str], None]
T = TypeVar("T")
_BUSY_TRIES, _BUSY_SECONDS = 20, 3.0  # another dvc hashes its outputs under its lock; a 26 GB model takes 35 s
_MARGIN_SECONDS = 15.0  # the outer supervisor waits longer than the inner one needs to kill
_QUOTED_LINES = 15
_LOOK_SECONDS = 0.1
_MAX_CHARACTERS = 2000  # Prefect cuts a line at 1 MB (3.9.1), a page is slow long before
_PROGRESS_SECONDS = 5.0  # one state of a progress bar in so long
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_ENDS = re.compile(r"(\r\n|\n|\r)")


class StageStoppedError(TemporaryError):
    """Somebody ended dvc itself: that is a wish to stop, so the stage is not tried again by this run."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where stages run: a workspace that this process has locked.

    Attributes:
        pulls: A DVC remote answers: what its run-cache knows of a stage is fetched from there rather than made.
        definition: What the run was planned from (`graph.read_definition`); a stage is not run by another.
    """

    root: Path
    held: Held
    pulls: bool = False
    definition: Mapping[str, str] | None = None

    def record(self, name: str, kind: str) -> Path:
        """Return the exit record that a supervisor leaves: kind `exit` is the stage's own, `dvc` that of its dvc."""
        return self.root / ".work" / f"{_file_name(name)}.{kind}.json"

    def log(self, name: str) -> Path:
        """Return a stage's full log."""
        return log_path(self.root, name)


def log_path(root: Path, name: str) -> Path:
    """Return where a stage's full log is."""
    return root / ".work" / "logs" / f"{_file_name(name)}.log"


def progress_path(root: Path, name: str) -> Path:
    """Return where a stage writes how far it has come, if it does."""
    return Workspace(root, "").progress(_file_name(name))


def bring_up(site: Site, name: str, say: Say, *, anew: bool = False) -> str:
    """Bring one stage up to date; return what DVC did: `ran`, `restored` or `unchanged`.

    `say` gets every line as it comes, folded and capped; the full text is in `site.log(name)`. `anew` runs the stage
    whatever DVC knows of it.

    Raises:
        ConfigError: The stage ended with 64: what params.yaml asks for cannot be run. Or dvc.yaml was edited.
        DataError: It ended with 65.
        TemporaryError: It ended with 75 or by a signal: run again, it resumes. Or another dvc kept DVC's locks.
        StageStoppedError: dvc was ended from outside.
        RopewayError: Anything else; the stage's last lines are quoted.
    """
    if site.definition is not None:
        graph.check_definition(site.root, site.definition)
    before = _lock_entry(site.root, name)
    events = patiently(partial(_reproduce, site, name, say, anew=anew), say)
    return find_outcome(site, name, events, changed=_lock_entry(site.root, name) != before)


def find_outcome(site: Site, name: str, events: Mapping[str, int | None], *, changed: bool) -> str:
    """Return what became of a stage that did not fail.

    A stage of ours that ran has an exit record; `changed` says whether its entry of dvc.lock is another. Of the rest
    DVC's own words (`events`) decide: whether a stage of somebody else's ran, whether missing files are back.
    """
    if _read_record(site.record(name, "exit")) is not None:
        return "ran"
    said = next((outcome for outcome in ("ran", "restored", "unchanged") if outcome in events), "unchanged")
    return "restored" if changed and said == "unchanged" else said


def _lock_entry(root: Path, name: str) -> object:
    """Return a stage's entry of dvc.lock, None where there is none that can be read: DVC says then what is wrong."""
    with suppress(OSError, ConfigError):
        stages: object = graph.parse_lock((root / "dvc.lock").read_bytes()).get("stages")
        return stages.get(name) if isinstance(stages, dict) else None
    return None


def patiently(work: Callable[[], T], say: Say) -> T:
    """Return what `work` returns, asking again for a minute while another dvc is at work."""
    for _ in range(_BUSY_TRIES):
        try:
            return work()
        except graph.BusyError:
            say(f"another dvc is at work in this workspace; trying again in {_BUSY_SECONDS:g} s")
            time.sleep(_BUSY_SECONDS)
    return work()


def run_command(site: Site, name: str, command: list[str], say: Say) -> tuple[int, list[str]]:
    """Run something else (dvc pull, measuring a champion) as a stage is run; return its code and last lines."""
    code, _, lines = _run(site, name, command, say)
    return code, list(lines)


def _reproduce(site: Site, name: str, say: Say, *, anew: bool) -> dict[str, int | None]:
    """Run `dvc repro` of one stage; return what DVC said."""
    code, events, lines = _run(site, name, graph.reproduce_command(name, anew=anew, pull=site.pulls), say)
    if code and "busy" in events and "ran" not in events:
        raise graph.BusyError(f"stage {name}: another dvc is at work in this workspace; wait for it or stop it")
    if code:
        raise _explain_failure(site, name, code, events, lines)
    return events


def _run(site: Site, name: str, command: list[str], say: Say) -> tuple[int, dict[str, int | None], deque[str]]:
    """Run a command under a supervisor; return its code, what DVC said, and the last lines that are not DVC's."""
    earlier = _read_record(site.record(name, "exit"))
    resumes = earlier is not None and earlier.get("code") == TemporaryError.exit_code
    for kind in ("exit", "dvc"):
        site.record(name, kind).unlink(missing_ok=True)
    progress_path(site.root, name).unlink(missing_ok=True)  # an earlier start's is not taken for this one's
    events: dict[str, int | None] = {}
    lines: deque[str] = deque(maxlen=_QUOTED_LINES)
    log = site.log(name)
    log.parent.mkdir(parents=True, exist_ok=True)
    # The child writes to the file itself, not to a pipe from us: it can still print, and save, when we are dead.
    with log.open("ab" if resumes else "wb") as file:
        start = file.tell()
        child = _start(site, name, command, file.fileno())
        try:
            for line in _follow(log, start, child):
                event = graph.read_event(line)
                if event:
                    events[event[0]] = event[1]
                    if event[0] == "ran":
                        lines.clear()  # what came before is DVC's own talk
                elif graph.is_hint(line):
                    continue
                if not event and not line.startswith("> "):
                    lines.append(line)
                say(line)
        finally:
            _end(child)
    return child.returncode, events, lines


def _start(site: Site, name: str, command: list[str], output: int) -> subprocess.Popen[bytes]:
    bin_folder = str(Path(sys.executable).parent)  # `ropeway` and `dvc` of this very environment, active or not
    environment = {
        **os.environ,
        **site.held.environment,
        "PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
    }
    supervisor = [sys.executable, "-m", "ropeway.runtime.supervise", "--record", str(site.record(name, "dvc"))]
    supervisor += ["--leader", str(os.getpid()), "--grace", str(_grace_seconds()), "--", *command]
    return subprocess.Popen(
        supervisor,
        cwd=site.root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches us, and we ask it
        pass_fds=[] if site.held.handle is None else [site.held.handle],  # the lock lasts as long as the tree
    )


def _follow(log: Path, start: int, child: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yield a growing file's lines until the child has ended and all is read."""
    fold = Folder()
    with log.open("rb") as file:
        file.seek(start)
        ended = False
        while not ended:
            ended = child.poll() is not None  # asked before reading, so what it wrote last is read
            while data := file.read(1 << 16):
                yield from fold.feed(data)
            if not ended:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(_LOOK_SECONDS)
    yield from fold.feed(b"", last=True)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Leave no supervisor behind, whatever ended us; it ends its tree."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_grace_seconds() + _MARGIN_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _grace_seconds() -> float:
    return float(os.environ.get("ROPEWAY_GRACE_SECONDS", GRACE_SECONDS)) + _MARGIN_SECONDS


def _explain_failure(
    site: Site, name: str, code: int, events: dict[str, int | None], lines: deque[str]
) -> RopewayError:
    """Return the error that says what became of a stage; its class says what can be done about it."""
    own, outer = _read_record(site.record(name, "exit")), _read_record(site.record(name, "dvc"))
    end = f"; its log: {site.log(name)}"
    if code < 0 or (outer and (outer["signal"] or outer["why"])):
        how = "its supervisor was killed" if code < 0 or outer is None else outer["why"] or outer["signal"]
        return StageStoppedError(
            f"stage {name}: dvc was ended from outside ({how}). Run the same command again, it resumes{end}"
        )
    stage_code = own["code"] if own else events.get("failed") or code
    died_of = own["signal"] if own else f"signal {-stage_code}" if stage_code < 0 else None
    what = f"was ended by {died_of}" if died_of else f"failed with exit code {stage_code}"
    quote = "\n".join(f"    {line}" for line in lines)
    kinds = {64: ConfigError, 65: DataError, 75: TemporaryError}
    kind: type[RopewayError] = TemporaryError if died_of else kinds.get(stage_code, RopewayError)
    return kind(f"stage {name} {what}; its last lines:\n{quote}\n  full log: {site.log(name)}")


def _read_record(path: Path) -> ExitRecord | None:
    """Return a supervisor's exit record; None where there is none, or a file that is none."""
    with suppress(OSError, ValueError):
        record = json.loads(path.read_bytes())
        if isinstance(record, dict) and {"code", "signal", "why"} <= record.keys():
            return cast("ExitRecord", record)
    return None


def _file_name(stage: str) -> str:
    """Return a stage's name as a file can bear it: those of other folders have `/` and `:` in them."""
    return stage.replace("/", "-").replace(":", "-")


@dataclass
class Folder:
    """Turns bytes as they come into lines. What a carriage return overwrites is shown now and then, not every time."""

    clock: Callable[[], float] = time.monotonic
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )
    _line: str = ""
    _overwritten: str = ""
    _shown_at: float = float("-inf")

    def feed(self, data: bytes, *, last: bool = False) -> Iterator[str]:
        """Yield the lines that `data` completes; with `last`, what is left too."""
        text = self._decoder.decode(data, final=last)
        if text.endswith("\r") and not last:  # its newline may be on the way
            text, held = text[:-1], "\r"
        else:
            held = ""
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
        self._line += held
        if last:
            yield from self._show(self._line or self._overwritten)
            self._line = self._overwritten = ""

    @staticmethod
    def _show(line: str) -> Iterator[str]:
        line = _ESCAPES.sub("", line).rstrip()
        if len(line) > _MAX_CHARACTERS:
            line = f"{line[:_MAX_CHARACTERS]}… (and {len(line) - _MAX_CHARACTERS:,} characters; the log file has them)"
        if line:
            yield line
