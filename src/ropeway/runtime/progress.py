"""Progress of a training attempt: printed lines, a JSON record per step, a summary at the end; and of other stages.

All of it depends on the clock or the machine, so it is not part of steps.csv or the signed package.
"""

import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TextIO, TypeVar

T = TypeVar("T")
Line = dict[str, Any]  # one step of the log, with its throughput and memory
_RECENT_STEPS = 20
_BAR_CELLS = 20
_LOG_LINES = 10  # lines in a log that is not a terminal, one per 10 % of the steps
_MINUTE = 60
_SUMMED = ("seconds", "tokens", "supervised_tokens", "model_flops")
_ERASE_LINE = "\r\x1b[2K"


class StepPrinter:
    """Prints steps: one line updated in place on a terminal; elsewhere one line per 10 % of the steps.

    The first step of an attempt, the last step, every evaluation, every skipped step and every event stay on the
    terminal and are always in the log.
    """

    def __init__(self) -> None:
        """Start without a line to update."""
        self._is_first = True
        self._is_line_open = False

    def print_step(self, line: Line) -> None:
        """Print a step, or update the line in place."""
        is_kept = self._is_first or is_milestone(line)
        self._is_first = False
        if is_kept or (not _is_terminal() and completes_tenth(line)):
            self.print_event(describe(line))
        elif _is_terminal():
            self.update(describe(line))

    def update(self, text: str) -> None:
        """Print a line that the next one replaces, cut to the terminal's width."""
        columns = shutil.get_terminal_size().columns
        print(_ERASE_LINE + text[: columns - 1], end="", flush=True)
        self._is_line_open = True

    def erase(self) -> None:
        """Erase the line that is updated in place."""
        if self._is_line_open:
            print(_ERASE_LINE, end="", flush=True)
            self._is_line_open = False

    def print_event(self, text: str) -> None:
        """Print a line that stays."""
        print(_ERASE_LINE + text if self._is_line_open else text, flush=True)
        self._is_line_open = False

    def __enter__(self) -> Self:
        """Return the printer; within `with` nothing else should print."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the line that is updated in place, so that other output starts on a new line."""
        if self._is_line_open:
            print(flush=True)
            self._is_line_open = False


