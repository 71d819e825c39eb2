"""`ropeway logs`: the lines of a stage, those of a running one as they come, stage after stage of a run."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ropeway.config.suggestion import unknown_name
from ropeway.orchestration.dvc_graph import is_hint
from ropeway.orchestration.dvc_stage import LineCollapser
from ropeway.orchestration.status import read_running
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.stage_log import file_name, log_path, split_rank
from ropeway.runtime.workspace import list_by_time

_POLL_SECONDS = 0.2
_TAIL_BYTES = 1 << 20  # that are read at least
_LINE_BYTES = 1 << 10  # of a line, about
_CHECK_SECONDS = 1.0  # how often the process table is searched for the stage


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a stage's log; `rank` is that of a training rank other than 0, which marks its lines."""

    stage: str
    rank: int | None
    line: str


def choose_stage(root: Path, stage: str | None, profile: str | None) -> str:
    """Return the stage whose log is meant: the named one, else the running one, else the one that wrote last.

    Raises:
        ConfigError: There is no log of that stage, or it is of another profile.
        DataError: No stage has run here.
    """
    logs = list_by_time(log_path(root, "x").parent, "*.log")
    names = [path.stem for path in logs]
    if not logs:
        raise DataError(f"{root}: there is no log, since no stage has run here. `ropeway run` writes them")
    running = read_running(root)
    chosen = stage or (running.stage if running and running.stage in names else names[-1])
    if chosen is None or file_name(chosen) not in names:
        raise ConfigError(f"the log of stage '{chosen}' {unknown_name(str(chosen), names)}")
    if profile and (other := _profile_of(log_path(root, chosen))) not in (None, profile):
        raise ConfigError(
            f"the log of {chosen} is of profile '{other}'; a log is that of the last run. "
            f"`ropeway logs {chosen} --profile {other}`"
        )
    return chosen


def _profile_of(path: Path) -> str | None:
    """Return the profile in the line that DVC prints of a stage's command; None if the log has none."""
    with path.open("rb") as file:
        head = file.read(1 << 14).decode(errors="replace")
    for line in head.splitlines():
        words = line.split()
        if words[:3] == ["ropeway", "stage", path.stem] or words[:4] == [">", "ropeway", "stage", path.stem]:
            return words[-1] if words[-1] != path.stem else None
    return None


def read_tail(root: Path, stage: str, lines: int) -> list[LogLine]:
    """Return the last lines of a stage's log."""
    with log_path(root, stage).open("rb") as file:
        _skip_to_tail(file, lines)
        return list(
            deque(_parse(stage, LineCollapser(), iter(lambda: file.read(1 << 16), b""), last=True), maxlen=lines)
        )


def _skip_to_tail(file: BinaryIO, lines: int) -> None:
    """Go to the beginning of a line near the end: a log is read in full only if it is small."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - max(_TAIL_BYTES, lines * _LINE_BYTES))
    file.seek(start)
    if start:
        file.readline(_TAIL_BYTES)


def follow(root: Path, stage: str | None, *, first: str, lines: int) -> Iterator[LogLine]:
    """Yield the last lines of stage `first`, then what it prints until it ends.

    Without `stage` also what the later stages of the same run print, until the run ends.
    """
    current = first
    yield from follow_stage(root, current, lines, partial(_is_running, root, current))
    while stage is None:
        work = read_running(root)
        if work is None:
            return
        if work.stage and work.stage != current and log_path(root, work.stage).is_file():
            current = work.stage
            yield from follow_stage(root, current, None, partial(_is_running, root, current))
        else:
            time.sleep(_POLL_SECONDS)


def _is_running(root: Path, stage: str) -> bool:
    work = read_running(root)
    return work is not None and work.stage == stage


def follow_stage(root: Path, stage: str, lines: int | None, is_running: Callable[[], bool]) -> Iterator[LogLine]:
    """Yield the last `lines` of a log (None: all), then what is appended until the stage has ended."""
    collapser = LineCollapser()
    with log_path(root, stage).open("rb") as file:
        if lines is not None:
            _skip_to_tail(file, lines)
        known = list(_parse(stage, collapser, iter(lambda: file.read(1 << 16), b"")))
        yield from known if lines is None else known[len(known) - min(lines, len(known)) :]
        checked, ended = time.monotonic(), not is_running()
        while True:
            if data := file.read(1 << 16):
                yield from _parse(stage, collapser, [data])
            elif ended:
                break
            else:
                time.sleep(_POLL_SECONDS)
                if time.monotonic() - checked >= _CHECK_SECONDS:
                    checked, ended = time.monotonic(), not is_running()
    yield from _parse(stage, collapser, [], last=True)


def _parse(stage: str, collapser: LineCollapser, blocks: Iterable[bytes], *, last: bool = False) -> Iterator[LogLine]:
    """Yield the lines that blocks of a log complete, without the advice that DVC prints after every stage."""
    for data in (*blocks, *([b""] if last else [])):
        for line in collapser.feed(data, last=last and not data):
            if not is_hint(line):
                yield LogLine(stage, *split_rank(line))
