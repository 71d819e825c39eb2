"""Our loop beside HF Trainer with DeepSpeed, padded beside packed, cost of checkpoints and loss: one JSON line last.

The laptop profile's own base and data are made first. Then one launch of two ranks trains in turns (`train_rank.py`),
ours and Trainer on the same rows, all in the same minutes, so that what else the machine does falls on all alike;
ratios are medians over rounds of the ratio within a round. Peak memory of the loss is measured in a process of its own
for each way (`loss_memory.py`).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RANKS = 2
# Ours over Trainer's seconds; packed over padded supervised tokens/s; saving's share; chunked over plain loss's memory.
PROMISES = {"step_ratio": 1.02, "packed_ratio": 1.5, "checkpoint_stall_fraction": 0.05, "loss_memory_ratio": 0.5}
AT_LEAST = frozenset({"packed_ratio"})
SAME_LOSS = 1e-4  # relative: losses of one step of ours and of Trainer differ by fp32's rounding alone
LEAST_ROUNDS = 7
_CPU_PER_TOKEN = {"clock": "cpu_seconds", "per": "supervised_tokens"}
Turn = Mapping[str, Any]


def ratios(turns: Sequence[Turn], way: str, other: str, *, clock: str = "seconds", per: str = "steps") -> list[float]:
    """Return, round by round, what a unit of work takes of `way` over what it takes of `other`.

    >>> ratios([{"way": "a", "seconds": 3.0, "steps": 2}, {"way": "b", "seconds": 2.0, "steps": 2}], "a", "b")
    [1.5]
    """
    mine, theirs = ([turn[clock] / turn[per] for turn in turns if turn["way"] == one] for one in (way, other))
    return [left / right for left, right in zip(mine, theirs, strict=True)]


def stall_fraction(saves: Sequence[float], step_seconds: float, save_steps: int) -> float:
    """Return the share of training in which it stands still, at one save every `save_steps` steps.

    >>> stall_fraction([1.0, 2.0, 1.0], step_seconds=0.45, save_steps=20)
    0.1
    """
    save = statistics.median(saves)
    return save / (save + save_steps * step_seconds)


def worst_difference(ours: Sequence[Turn], theirs: Sequence[Turn], key: str) -> float:
    """Return the largest relative difference between two logs of the same steps."""
    pairs = zip(ours, theirs, strict=True)
    return max(abs(mine[key] - other[key]) / abs(other[key]) for mine, other in pairs)


def find_missed(figures: Mapping[str, Any]) -> list[str]:
    """Return the promises that these figures miss, as sentences; few rounds and other work are misses too."""
    missed = [
        f"{name} is {figures[name]}, promised {'at least' if name in AT_LEAST else 'at most'} {promise}"
        for name, promise in PROMISES.items()
        if not (figures[name] >= promise if name in AT_LEAST else figures[name] <= promise)
    ]
    if figures["rounds"] < LEAST_ROUNDS:
        missed.append(f"{figures['rounds']} rounds, {LEAST_ROUNDS} at least make a median")
    if not figures["loss_difference"] <= SAME_LOSS:
        missed.append(f"losses of ours and of Trainer differ by {figures['loss_difference']:.1g}: not the same work")
    return missed


def medians(turns: Sequence[Turn], way: str) -> dict[str, Any]:
    """Return one way's seconds a step, in all and of this rank's CPU, over its turns."""
    mine = [turn for turn in turns if turn["way"] == way]
    return {
        "seconds_per_step": round(statistics.median(turn["seconds"] / turn["steps"] for turn in mine), 4),
        "cpu_seconds_per_step": round(statistics.median(turn["cpu_seconds"] / turn["steps"] for turn in mine), 4),
    }


def with_work(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return the turns, Trainer's with the tokens of ours: the same rows, counted once."""
    ours = iter([turn for turn in turns if turn["way"] == "ours"])
    counted = []
    for turn in sorted(turns, key=lambda turn: str(turn["way"])):
        same = next(ours) if turn["way"] == "trainer" else turn
        counted.append({**turn, "supervised_tokens": same["supervised_tokens"], "tokens": same["tokens"]})
    return counted