def is_live_terminal(stream: TextIO) -> bool:
    """Return whether a line can be updated in place: at a terminal that moves its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _is_terminal() -> bool:
    return is_live_terminal(sys.stdout)


def is_milestone(line: Line) -> bool:
    """Return whether a step always gets a line that stays: the last one, a skipped one, or one with an evaluation.

    >>> [is_milestone({"step": step, "total_steps": 9, "applied": 1}) for step in (3, 9)]
    [False, True]
    """
    return line["step"] == line["total_steps"] or not line["applied"] or bool(_evaluated(line))


def completes_tenth(line: Line) -> bool:
    """Return whether a step is the first to reach another 10 % of the steps.

    >>> [step for step in range(1, 25) if completes_tenth({"step": step, "total_steps": 24})]
    [3, 5, 8, 10, 12, 15, 17, 20, 22, 24]
    """
    step, total = line["step"], line["total_steps"]
    return bool(step * _LOG_LINES // total > (step - 1) * _LOG_LINES // total)


@dataclass
class Progress:
    """Progress of one start of a training run.

    Attributes:
        facts: What the attempt runs on, copied into its summary.
        lines: `.work/train.progress.jsonl`, one record per step.
        attempts: `attempts.jsonl`, one summary per start of this run.
        peak_flops: Peak throughput of all GPUs together, FLOP/s; None where it is not known.
        mirror: Receives every step as well, e.g. for W&B; must not block.
    """

    facts: dict[str, Any]
    lines: Path
    attempts: Path
    peak_flops: float | None
    mirror: Callable[[Line], None]
    clock: Callable[[], float] = time.monotonic
    began: float = field(default_factory=time.time)
    totals: Line = field(default_factory=lambda: dict.fromkeys(_SUMMED, 0))
    checkpoints: int = 0
    checkpoint_seconds: float = 0.0
    peak_memory_bytes: int = 0
    rewinds: int = 0
    printer: StepPrinter = field(default_factory=StepPrinter)

    def __post_init__(self) -> None:
        """Start the clock."""
        self._marks: deque[float] = deque([self.clock()], maxlen=_RECENT_STEPS + 1)
        self._first = self._marks[0]

    def show(self, line: Line) -> None:
        """Print a step, append it to `lines` and pass it to the mirror."""
        for name in _SUMMED:
            self.totals[name] += line[name]
        self.peak_memory_bytes = max(self.peak_memory_bytes, line["peak_memory_bytes"])
        self._marks.append(self.clock())
        full = {**line, **self._rates(line), "checkpoint_seconds": self.checkpoint_seconds}
        full["eta_seconds"] = self._eta(line)
        with suppress(OSError):  # on a full disk, the next save raises the error; a lost line must not end the run
            self.printer.print_step(full)
            _append(self.lines, full)
        self.mirror(full)

    def saved(self, step: int, waited: float, background: float | None = None) -> None:
        """Record and print a checkpoint; training waited for `waited` seconds.

        Args:
            step: The step of the checkpoint.
            waited: Seconds that training waited.
            background: Seconds from beginning to end of a save in the background.
        """
        self.checkpoints += 1
        self.checkpoint_seconds += waited
        text = f"checkpoint of step {step} saved in {waited if background is None else background:.1f} s"
        if background is not None:
            text += f", of which training waited {waited:.1f} s"
        with suppress(OSError):
            self.printer.print_event(text)

    def write(self, *, ended: str, more: Mapping[str, object]) -> None:
        """Append the summary of this attempt to `attempts`."""
        elapsed = self.clock() - self._first
        record = {
            **self.facts,
            "began": self.began,
            "wall_seconds": elapsed,  # with evaluation and saving; `seconds` are those of the steps alone
            **self.totals,
            **self._rates(self.totals),
            "peak_memory_bytes": self.peak_memory_bytes,
            "checkpoints": self.checkpoints,
            "checkpoint_seconds": self.checkpoint_seconds,
            "checkpoint_stall_fraction": self.checkpoint_seconds / elapsed if elapsed else None,
            "rewinds": self.rewinds,
            "ended": ended,
            **more,
        }
        with suppress(OSError):  # the error that ended the run is the one to report
            _append(self.attempts, record)

    def _rates(self, line: Line) -> Line:
        seconds = line["seconds"]
        if not seconds:
            return dict.fromkeys(("tokens_per_second", "supervised_tokens_per_second", "mfu"))
        return {
            "tokens_per_second": line["tokens"] / seconds,
            "supervised_tokens_per_second": line["supervised_tokens"] / seconds,
            "mfu": line["model_flops"] / seconds / self.peak_flops if self.peak_flops else None,
        }

    def _eta(self, line: Line) -> float:
        """Return the remaining seconds at the pace of recent steps, including evaluation and saving."""
        pace = (self._marks[-1] - self._marks[0]) / (len(self._marks) - 1)
        return float(pace * (line["total_steps"] - line["step"]))


PROGRESS_FILE = "ROPEWAY_PROGRESS_FILE"  # path of the stage's progress file, set for its process
_TAIL_BYTES = 1 << 16  # a record is about 1 kB
_RECORD_SECONDS = 1.0  # between records of a stage that does not train
_LINE_SECONDS = 15.0  # between its lines in a log
_MIB = 2**20


class StageProgress:
    """Progress of a stage that does not train: how much is done, of how much, and the time left.

    Writes a record per second into the stage's progress file and prints a line every 15 s, on a terminal one line
    that is updated in place. Does nothing where the environment names no file, e.g. in a second worker process.
    """

    def __init__(
        self, unit: str, total: int | None, *, path: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the clock.

        Args:
            unit: What is counted, in the plural, e.g. "batches"; "bytes" are shown in MiB.
            total: How much there is; None where it is not known, which leaves no time to estimate.
            path: The progress file; default: that of the stage that this process runs.
            clock: Returns seconds.
        """
        named = os.environ.get(PROGRESS_FILE)
        self._path = path or (Path(named) if named else None)
        self._unit, self._total, self._clock = unit, total, clock
        self._done = self._skipped = 0
        self._began = self._recorded_at = self._printed_at = clock()
        self._printer = StepPrinter()

    def skip(self, count: int) -> None:
        """Count what an earlier attempt has done; it does not enter the estimate of the time left."""
        self._done += count
        self._skipped += count

    def advance(self, count: int = 1) -> None:
        """Count what was done since the last call."""
        self._done += count
        now = self._clock()
        if self._path is None or now - self._recorded_at < _RECORD_SECONDS:
            return
        self._recorded_at = now
        total = self._total if self._total and self._done <= self._total else None  # it was an expectation
        record: Line = {"step": self._done, "total_steps": total, "unit": self._unit, "eta_seconds": None}
        if total and (done := self._done - self._skipped):
            record["eta_seconds"] = (now - self._began) / done * (total - self._done)
        with suppress(OSError):  # a full disk is reported by what the stage writes
            _append(self._path, record)
            if _is_terminal():
                self._printer.update(describe_record(record))
            elif now - self._printed_at >= _LINE_SECONDS:
                self._printed_at = now
                print(describe_record(record), flush=True)

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """Erase the line that is updated in place."""
        self._printer.erase()


def track(items: Sequence[T], unit: str) -> Iterator[T]:
    """Yield items and report each as done once the next one is requested; see `StageProgress`."""
    with StageProgress(unit, len(items)) as progress:
        for item in items:
            yield item
            progress.advance()


