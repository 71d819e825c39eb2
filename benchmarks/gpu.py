"""The first half hour with a GPU, in one command: kernels, engine, training, memory and speed; one JSON and one page.

    python -m benchmarks.gpu [--dry] [--folder build/bench-gpu] [--only PART …] [--again] [--minutes 12]

Each part (`gpu_parts.py`) runs in a process of its own and writes its result at once; the same command continues with
the parts that have none. It needs no network, no DVC and no CUDA compiler. `--dry` runs every part on the CPU
with small shapes; only flash kernels, Liger and CUDA's own figures then run for the first time on the GPU. Its figures
mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Part -> most seconds on a GPU. In this order: what may make the others pointless comes first.
PARTS = {
    "versions": 60,
    "kernels": 120,
    "fused": 90,
    "engine": 90,
    "training": 240,
    "isolation": 90,
    "published_rank": 240,
    "speed": 120,
    "shard": 120,
}
Result = dict[str, Any]


def run_part(name: str, folder: Path, *, is_dry: bool, seconds: float) -> Result:
    """Run one part in its own process; return its result, which is also written to `folder`."""
    target = folder / f"{name}.json"
    scale = "small" if is_dry else "full"
    command = [sys.executable, "-m", "benchmarks.gpu_parts", name, scale, str(target)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    if is_dry:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    began = time.monotonic()
    with (folder / f"{name}.log").open("wb") as log:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    took = round(time.monotonic() - began, 1)
    if code == 0:
        return {**json.loads(target.read_text()), "seconds": took}
    lines = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
    why = f"ended with exit code {code}" if code is not None else f"ended after its limit of {seconds:.0f} s"
    return {"part": name, "failed": why, "last_lines": lines[-12:], "seconds": took}


def load_results(folder: Path) -> dict[str, Result]:
    """Return the results of earlier calls that did not fail."""
    path = folder / "gpu.json"
    found: dict[str, Result] = json.loads(path.read_text())["parts"] if path.is_file() else {}
    return {name: result for name, result in found.items() if "failed" not in result and "skipped" not in result}


def describe(results: Mapping[str, Result], *, is_dry: bool) -> str:
    """Return the results as Markdown."""
    lines = ["# GPU bench" + (" (dry run on a CPU: the figures mean nothing)" if is_dry else "")]
    for name, result in results.items():
        lines += ["", f"## {name.replace('_', ' ')} ({result.get('seconds', 0)} s)", ""]
        if "failed" in result:
            lines += [f"**Failed:** {result['failed']}", "", "```text", *result["last_lines"], "```"]
        elif "skipped" in result:
            lines.append(f"Not run: {result['skipped']}")
        else:
            for key, value in result.items():
                if key in ("part", "seconds"):
                    continue
                if isinstance(value, list) and value and isinstance(value[0], dict):
                    lines += ["", *_table(key, value), ""]
                else:
                    lines.append(f"- {key.replace('_', ' ')}: {_text(value)}")
    return "\n".join(lines) + "\n"


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [
        f"{title.replace('_', ' ')}:",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(_text(row.get(column)) for column in columns) + " |" for row in rows),
    ]


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    return "" if value is None else str(value)


def write(folder: Path, results: Mapping[str, Result], *, is_dry: bool) -> None:
    """Write gpu.json and gpu.md."""
    ordered = {name: results[name] for name in PARTS if name in results}
    document = {"bench": "gpu", "dry": is_dry, "parts": ordered}
    for name, text in (
        ("gpu.json", json.dumps(document, indent=1) + "\n"),
        ("gpu.md", describe(ordered, is_dry=is_dry)),
    ):
        draft = folder / f".{name}"
        draft.write_text(text)
        draft.replace(folder / name)


def main() -> int:
    """Run the parts without a result; return 1 if one failed or had no time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="run every part on the CPU with small shapes")
    parser.add_argument("--folder", type=Path, help="default: build/bench-gpu, or build/bench-gpu-dry")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--again", action="store_true", help="also run parts that have a result")
    parser.add_argument("--minutes", type=float, default=12, help="no part starts that could end later")
    options = parser.parse_args()
    folder: Path = options.folder or ROOT / "build" / ("bench-gpu-dry" if options.dry else "bench-gpu")
    folder.mkdir(parents=True, exist_ok=True)
    results = {} if options.again else load_results(folder)
    deadline = time.monotonic() + 60 * options.minutes
    for name, most in PARTS.items():
        if name not in options.only or name in results:
            continue
        left = deadline - time.monotonic()
        limit = most * (10 if options.dry else 1)
        if not options.dry and left < limit / 2:
            results[name] = {"part": name, "skipped": f"{left:.0f} s left; the same command runs it"}
        else:
            seconds = limit if options.dry else min(limit, left)
            results[name] = run_part(name, folder, is_dry=options.dry, seconds=seconds)
        outcome = results[name].get("failed") or results[name].get("skipped") or "done"
        print(f"{name}: {outcome} ({results[name].get('seconds', 0)} s)", file=sys.stderr, flush=True)
        write(folder, results, is_dry=options.dry)
    write(folder, results, is_dry=options.dry)
    missing = [name for name in options.only if "failed" in results[name] or "skipped" in results[name]]
    print(json.dumps({"bench": "gpu", "dry": options.dry, "page": str(folder / "gpu.md"), "missing": missing}))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
