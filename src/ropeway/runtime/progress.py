"""How an attempt goes: one line per step for people, one for programs, and its record in the end.

Everything here depends on the clock or the machine, so none of it is in steps.csv or in what is signed.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = dict[str, Any]  # a step of the log, with what the machine did for it
_RECENT_STEPS = 20
_BAR_CELLS = 20
_MINUTE = 60
_SUMMED = ("seconds", "tokens", "supervised_tokens", "model_flops")


@dataclass
class Progress:
    """One start of a run.

    Attributes:
        attempts: `attempts.jsonl`, one record per start of this run.
        peak_flops: What all cards together could do, FLOP/s; None where nobody states it.
        mirror: Gets every line as well, e.g. to W&B; must not block.
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

    def __post_init__(self) -> None:
        """Start the clock."""
        self._marks: deque[float] = deque([self.clock()], maxlen=_RECENT_STEPS + 1)
        self._first = self._marks[0]

    def show(self, line: Line) -> None:
        """Print a step, and leave it where the flow and the mirror read it."""
        for name in _SUMMED:
            self.totals[name] += line[name]
        self.peak_memory_bytes = max(self.peak_memory_bytes, line["peak_memory_bytes"])
        self._marks.append(self.clock())
        full = {**line, **self._rates(line), "checkpoint_seconds": self.checkpoint_seconds}
        full["eta_seconds"] = self._eta(line)
        with suppress(OSError):  # a full disk ends the run at its next save, with words; not here, for a line
            print(describe(full), flush=True)
            _append(self.lines, full)
        self.mirror(full)

    def saved(self, seconds: float) -> None:
        """Count the time that training stood still for a checkpoint."""
        self.checkpoints += 1
        self.checkpoint_seconds += seconds

    def write(self, *, ended: str, more: Mapping[str, object]) -> None:
        """Append this attempt's record to the run's list."""
        elapsed = self.clock() - self._first
        record = {
            **self.facts,
            "began": self.began,
            "seconds": time.time() - self.began,
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
        with suppress(OSError):  # the error that ended the run is the one to tell
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
        """Return the seconds left at the pace of recent steps, evaluation and saving among them."""
        pace = (self._marks[-1] - self._marks[0]) / (len(self._marks) - 1)
        return float(pace * (line["total_steps"] - line["step"]))


def _append(path: Path, record: Line) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def describe(line: Line) -> str:
    """Return a step in one line: bar, step, what was learned, how fast, and how long it will take."""
    done = line["step"] * _BAR_CELLS // line["total_steps"]
    bar = f"[{'=' * done}{' ' * (_BAR_CELLS - done)}] step {line['step']}/{line['total_steps']}"
    if line.get("left_out"):
        return "  ".join([bar, f"its {line['left_out']} rows are LEFT OUT", *_validation(line)])
    parts = [
        bar,
        f"loss {line['loss']:.4f}",
        f"lr {line['learning_rate']:.2e}",
        f"norm {line['grad_norm']:.2f}" if line["grad_norm"] is not None else "norm -",
    ]
    if line["loss_scale"] != 1:
        parts.append(f"scale {line['loss_scale']:g}")
    if line["skipped_steps"]:
        parts.append(f"{line['skipped_steps']} skipped" if line["applied"] else f"SKIPPED ({line['skipped_steps']})")
    parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
    if line["mfu"] is not None:
        parts.append(f"MFU {line['mfu']:.1%}")
    parts.append(f"{line['peak_memory_bytes'] / 2**30:.1f} GiB")
    parts.append(f"{say_seconds(line['eta_seconds'])} left")
    return "  ".join([*parts, *_validation(line)])


def _validation(line: Line) -> list[str]:
    return [
        f"validation {key.removeprefix('validation_')} {value:.3f}"
        for key, value in line.items()
        if key.startswith("validation_") and value is not None
    ]


def say_seconds(seconds: float) -> str:
    """Return a duration as a person reads it.

    >>> say_seconds(42.4), say_seconds(754), say_seconds(100_000)
    ('42 s', '12 min 34 s', '27 h 46 min')
    """
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    minutes, rest = divmod(whole, _MINUTE)
    return f"{minutes} min {rest} s" if minutes < _MINUTE else f"{minutes // 60} h {minutes % 60} min"
