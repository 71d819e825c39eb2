"""How fast prepare is, against the bare tokenizer and against TRL, and how much memory it holds: one JSON line last.

Chat and documents; one worker pinned to one core and two pinned to two; rounds of every way in turn, medians of them.
Each measurement is a process of its own (`prepare_once.py`). Needs `pip install -e '.[bench]'`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import texts
import vocabulary
from prepare_once import OTHER_LAYOUT, SOURCE, WAYS, texts_of, write_for_trl

from ropeway.config.edit import select_profile
from ropeway.config.frozen import read_texts, write_values
from ropeway.config.load_params import load_profile
from ropeway.data.raw_records import RawWriter, Record
from ropeway.models.conversation import Conversation
from ropeway.models.tokenizer import LLAMA_SPECIAL
from ropeway.runtime.manifest import write_manifest
from ropeway.runtime.workspace import Workspace

ROOT = Path(__file__).parents[1]
PROMISES = {"raw": {"chat": 0.85, "documents": 0.85}}
# Of TRL as it comes, on all cores: one process there, a worker a core in the stage. On equal processes the ratios stand
# beside it (`trl_processes`): the tokenizer's own time sets them, and no code around it would reach these.
ON_ALL_CORES = {"trl": {"chat": 5.0, "documents": 3.0}}
AGAIN = 0.05  # preparing again with another layout takes at most such a share of tokenizing
FLAT = 1.25  # peak memory at ten times the data may be at most this many times that: what varies from run to run
WORKERS = (1, 2)
MAX_LENGTH = 8192  # as published
OURS = [way for way in WAYS if way.startswith("ours")]
_SAMPLE_SECONDS = 0.05
_EVERY_LINE = 100  # about 8,000 lines are compared with SentencePiece
BLOCK = """
bench:
  <<: *published
  max_length: {max_length}
  datasets: [{{{source}: {{max_val_set: 1000, max_chunk_size: {chunk}}}}}]
  sources: {{{source}: {{kind: files, paths: [none], rows: text, columns: {{}}, expected_rows: null}}}}
