"""`make chaos-disk ENDS=30`: every disk operation of the registry, and many of a run, fail; then the disk works again.

The disk is full, has no inodes left, is mounted read-only, or does not read. The command must end with an exit code and
a message of its own, and the same command must reach its end afterwards, to the same version.
"""

import argparse
import random
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field, replace

from ropeway.registry import Registry
from ropeway.runtime.errors import RopewayError, disk_error
from ropeway.storage import FileStore
from tests.support.main_job import make_main_job
from tests.support.recorded_disk import DISK_FULL, NO_INODES, READ_ERROR, READ_ONLY, mounted, run_chaos, set_fault
from tests.support.registry_world import make_package, tiny

FAULTS = {"full": DISK_FULL, "no inodes": NO_INODES, "read-only": READ_ONLY, "read error": READ_ERROR}
WORDS = {
    "full": "No space left|disk is full|disk has",
    "no inodes": "No space left|disk is full|disk has",
    "read-only": "Read-only",
    "read error": "Input/output error",
}
NAMED = (64, 65, 75)
CODES = {"full": 75, "no inodes": 75, "read-only": 64, "read error": 64}  # of the registry


@dataclass
class Outcome:
    """What one program showed; `faults` must stay empty."""

    program: str
    failed: Counter = field(default_factory=Counter)  # commands that ended because of the disk, by fault
    codes: Counter = field(default_factory=Counter)
    ended: int = 0
    faults: list = field(default_factory=list)


def fail_registry(folder):
    """Let each operation of a publish and of a pull fail, one after the other."""
    outcome = Outcome("registry")
    with mounted(folder) as (mount, _):
        package = make_package(folder / "package", random.Random(0).randbytes(200_000))
        for name, fault in FAULTS.items():
            at, failed = 0, True
            while failed:
                store = FileStore(mount / f"{name}-{at}")
                set_fault(mount, replace(fault, skip=at))
                failed = _meet(outcome, name, at, lambda store=store: _use(store, package, mount / "pulled"))
                set_fault(mount, None)
                _use(store, package, mount / "pulled")
                outcome.ended += 1
                at += 1
    return outcome


def _use(store, package, target):
    shutil.rmtree(target, ignore_errors=True)
    done = tiny(store).publish(package, provenance={}, attachments={})
    version = tiny(store).version(done.digest)
    version.verify()
    version.pull(target)
    version.verify_folder(target)


def _meet(outcome, name, at, work):
    """Return whether a fault made the work fail; note one that is not named."""
    try:
        try:
            work()
        except OSError as error:
            raise disk_error(error) or error from None  # as the command line says it
    except RopewayError as error:
        outcome.failed[name] += 1
        outcome.codes[str(error.exit_code)] += 1
        if not re.search(WORDS[name], str(error)) or error.exit_code != CODES[name]:
            outcome.faults.append(f"{name} at operation {at}: exit code {error.exit_code}: {error}")
        return True
    except Exception as error:  # noqa: BLE001 - a traceback is the finding
        outcome.failed[name] += 1
        outcome.faults.append(f"{name} at operation {at}: {type(error).__name__}: {error}")
        return True
    return False


def fail_run(folder, ends, draw):
    """Start a run again and again, with a disk that fails after a while, then once with a disk that works."""
    outcome = Outcome("run")
    with mounted(folder / "first") as (mount, _):
        expected = _end(make_main_job(mount / "workspace"))
    while sum(outcome.failed.values()) < ends and len(outcome.faults) < 20:
        with mounted(folder / f"disk{outcome.ended}") as (mount, _):
            job = make_main_job(mount / "workspace")
            code = None
            while code != 0 and sum(outcome.failed.values()) < ends:
                name = draw.choice(list(FAULTS))
                skip = draw.randint(0, 30_000 if name == "read error" else 900)
                set_fault(mount, replace(FAULTS[name], skip=skip))
                with job.start("ropeway", "run", "--no-prefect") as process:
                    printed = process.stdout.read()
                code = process.returncode
                set_fault(mount, None)
                if code:
                    outcome.failed[name] += 1
                    outcome.codes[f"{name}: {code}"] += 1
                    _judge(outcome, name, skip, code, printed)
            if (found := _end(job)) != expected:
                outcome.faults.append(f"the version is {found}, that of a working disk is {expected}")
            outcome.ended += 1
            print(outcome, file=sys.stderr, flush=True)
    return outcome


def _judge(outcome, name, skip, code, printed):
    last = printed[-1500:]
    if "Traceback (most recent call last)" in printed.partition("last lines:")[0] or code not in NAMED:
        outcome.faults.append(f"{name} after {skip} operations: exit code {code}: {last}")
    elif not re.search(WORDS[name], printed):
        outcome.faults.append(f"{name} after {skip} operations: not named: {last}")


def _end(job):
    job.do("ropeway", "run", "--no-prefect")
    return Registry(FileStore(job.root / "registry")).version("tiny@v1").digest


def main():
    """Let the disk fail under both programs; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ends", type=int, nargs="?", default=30, help="runs that a fault ends")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    draw = random.Random(options.seed)

    def cut(folder):
        yield fail_registry(folder / "registry")
        yield fail_run(folder, options.ends, draw)

    return run_chaos("disk", cut)


if __name__ == "__main__":
    sys.exit(main())