def describe_record(record: Line) -> str:
    """Return a record of any stage's progress file in one line.

    >>> describe_record({"step": 5, "total_steps": 10, "unit": "batches", "eta_seconds": 61})
    '[==========          ] 5 of 10 batches  1 min 1 s left'
    >>> describe_record({"step": 3 * 2**20, "total_steps": None, "unit": "bytes", "eta_seconds": None})
    '3 MiB so far'
    """
    if "loss" in record:
        return describe(record)
    count = describe_count(record)
    if not record.get("total_steps"):
        return f"{count} so far"
    bar = "=" * (record["step"] * _BAR_CELLS // record["total_steps"])
    left = record.get("eta_seconds")
    return f"[{bar:<{_BAR_CELLS}}] {count}" + (f"  {format_seconds(left)} left" if left is not None else "")


def describe_count(record: Line) -> str:
    """Return how much is done.

    >>> describe_count({"step": 5, "total_steps": 1000})
    'step 5 of 1,000'
    """
    done, total, unit = record["step"], record.get("total_steps"), record.get("unit")
    if unit == "bytes":
        done, total, unit = done // _MIB, total and -(-total // _MIB), "MiB"
    counted = f"{done:,} of {total:,}" if total else f"{done:,}"
    return f"{counted} {unit}" if unit else f"step {counted}"


class LiveLine:
    """The last line of a terminal, which shows another process's progress file; nothing on what is no terminal."""

    def __init__(self, path: Path) -> None:
        """Show the last record of a progress file."""
        self._path, self._printer, self._shown = path, StepPrinter(), ""
        self._is_terminal = _is_terminal()

    def draw(self) -> None:
        """Draw the line if the record changed."""
        if self._is_terminal and (record := read_last_record(self._path)):
            text = describe_record(record)
            if text != self._shown:
                self._printer.update(f"  {text}")
                self._shown = text

    def erase(self) -> None:
        """Erase the line, so that another one can be printed."""
        if self._is_terminal:
            self._printer.erase()
            self._shown = ""


def read_last_record(path: Path) -> Line | None:
    """Return the last complete record of a progress file; None if there is none.

    It has a valid `step`, and `total_steps` unless that is not known (None). A record without its newline is still
    being written.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            *lines, _ = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):
            record: Line = json.loads(line)
            step, total = int(record["step"]), record["total_steps"]
            if step >= 0 and (total is None or 0 < int(total) >= step):
                return record
    return None


def _append(path: Path, record: Line) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def describe(line: Line) -> str:
    """Return one line per step: bar, step, time left, loss, learning rate, gradient norm, throughput and memory."""
    done = line["step"] * _BAR_CELLS // line["total_steps"]
    bar = f"[{'=' * done}{' ' * (_BAR_CELLS - done)}] step {line['step']}/{line['total_steps']}"
    if line.get("left_out"):
        return "  ".join([bar, f"not trained: {line['left_out']} rows left out after a rewind", *_validation(line)])
    parts = [
        bar,
        f"{format_seconds(line['eta_seconds'])} left",
        f"loss {line['loss']:.4f}",
        f"lr {line['learning_rate']:.2e}",
        f"grad norm {line['grad_norm']:.2f}" if line["grad_norm"] is not None else "grad norm -",
    ]
    if line["loss_scale"] != 1:
        parts.append(f"loss scale {line['loss_scale']:g}")
    if not line["applied"]:
        parts.append(f"SKIPPED: gradient overflow ({line['skipped_steps']} so far)")
    elif line["skipped_steps"]:
        parts.append(f"{line['skipped_steps']} skipped so far")
    parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
    if line["mfu"] is not None:
        parts.append(f"MFU {line['mfu']:.1%}")
    parts.append(f"peak memory {line['peak_memory_bytes'] / 2**30:.1f} GiB")
    return "  ".join([*parts, *_validation(line)])


def _evaluated(line: Line) -> list[str]:
    """Return the keys of a step's validation losses; empty if no evaluation followed the step."""
    return [key for key in line if key.startswith("validation_")]


def _validation(line: Line) -> list[str]:
    losses = ((key.removeprefix("validation_"), line[key]) for key in _evaluated(line))
    formatted = ", ".join(f"{source} {loss:.3f}" for source, loss in losses if loss is not None)
    return [f"validation loss: {formatted}"] if formatted else []


def format_seconds(seconds: float) -> str:
    """Return a duration with units.

    >>> format_seconds(42.4), format_seconds(754), format_seconds(100_000)
    ('42 s', '12 min 34 s', '27 h 46 min')
    """
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    minutes, rest = divmod(whole, _MINUTE)
    return f"{minutes} min {rest} s" if minutes < _MINUTE else f"{minutes // 60} h {minutes % 60} min"