"""


def lay_workspace(root: Path, tokenizer: Any, records: list[Record], *, times: int) -> Workspace:  # noqa: ANN401
    """Lay the tables that prepare reads: params, raw parquet with the records `times` over, the tokenizer."""
    shipped = ROOT / "params.yaml"
    text = select_profile(shipped, shipped.read_text(encoding="utf-8"), "bench")
    kind = "conversation" if isinstance(records[0], Conversation) else "document"
    chunk = "null" if kind == "conversation" else 65535
    root.mkdir()
    shutil.copytree(ROOT / "configs", root / "configs")
    (root / "params.yaml").write_text(text + BLOCK.format(source=SOURCE, chunk=chunk, max_length=MAX_LENGTH))
    workspace = Workspace(root, "bench")
    vocabulary.write_base(workspace.base, tokenizer, max_length=MAX_LENGTH)
    with RawWriter(workspace.raw / SOURCE, kind) as writer:
        for _ in range(times):
            for record in records:
                writer.add(record)
    read = times * len(records)
    prompts = load_profile(root / "params.yaml")[1].contamination.prompts
    write_values(workspace, "", {"contamination": read_texts(root, prompts, key="contamination.prompts")})
    facts = {"kind": kind, "kept": read, "read": read, "refused": {}, "first_refused": [], "identity": {}}
    write_manifest(workspace.raw, {"sources": {SOURCE: facts}})
    return workspace


def measure(way: str, workspace: Workspace, workers: int, *, watch: bool = False) -> dict[str, Any]:
    """Run one measurement on `workers` cores; with `watch`, sample the memory of its whole process tree."""
    cores = sorted(os.sched_getaffinity(0))[:workers]
    settings = {
        "ROPEWAY_TOKENIZE_WORKERS": str(workers),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(workspace.root / "datasets"),
        "TMPDIR": str(workspace.root),
    }
    command = [sys.executable, str(Path(__file__).with_name("prepare_once.py")), way, str(workspace.root), str(workers)]
    with subprocess.Popen(
        ["taskset", "--cpu-list", ",".join(map(str, cores)), *command],
        env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        peak = _peak_bytes(child) if watch else {}
        printed, complaint = child.communicate()
    if child.returncode:
        raise SystemExit(f"{way} on {workspace.root} ended with {child.returncode}:\n{complaint[-4000:]}")
    return json.loads(printed.splitlines()[-1]) | peak


def _peak_bytes(child: "subprocess.Popen[str]") -> dict[str, int]:
    """Return the greatest sums over a process and its descendants: resident, and resident that no file backs."""
    root, peak = psutil.Process(child.pid), {"peak_rss_bytes": 0, "peak_anonymous_bytes": 0}
    while child.poll() is None:
        resident = anonymous = 0
        for process in (root, *root.children(recursive=True)):
            try:
                held = process.memory_info()
            except psutil.Error:  # it ended a moment ago
                continue
            resident += held.rss
            anonymous += held.rss - held.shared
        peak["peak_rss_bytes"] = max(peak["peak_rss_bytes"], resident)
        peak["peak_anonymous_bytes"] = max(peak["peak_anonymous_bytes"], anonymous)
        time.sleep(_SAMPLE_SECONDS)
    return peak


def ways_of(workers: int, *, all_of_them: bool) -> list[str]:
    """Return what is measured on `workers` cores: TRL, which takes longest, and what params may add only on all."""
    if workers > 1:
        return [way for way in WAYS if all_of_them or way != "trl_processes"]
    return list(WAYS) if all_of_them else ["ours", "raw", "raw_fast"]


def run_rounds(spaces: dict[str, Workspace], rounds: int, *, all_of_them: bool) -> dict[str, Any]:
    """Return every path's and worker count's measurements: way -> one entry a round, the order turned each round."""
    chosen = {workers: ways_of(workers, all_of_them=all_of_them) for workers in WORKERS}
    runs: dict[str, Any] = {path: {str(w): {way: [] for way in ways} for w, ways in chosen.items()} for path in spaces}
    for number in range(rounds):
        for path, workspace in spaces.items():
            for workers, ways in chosen.items():
                for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                    facts = measure(way, workspace, workers)
                    runs[path][str(workers)][way].append(facts)
                    took = f"{facts['seconds']:.1f} s, {facts['cpu_seconds']:.1f} of CPU"
                    say(f"round {number + 1}, {path}, {workers} workers, {way}: {took}")
    return runs


def summarise(runs: dict[str, list[dict[str, Any]]], size_mb: float) -> dict[str, Any]:
    """Return medians of each way, and medians of the ratios within each round, in wall and in CPU seconds."""
    summary: dict[str, Any] = {}
    for way, entries in runs.items():
        seconds = statistics.median(entry["seconds"] for entry in entries)
        summary[way] = {
            "mb_s": round(size_mb / seconds, 2),
            "tokens_s": round(entries[0]["tokens"] / seconds),
            "seconds": [round(entry["seconds"], 2) for entry in entries],
            "cpu_seconds": [round(entry["cpu_seconds"], 2) for entry in entries],
        }
    for way in (way for way in runs if way in OURS):
        parts = {p: statistics.median(entry["parts"][p] for entry in runs[way]) for p in runs[way][0]["parts"]}
        summary[way]["parts_seconds"] = {part: round(seconds, 2) for part, seconds in parts.items()}
        again = statistics.median(one["parts"][OTHER_LAYOUT] / one["parts"]["tokenize"] for one in runs[way])
        summary[way]["again_of_tokenize"] = round(again, 4)
    for other in (way for way in runs if way != "ours"):
        for clock in ("seconds", "cpu_seconds"):
            pairs = zip(runs[other], runs["ours"], strict=True)
            ratio = statistics.median(theirs[clock] / mine[clock] for theirs, mine in pairs)
            summary[f"ratio_to_{other}" + ("_cpu" if clock == "cpu_seconds" else "")] = round(ratio, 3)
    return summary


def measure_memory(spaces: dict[str, tuple[Workspace, Workspace]]) -> dict[str, Any]:
    """Return peak memory of prepare with two workers at 1x and 10x data, in MiB, and their ratio."""
    found: dict[str, Any] = {}
    for (path, pair), way in product(spaces.items(), OURS):
        peaks = [measure(way, workspace, WORKERS[-1], watch=True) for workspace in pair]
        entry: dict[str, Any] = {"seconds": [round(peak["seconds"], 1) for peak in peaks]}
        for what in ("rss", "anonymous"):
            once, ten = (peak[f"peak_{what}_bytes"] / 2**20 for peak in peaks)
            entry |= {f"{what}_mib_1x": round(once), f"{what}_mib_10x": round(ten)}
        entry["growth"] = round(entry["rss_mib_10x"] / entry["rss_mib_1x"], 3)
        found[f"{path}, {way}"] = entry
        say(f"memory, {path}, {way}: {entry}")
    return found


def find_missed(speed: dict[str, Any], memory: dict[str, Any]) -> list[str]:
    """Return the promises that these figures miss, as sentences."""
    missed = []
    for path, by_workers in speed.items():
        for workers, summary in by_workers.items():
            promises = PROMISES | (ON_ALL_CORES if int(workers) == WORKERS[-1] else {})
            for other, promise in promises.items():
                if (ratio := summary[f"ratio_to_{other}"]) < promise[path]:
                    missed.append(f"{path}, {workers} workers: {ratio} of {other}, promised {promise[path]}")
            shares = {way: summary[way]["again_of_tokenize"] for way in summary if way in OURS}
            missed += [
                f"{path}, {workers} workers, {way}: another layout takes {share} of tokenizing, promised {AGAIN}"
                for way, share in shares.items()
                if share > AGAIN
            ]
    missed += [
        f"{path}: memory grows {entry['growth']} times at ten times the data, promised {FLAT}"
        for path, entry in memory.items()
        if entry["growth"] > FLAT
    ]
    return missed


def say(line: str) -> None:
    """Print progress beside the result."""
    print(line, file=sys.stderr, flush=True)


def read_options() -> argparse.Namespace:
    """Return the command line; smaller amounts are for trying the benchmark itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip", choices=["speed", "memory"], default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents-mb", type=float, default=64)
    parser.add_argument("--chat-mb", type=float, default=64)
    parser.add_argument("--memory-mb", type=float, default=12, help="of each kind; also measured ten times over")
    parser.add_argument("--all", action="store_true", help="also TRL on one core and in a process a core")
    return parser.parse_args()


