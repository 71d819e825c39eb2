"""Starts a rehearsal's ranks as processes and compares their peaks with the planned ones. Does not load torch."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType

from ropeway.config.frozen import read_texts
from ropeway.config.params import Profile
from ropeway.config.zero import read_zero
from ropeway.data.accumulation import accumulation_steps
from ropeway.planning.memory import Load
from ropeway.planning.phases import PHASES, plan_phases
from ropeway.runtime.errors import ConfigError, RopewayError
from ropeway.runtime.terminal import AlignedTable, render
from ropeway.runtime.workspace import format_bytes

MODULE = "ropeway.engine_rehearsal"


@dataclass(frozen=True, slots=True)
class RankResult:
    """A rank's peaks in bytes by phase: planned, and measured on the card and on the host."""

    rank: int
    planned: dict[str, int]
    card: dict[str, int]
    host: dict[str, int]

    @property
    def difference(self) -> float:
        """Planned over rehearsed peak, minus 1."""
        return max(self.planned.values()) / max(self.card.values()) - 1


def read_and_rehearse(root: Path, profile: Profile, *, ranks: int) -> list[RankResult]:
    """Return the peaks of a workspace's profile; see `rehearse`."""
    text = read_texts(root, [profile.deepspeed_config], key="deepspeed_config")[profile.deepspeed_config]
    load = Load.of(profile, read_zero(text, profile.deepspeed_config), ranks=ranks)
    return rehearse(profile, text, load)


def rehearse(profile: Profile, deepspeed: str, load: Load) -> list[RankResult]:
    """Return planned and rehearsed peaks of the first and the last rank.

    Raises:
        ConfigError: The run cannot be rehearsed, or the number of ranks does not divide the batch.
        RopewayError: A rank failed; the message has its last lines.
    """
    check_rehearsable(profile, ranks=load.ranks)
    ranks = sorted({0, load.ranks - 1})
    with ThreadPoolExecutor(len(ranks)) as pool:
        peaks = list(pool.map(lambda rank: run_rank([(profile, deepspeed)], rank=rank, ranks=load.ranks)[0], ranks))
    return [
        RankResult(rank, planned_peaks(load, rank=rank), peak["card"], peak["host"])
        for rank, peak in zip(ranks, peaks, strict=True)
    ]


def planned_peaks(load: Load, *, rank: int) -> dict[str, int]:
    """Return a rank's planned peak in bytes by phase."""
    return {phase: sum(parts.values()) for phase, parts in plan_phases(load, rank=rank).items()}


def check_rehearsable(profile: Profile, *, ranks: int) -> None:
    """Raise ConfigError unless the run uses a flash kernel and the ranks divide its batch."""
    accumulation_steps(profile, ranks)
    if not profile.use_flash_attention or profile.dtype == "fp32":
        raise ConfigError(
            f"--engine: expected use_flash_attention true and dtype fp16 or bf16, found "
            f"{profile.use_flash_attention} and {profile.dtype}; other attention on a GPU cannot be rehearsed"
        )


def run_rank(cases: Sequence[tuple[Profile, str]], *, rank: int, ranks: int) -> list[dict[str, dict[str, int]]]:
    """Return the peaks of one rank for each (profile, text of its DeepSpeed JSON), from a process of its own."""
    request = {
        "rank": rank,
        "ranks": ranks,
        "cases": [{"profile": profile.model_dump_json(), "deepspeed": text} for profile, text in cases],
    }
    done = subprocess.run(
        [sys.executable, "-m", MODULE],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode == ConfigError.exit_code:
        raise ConfigError(done.stderr.strip())
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RopewayError(f"rehearsal: rank {rank} ended with exit code {done.returncode}: {tail}")
    found: list[dict[str, dict[str, int]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def describe_rehearsal(results: Sequence[RankResult]) -> str:
    """Return a table of planned and rehearsed peaks for a terminal."""
    return render(*_rehearsal_parts(results))


def _rehearsal_parts(results: Sequence[RankResult]) -> "list[RenderableType]":
    rows = []
    for result in results:
        for phase in PHASES:
            planned, found = result.planned[phase], result.card[phase]
            rows.append(_row(f"rank {result.rank}", phase.replace("_", " "), planned, found))
    worst = max(results, key=lambda result: max(result.card.values()))
    planned = max(max(result.planned.values()) for result in results)
    rows.append(_row("peak", f"rank {worst.rank}", planned, max(worst.card.values())))
    return [
        "allocated on a card, without reserve: two optimizer steps of full rows in DeepSpeed's engine, on fake tensors",
        AlignedTable(("", "", "planned", "rehearsed", "difference"), rows),
    ]


def _row(first: str, second: str, planned: int, found: int) -> tuple[str, ...]:
    return (first, second, format_bytes(planned), format_bytes(found), f"{planned / found - 1:+.1%}")
