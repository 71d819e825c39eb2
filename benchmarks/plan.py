"""How long `ropeway plan` takes on the published profile, the median of a few: one JSON line, 1 when it is too slow."""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMISED_SECONDS = 1.0
RUNS = 5


def main() -> int:
    """Print the figures; return the exit code."""
    options = ["--profile", "llama2_13b_orca_8k", "--ranks", "8", "--gpu-memory-gib", "80", "--card", "a100", "--json"]
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        command = [sys.executable, "-m", "ropeway.cli.main", "plan", *options]
        subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    kept = median <= PROMISED_SECONDS
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = (children.ru_utime + children.ru_stime) / RUNS  # what a busy machine does not change
    facts = {
        "bench": "plan",
        "runs": RUNS,
        "mean_cpu_seconds": round(cpu, 3),
        "median_seconds": round(median, 3),
        "worst_seconds": round(max(seconds), 3),
    }
    print(json.dumps({**facts, "promise_kept": kept}))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
