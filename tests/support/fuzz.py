"""`make fuzz RUNS=100000`: arbitrary bytes for every parser, guided by coverage (Atheris, libFuzzer).

Each target of `fuzz_targets.py` gets its share of the runs in a process of its own, with limits on memory and on
the time of an input. The last line is JSON: runs and seconds per target, and the findings with the file of the input
that led to each. The exit code is 1 if there is one. `python -m tests.support.fuzz TARGET FILE` runs one input again.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

SECONDS_PER_INPUT = 30  # by the clock: a busy machine can stall for seconds
MEMORY_MB = 2048
# Inputs that cost milliseconds, as YAML and Jinja do, get a smaller share.
SHARE = {"params": 0.1, "template": 0.3, "rows": 0.5, "archive": 0.5, "yaml": 0.5}


def load_targets():
    """Import the targets, and with them Ropeway, so that coverage is counted."""
    import atheris  # of the extra `fuzz`

    with atheris.instrument_imports(include=["ropeway"]):
        from tests.support import fuzz_targets
    return fuzz_targets


def fuzz(name, runs, seed, seconds, findings):
    """Run a target in a forked process, which has everything imported; return its result."""
    targets, began = load_targets(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ropeway-corpus-") as corpus, tempfile.NamedTemporaryFile("r+") as said:
        for number, start in enumerate(targets.seeds()[name]):
            Path(corpus, f"seed-{number}").write_bytes(start)
        options = [
            corpus, f"-runs={runs}", f"-seed={seed}", f"-max_total_time={seconds}", f"-timeout={SECONDS_PER_INPUT}",
            f"-rss_limit_mb={MEMORY_MB}", "-max_len=20000", f"-artifact_prefix={findings}/{name}-",
        ]  # fmt: skip
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            try:
                run_target(name, options, findings)
            finally:  # not back into the parent's code
                os._exit(70)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        shutil.rmtree(targets.scratch_folder(child), ignore_errors=True)  # libFuzzer ends the child without cleaning up
        lines = Path(said.name).read_text(errors="replace").splitlines()
    counted = re.findall(r"^(?:Done |#)(\d+)\b", "\n".join(lines), re.MULTILINE)
    runs = max(map(int, counted), default=0)
    result = {"runs": runs, "seconds": round(time.monotonic() - began, 1), "exit_code": code}
    if files := sorted(str(path) for path in findings.glob(f"{name}-*")):
        result["findings"] = files
    if code:
        result["output"] = lines[-20:]
    return result


def run_target(name, options, findings):
    """Run a target in this process; libFuzzer ends the process.

    What a target raises is written beside the input, once for each place in the code, and the run goes on. What hangs
    or needs too much memory ends it.
    """
    import atheris

    targets, known = load_targets(), set()
    target = targets.TARGETS[name]

    def check(data):
        try:
            target(data)
        except targets.ALLOWED:
            pass
        except Exception as error:  # noqa: BLE001 - a finding
            own = [one for one in traceback.extract_tb(error.__traceback__) if "/ropeway/" in one.filename]
            place = (type(error).__name__, *((own[-1].filename, own[-1].lineno) if own else ()))
            if place not in known:
                known.add(place)
                file = findings / f"{name}-{len(known)}"
                file.write_bytes(data)
                file.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))

    atheris.Setup([name, *options], check)
    atheris.Fuzz()


def main():
    """Fuzz every target, or run one; return the exit code."""
    targets = load_targets()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=int, nargs="?", default=100_000, help="inputs over all targets")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=20, help="at most, over all targets")
    parser.add_argument("--only", action="append", choices=targets.TARGETS, help="these targets")
    parser.add_argument("--findings", type=Path, default=Path(".work/fuzz"), help="folder of inputs that led to one")
    options = parser.parse_args()
    shutil.rmtree(options.findings, ignore_errors=True)
    options.findings.mkdir(parents=True)
    names = options.only or list(targets.TARGETS)
    whole = sum(SHARE.get(name, 1) for name in names)
    results = {}
    for name in names:
        share = SHARE.get(name, 1) / whole
        seconds = max(10, round(options.minutes * 60 / len(names)))
        results[name] = fuzz(name, round(options.runs * share), options.seed, seconds, options.findings)
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    found = [name for name, result in results.items() if result["exit_code"] or result.get("findings")]
    print(json.dumps({"fuzz": results, "runs": sum(one["runs"] for one in results.values()), "findings": found}))
    return 1 if found else 0


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-") and not sys.argv[1].isdigit():
        run_target(sys.argv[1], sys.argv[2:], Path(tempfile.mkdtemp(prefix="ropeway-fuzz-")))
    else:
        sys.exit(main())
