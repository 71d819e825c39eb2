"""How long training waits for a checkpoint hashed by rank 0, by all ranks, written in the background, or uploaded.

One JSON line. `uploaded` is `all_ranks` while the launching process uploads the checkpoint to a store in a folder.

Two ranks on a CPU (`checkpoint_rank.py`). The share of time at the published cadence is these seconds, scaled from this
checkpoint to the size of the published one, against its steps as `ropeway plan` estimates them: an extrapolation from
this machine's disk and cores, not a measurement.
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
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RANKS = 2
WAYS = ("rank_0", "all_ranks", "background", "uploaded")
# Source: `ropeway plan --profile llama2_13b_orca_8k --ranks 8 --gpu-memory-gib 80 --card a100`, 13B under ZeRO-2.
PUBLISHED_BYTES, PUBLISHED_STEP_SECONDS, PUBLISHED_SAVE_STEPS = 182e9, 92.0, 1000
Save = Mapping[str, Any]


def lost_fraction(lost_seconds: float, step_seconds: float, save_steps: int) -> float:
    """Return the share of time lost to saves, at one save every `save_steps` steps.

    >>> lost_fraction(10.0, step_seconds=0.9, save_steps=100)
    0.1
    """
    return lost_seconds / (lost_seconds + save_steps * step_seconds)


def summarise(saves: Sequence[Save], step_seconds: float, checkpoint_bytes: int) -> dict[str, Any]:
    """Return for each way the medians: seconds waited, seconds lost (waiting and slower steps), seconds to the end."""
    figures: dict[str, Any] = {}
    for way in WAYS:
        mine = [save for save in saves if save["way"] == way]
        entry = {
            f"{name}_seconds": round(statistics.median(save[name] for save in mine), 3)
            for name in ("waited", "lost", "complete")
        }
        published = entry["waited_seconds"] * PUBLISHED_BYTES / checkpoint_bytes
        share = lost_fraction(published, PUBLISHED_STEP_SECONDS, PUBLISHED_SAVE_STEPS)
        figures[way] = {**entry, "published_waited_fraction": round(share, 5)}
    return {"ways": figures, "step_seconds": round(step_seconds, 3), "checkpoint_bytes": checkpoint_bytes}


def launch(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks as a training starts them; return what rank 0 measured."""
    from ropeway.runtime.launcher import RANK_MODULE, build_launch_command, free_port, rank_environment

    arguments = [str(folder), str(options.rounds), str(options.steps), str(options.hidden)]
    command = build_launch_command({}, arguments, ranks=RANKS, port=free_port())
    command = ["benchmarks.checkpoint_rank" if part == RANK_MODULE else part for part in command]
    environment = rank_environment({**os.environ, "CUDA_VISIBLE_DEVICES": ""}, ranks=RANKS)
    from benchmarks.checkpoint_rank import PREFIX, STORE, UPLOADED
    from ropeway.stages.train.checkpoint_store import StoredRun, Uploader
    from ropeway.storage import FileStore

    stored = StoredRun(FileStore(folder / STORE), PREFIX)
    with redirect_stdout(sys.stderr), Uploader(stored, folder / UPLOADED).running():  # as the stage does
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
    measured: dict[str, Any] = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    return measured


def main() -> int:
    """Print the figures; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="saves of each way")
    parser.add_argument("--steps", type=int, default=8, help="steps after each save, during which one may be written")
    parser.add_argument("--hidden", type=int, default=768, help="hidden size of the model of 8 layers")
    parser.add_argument("--folder", help="where to write checkpoints; default: the folder for temporary files")
    options = parser.parse_args()
    os.environ["DS_ACCELERATOR"] = "cpu"
    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=options.folder) as place:
        measured = launch(Path(place), options)
        free = shutil.disk_usage(place).free
    facts = {
        "bench": "checkpoint",
        "ranks": RANKS,
        "rounds": options.rounds,
        "cores": len(os.sched_getaffinity(0)),
        "free_disk_bytes": free,
        "load_average": {"before": load, "after": round(os.getloadavg()[0], 2)},
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
    }
    figures = summarise(measured["saves"], measured["step_seconds"], measured["checkpoint_bytes"])
    print(json.dumps({**facts, **figures, "same_sha256": measured["same_sha256"]}))
    return 0 if measured["same_sha256"] else 1


if __name__ == "__main__":
    sys.exit(main())