def main() -> int:
    """Print the figures; return the exit code."""
    options = read_options()
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as folder:
        figures = run(Path(folder), options)
    print(json.dumps(figures))
    return 0 if figures["promise_kept"] else 1


@dataclass(frozen=True, slots=True)
class Laid:
    """One path's workspace, and what its records are."""

    workspace: Workspace
    mb: float
    facts: dict[str, Any]


def lay(folder: Path, path: str, records: list[Record], model: Path) -> Laid:
    """Lay a path's workspace for the speed of things, and its data set for TRL."""
    workspace = lay_workspace(folder / path, vocabulary.convert(model), records, times=1)
    profile = load_profile(workspace.root / "params.yaml")[1]
    write_for_trl(workspace, profile)
    mb = sum(len(text.encode()) for text in texts_of(workspace, profile)) / 1e6
    say(f"{path}: {len(records):,} records, {mb:.1f} MB as the tokenizer gets them")
    return Laid(workspace, mb, {"records": len(records), "mb": round(mb, 1), "sha256": texts.digest(records)})


def lay_tenfold(folder: Path, path: str, records: list[Record], model: Path) -> tuple[Workspace, Workspace]:
    """Lay a path's workspaces for memory: records once and ten times over."""
    once, ten = (
        lay_workspace(folder / f"{path}-{times}", vocabulary.convert(model), records, times=times) for times in (1, 10)
    )
    return once, ten


def check_vocabulary(model: Path, documents: list[Record]) -> dict[str, Any]:
    """Return what was compared; end the benchmark unless SentencePiece itself gives the same ids.

    Lines that spell a special token are left out: it is parsed as one here, and never by SentencePiece.
    """
    lines = [line for text in documents for line in str(text).splitlines() if line][::_EVERY_LINE]
    lines = [line for line in lines if not any(name in line for name in LLAMA_SPECIAL.values())]
    if differing := vocabulary.count_differing(vocabulary.convert(model), model, lines):
        raise SystemExit(f"{differing} of {len(lines)} lines get other ids than from SentencePiece itself")
    return {"model": model.name, "lines_equal_to_sentencepiece": len(lines)}


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Gather, convert, lay, measure; return the figures."""
    model = vocabulary.find_model()
    records = {"chat": texts.conversations(options.chat_mb), "documents": texts.documents(options.documents_mb)}
    checked = check_vocabulary(model, records["documents"])
    before = os.getloadavg()[0]
    laid: dict[str, Laid] = {}
    runs: dict[str, Any] = {}
    if options.skip != "speed":
        laid = {path: lay(folder, path, these, model) for path, these in records.items()}
        spaces = {path: one.workspace for path, one in laid.items()}
        runs = run_rounds(spaces, options.rounds, all_of_them=options.all)
    speed = {path: {w: summarise(ways, laid[path].mb) for w, ways in by.items()} for path, by in runs.items()}
    memory = {}
    if options.skip != "memory":
        small = {"chat": texts.conversations(options.memory_mb), "documents": texts.documents(options.memory_mb)}
        memory = measure_memory({path: lay_tenfold(folder, path, these, model) for path, these in small.items()})
    missed = find_missed(speed, memory)
    return {
        "bench": "prepare",
        "texts": {path: one.facts for path, one in laid.items()},
        "vocabulary": checked,
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "trl", "datasets")},
        "cores": len(os.sched_getaffinity(0)),
        "load_average": {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)},
        "rounds": options.rounds,
        "skipped": options.skip,
        "speed": speed,
        "memory_two_workers": memory,
        "missed": missed,
        "promise_kept": not missed,
    }


if __name__ == "__main__":
    sys.exit(main())
