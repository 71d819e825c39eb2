"""Host memory of opening a model on several ranks, in copies of the model: one JSON line.

A random model is written as the base stage writes it. Ranks open it at the same time, each in a process of its own, as
training opens it; this process adds up their PSS (`/proc/PID/smaps_rollup`, which counts a page that N processes map as
1/N in each) while they do, less what they have after importing the libraries.

Each rank reads every weight once, as DeepSpeed does when it copies it to the card or into its buffers. Those copies are
not counted: they are the parameters, which a rank holds with any way of opening. `peak_copies` is all memory, on which
the promise is, `peak_anonymous_copies` the part that is not pages of the model's files. With another dtype than the
stored one (`--dtype fp32`) a CPU rank converts all weights: then both figures contain the parameters themselves.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROMISED_COPIES = 1.2
SAMPLE_SECONDS = 0.02
SHAPE = {
    "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32_000, "max_position_embeddings": 2048,
}  # fmt: skip


def parse_rollup(text: str) -> dict[str, int]:
    r"""Return the fields of smaps_rollup in bytes.

    >>> parse_rollup("55d0-7ffc ---p 00000000 00:00 0    [rollup]\nPss:   12 kB\nPss_Anon:   8 kB\n")
    {'Pss': 12288, 'Pss_Anon': 8192}
    """
    rows = (line.split() for line in text.splitlines()[1:])
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}


def measure(pids: Sequence[int]) -> dict[str, int]:
    """Return the summed memory of these processes in bytes."""
    found = [parse_rollup(Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")) for pid in pids]
    return {name: sum(one[name] for one in found) for name in ("Pss", "Pss_Anon", "Pss_File")}


def write_model(folder: Path, hidden: int, layers: int) -> int:
    """Write a random model in bf16 in a process of its own; return its bytes."""
    shape = {**SHAPE, "hidden_size": hidden, "intermediate_size": 11 * hidden // 4, "num_hidden_layers": layers}
    command = [sys.executable, "-m", "benchmarks.opening_rank", "write", str(folder), json.dumps(shape)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def open_on_ranks(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Open the model on all ranks; return memory before, at the peak and after."""
    command = [sys.executable, "-m", "benchmarks.opening_rank", "open", str(folder), options.dtype, options.device]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(options.ranks)
    ]
    pids = [rank.pid for rank in ranks]
    try:
        for rank in ranks:
            _expect(rank, "imported")
        before = measure(pids)
        began = time.perf_counter()
        for rank in ranks:
            _tell(rank)
        samples = []
        for rank in ranks:
            os.set_blocking(rank.stdout.fileno(), False)  # type: ignore[union-attr]
        left = set(ranks)
        while left:
            samples.append(measure(pids))
            left = {rank for rank in left if not _has_opened(rank)}
            time.sleep(SAMPLE_SECONDS)
        seconds, after = time.perf_counter() - began, measure(pids)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return {"before": before, "samples": samples, "after": after, "seconds": seconds}


def _expect(rank: "subprocess.Popen[str]", word: str) -> None:
    line = rank.stdout.readline() if rank.stdout else ""
    if line.strip() != word:
        raise SystemExit(f"a rank said {line!r}, expected {word!r}")


def _tell(rank: "subprocess.Popen[str]") -> None:
    if rank.stdin:
        print("go", file=rank.stdin, flush=True)


def _has_opened(rank: "subprocess.Popen[str]") -> bool:
    if rank.poll() is not None:
        raise SystemExit(f"a rank ended with {rank.returncode}")
    return bool(rank.stdout and rank.stdout.readline().strip() == "opened")


def main() -> int:
    """Print the figures; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--dtype", default="bf16", help="of training; the model is stored in bf16")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-opening-") as place:
        folder = Path(place) / "base"
        size = write_model(folder, options.hidden, options.layers)
        found = open_on_ranks(folder, options)
    peaks = {name: max(sample[name] for sample in found["samples"]) for name in found["before"]}
    copies = {name: round((peaks[name] - found["before"][name]) / size, 3) for name in peaks}
    kept = copies["Pss"] <= PROMISED_COPIES
    facts = {
        "bench": "opening",
        "ranks": options.ranks,
        "device": options.device,
        "dtype": options.dtype,
        "model_bytes": size,
        "peak_copies": copies["Pss"],
        "peak_anonymous_copies": copies["Pss_Anon"],
        "after_copies": round((found["after"]["Pss"] - found["before"]["Pss"]) / size, 3),
        "after_anonymous_copies": round((found["after"]["Pss_Anon"] - found["before"]["Pss_Anon"]) / size, 3),
        "imports_bytes": found["before"]["Pss"],
        "samples": len(found["samples"]),
        "seconds": round(found["seconds"], 2),
        "load_average": round(os.getloadavg()[0], 2),
    }
    print(json.dumps({**facts, "promise_kept": kept}))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
