"""How long commands take to answer, medians of whole processes: one JSON line, 1 when one is too slow.

`ropeway run` is measured to its first line and then killed: Prefect and DVC are not imported before it.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROMISED = {"run_first_line": 1.0, "help": 1.0, "status": 2.0}  # seconds, on a machine that does nothing else
RUNS = 5
ROOT = Path(__file__).parents[1]


def measure(command: Sequence[str], folder: Path, wait: Callable[["subprocess.Popen[bytes]"], object]) -> list[float]:
    """Return [seconds, CPU seconds] of a process until `wait` returns."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "ropeway.cli.main", *command], cwd=folder, stdout=subprocess.PIPE, start_new_session=True
    )
    wait(process)
    seconds = time.perf_counter() - began
    os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the group exists
    _, _, usage = os.wait4(process.pid, 0)
    return [seconds, usage.ru_utime + usage.ru_stime]


def read_all(process: "subprocess.Popen[bytes]") -> object:
    """Wait for the end of the output."""
    return process.stdout and process.stdout.read()


def read_line(process: "subprocess.Popen[bytes]") -> object:
    """Wait for the first line."""
    return process.stdout and process.stdout.readline()


def main() -> int:
    """Print the figures; return the exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("params.yaml", "dvc.yaml"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "configs", folder / "configs")
        cases = {
            "run_first_line": (["run"], folder, read_line),
            "help": (["--help"], folder, read_all),
            "status": (["status"], ROOT, read_all),  # of this workspace, whatever has run in it
        }
        facts: dict[str, float] = {}
        for name, case in cases.items():
            found = [measure(*case) for _ in range(RUNS)]
            facts[f"{name}_s"] = round(statistics.median(seconds for seconds, _ in found), 3)
            facts[f"{name}_cpu_s"] = round(statistics.median(cpu for _, cpu in found), 3)
    kept = all(facts[f"{name}_s"] <= limit for name, limit in PROMISED.items())
    print(json.dumps({"bench": "start", "runs": RUNS, **facts, "promise_kept": kept}))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