def summarise(measured: Mapping[str, Any], memory: Mapping[str, int]) -> dict[str, Any]:
    """Return the figures that are promised and those they come from."""
    turns = with_work(measured["turns"])
    ways: dict[str, dict[str, Any]] = {way: medians(turns, way) for way in dict.fromkeys(turn["way"] for turn in turns)}
    for way, entry in ways.items():
        mine = [turn for turn in turns if turn["way"] == way]
        supervised, seconds = sum(turn["supervised_tokens"] for turn in mine), sum(turn["seconds"] for turn in mine)
        entry["supervised_tokens_per_second"] = round(supervised / seconds, 1)
        entry["supervised_tokens_per_cpu_second"] = round(supervised / sum(turn["cpu_seconds"] for turn in mine), 1)
    step = ratios(turns, "ours", "trainer")
    packed = ratios(turns, "padded_wide", "packed_wide", per="supervised_tokens")
    narrow = ratios(turns, "ours", "packed", per="supervised_tokens")
    first = measured["first"]
    figures: dict[str, Any] = {
        "rounds": len(step),
        "step_ratio": round(statistics.median(step), 4),
        "step_ratio_cpu": round(statistics.median(ratios(turns, "ours", "trainer", clock="cpu_seconds")), 4),
        "step_ratios": [round(one, 3) for one in step],
        "packed_ratio": round(statistics.median(packed), 4),
        "packed_ratio_cpu": round(statistics.median(ratios(turns, "padded_wide", "packed_wide", **_CPU_PER_TOKEN)), 4),
        "packed_ratios": [round(one, 3) for one in packed],
        "packed_ratio_narrow": round(statistics.median(narrow), 4),
        "packed_ratio_narrow_cpu": round(statistics.median(ratios(turns, "ours", "packed", **_CPU_PER_TOKEN)), 4),
        "checkpoint_stall_fraction": round(
            stall_fraction(measured["saves"], ways["ours"]["seconds_per_step"], measured["save_steps"]), 4
        ),
        "checkpoint_seconds": [round(one, 3) for one in measured["saves"]],
        "save_steps": measured["save_steps"],
        "loss_memory_ratio": round(memory["chunked_bytes"] / memory["plain_bytes"], 4),
        "loss_memory": dict(memory),
        "loss_difference": worst_difference(first["ours"], first["trainer"], "loss"),
        "grad_norm_difference": worst_difference(first["ours"], first["trainer"], "grad_norm"),
        "first_losses": {way: [round(line["loss"], 6) for line in first[way]] for way in ("ours", "trainer")},
        "ways": ways,
    }
    return figures


def lay_workspace(root: Path, profile: str = "laptop", block: str = "") -> None:
    """Run the stages before train for a profile of params.yaml, or of `block`, which is appended to it."""
    from ropeway.orchestration.stage_process import execute_stage, write_identity

    root.mkdir()
    shutil.copytree(ROOT / "configs", root / "configs")
    text = (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines()
    lines = [f"profile: {profile}" if line.startswith("profile: ") else line for line in text]
    (root / "params.yaml").write_text("\n".join(lines) + "\n" + block, encoding="utf-8")
    write_identity(root, profile)
    for stage in ("fetch", "base", "tokenize", "prepare"):
        execute_stage(root, stage)


def launch(root: Path, folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Start the ranks as a training starts them; return what rank 0 measured."""
    from ropeway.runtime.launcher import RANK_MODULE, build_launch_command, free_port, rank_environment

    folder.mkdir()
    arguments = [str(root), str(rounds), str(steps), str(folder)]
    command = build_launch_command({}, arguments, ranks=RANKS, port=free_port())
    command = ["benchmarks.train_rank" if part == RANK_MODULE else part for part in command]
    environment = rank_environment({**os.environ, "CUDA_VISIBLE_DEVICES": ""}, ranks=RANKS)
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
    measured: dict[str, Any] = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    return measured


def measure_loss(way: str) -> dict[str, int]:
    """Return what the loss alone adds to a process's peak."""
    command = [sys.executable, "-m", "benchmarks.loss_memory", way]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    facts: dict[str, int] = json.loads(done.stdout)
    return facts


def main() -> int:
    """Print the figures; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of each way in each round")
    options = parser.parse_args()
    os.environ["DS_ACCELERATOR"] = "cpu"
    load = {"before": round(os.getloadavg()[0], 2)}
    with tempfile.TemporaryDirectory(prefix="bench-train-") as place:
        lay_workspace(Path(place) / "workspace")
        measured = launch(Path(place) / "workspace", Path(place) / "out", options.rounds, options.steps)
    plain, chunked = measure_loss("plain"), measure_loss("chunked")
    memory = {**plain, "plain_bytes": plain.pop("peak_bytes"), "chunked_bytes": chunked["peak_bytes"]}
    memory.pop("peak_bytes", None)
    figures = summarise(measured, memory)
    missed = find_missed(figures)
    facts = {
        "bench": "train",
        **{key: measured[key] for key in ("dtype", "threads_per_rank", "micro_batch_rows", "rows_per_step", "filled")},
        "ranks": RANKS,
        "steps_per_turn": options.steps,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": {**load, "after": round(os.getloadavg()[0], 2)},
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")},
    }
    print(json.dumps({**facts, **figures, "missed": missed, "promise_kept": not missed}))
    return 0 if not missed else 1


if __name__ == "__main__":
    sys.exit(main())
