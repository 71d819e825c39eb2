"""A registry of many versions, in a folder and on S3: requests and seconds of each operation; one JSON line.

The objects are those that `publish`, `promote` and `review` write: they run against a store in memory, whose objects
are then copied to both stores and verified there. Each version has weights, a manifest and a dvc.lock of its own, is
once `candidate`, and every tenth is `production` and reviewed. The S3 server is SeaweedFS on loopback. With
`TMPDIR=/dev/shm` its files and those of the folder are in memory, and no other program's disk accesses are measured.

Seconds are the smallest of the rounds. `cpu_seconds` are the processor time of this process in that round, which other
programs change less.

Exits with 1 if a promise is missed: publish, pull, list, show and the moves of an alias make as many requests with many
versions as with one; each of these, and `ropeway history` of 1,000 versions, takes 2 s at most; garbage collection
plans in 10 s at most.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from ropeway.registry import ANY, Registry
from ropeway.reporting.history import read_history
from ropeway.runtime.manifest import write_manifest
from ropeway.storage import FileStore, Store, open_store
from tests.support import history_world
from tests.support.memory_store import MemoryStore
from tests.support.registry_world import count_requests, safetensors
from tests.support.s3_server import start_server

BUCKET = "bench"
ORPHANS = 100  # blobs that nothing references, which garbage collection has to find
PRODUCTION_EVERY = 10
SECONDS, GC_SECONDS = 2.0, 10.0
CONSTANT = ("publish", "pull", "list models", "list newest 20", "show", "moves, newest 20", "aliases in status")
LIMITED = (*CONSTANT, "history of 30", "history of 1,000")
PAST = timedelta(seconds=-60)  # a grace period that every object is past
PAGE = 20

Figures = dict[str, dict[str, Any]]
Result = TypeVar("Result")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=1000)
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # through the `finally` below: no server, no file stays
    server = start_server()
    os.environ.update(server.environment)
    try:
        server.make_bucket(BUCKET)
        with tempfile.TemporaryDirectory() as place:
            return report(Path(place), options.models, options.versions, options.rounds)
    finally:
        server.stop()


def report(place: Path, models: int, versions: int, rounds: int) -> int:
    """Build, measure, print, and return the exit code."""
    found: dict[str, dict[str, Figures]] = {"folder": {}, "s3": {}}
    blobs = 0
    for count in (1, versions):
        took, objects = timed_result(lambda count=count: build(place, models, count))
        tell(f"{models} models of {count}: built in {took:.1f} s")
        blobs = sum(key.startswith("blobs/") for key in objects)
        urls = {"folder": (place / f"registry-{count}").as_uri(), "s3": f"s3://{BUCKET}/{count}"}
        for kind, url in urls.items():
            store = open_store(url)
            took, _ = timed_result(lambda store=store, objects=objects: copy(objects, store))
            tell(f"{kind}: {len(objects):,} objects copied in {took:.1f} s")
            Registry(store).version(f"model-0@v{count}").verify()
            found[kind][str(count)] = measure(store, place, models, rounds)
    missed = list(list_missed(found, str(versions)))
    facts = {
        "bench": "registry-scale",
        "models": models,
        "versions": versions,
        "blobs": blobs,
        "operations": found,
        "load_1_min": round(os.getloadavg()[0], 1),
        "missed": missed,
    }
    print(json.dumps(facts))
    return 1 if missed else 0


def list_missed(found: dict[str, dict[str, Figures]], many: str) -> Iterator[str]:
    """Yield the promises that the figures do not keep."""
    for kind, by_count in found.items():
        few, figures = by_count["1"], by_count[many]
        for name in CONSTANT:
            page = PAGE if "newest" in name else 0  # a page of one version reads one event
            more = sum(figures[name]["requests"].values()) - sum(few[name]["requests"].values())
            if more > page:
                yield f"{kind}: {name} makes {more} more requests"
        yield from (f"{kind}: {name} takes too long" for name in LIMITED if figures[name]["seconds"] > SECONDS)
        if figures["gc, plan"]["seconds"] > GC_SECONDS:
            yield f"{kind}: gc takes too long"


def build(place: Path, models: int, count: int) -> dict[str, bytes]:
    """Publish, promote and review `count` versions of each model; return all objects."""
    objects: dict[str, bytes] = {}
    for model in range(models):
        store = MemoryStore()  # of its own, because it lists all its keys
        artifact = Registry(store).artifact(f"model-{model}")
        for number in range(1, count + 1):
            package, attachments = make_package(place / "package", model, number)
            provenance = history_world.describe(artifact.name, number, 2.0, [], history_world.random.Random(number), 8)
            done = artifact.publish(package, provenance=provenance, attachments=attachments)
            version = artifact.version(done.digest)
            by = {"by": "a benchmark", "identity": "claimed"}
            version.promote("candidate", expect=ANY, reason="newer", **by)
            if number % PRODUCTION_EVERY == 0 or number == count:
                answer = {**by, "comment": "as expected", "production": None, "via": "a benchmark"}
                review = version.review("approve", answer)
                version.promote("production", expect=ANY, reason="approved", review=review, **by)
        objects |= store.objects
    return objects | {f"blobs/sha256/{number % 256:02x}/{number:064x}": b"orphan" for number in range(ORPHANS)}


def make_package(folder: Path, model: int, number: int) -> tuple[Path, dict[str, Path]]:
    """Write a package of a few small files; return it and its attachments."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(safetensors(b"%d %d" % (model, number)))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "manifest.json").unlink(missing_ok=True)
    write_manifest(folder, {"kind": "package", "profile": f"model-{model}", "steps": number})
    lock = folder.with_name("dvc.lock")
    lock.write_text(f"schema: '2.0'\nstages: {{}}\n# of version {number} of model {model}\n")
    return folder, {"dvc.lock": lock}


def copy(objects: dict[str, bytes], target: Store) -> None:
    """Copy every object; to a folder without waiting for the disk."""
    if isinstance(target, FileStore):
        for key, data in objects.items():
            path = target.root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(target.put_if_absent, *zip(*objects.items(), strict=True)))


def measure(store: Store, place: Path, models: int, rounds: int) -> Figures:
    """Return requests by kind and the smallest seconds of each operation, and of two commands as processes."""
    registry, figures = Registry(store), Figures()
    artifact, scratch = registry.artifact("model-0"), tempfile.mkdtemp(dir=place)
    total = artifact.describe_versions(limit=1).total
    numbers = iter(range(10**6, 10**7))  # of versions that no registry has

    def publish() -> None:
        package, attachments = make_package(place / "package", 0, next(numbers))
        artifact.publish(package, provenance={"git": "abc", "dirty": False}, attachments=attachments)

    acts: dict[str, Callable[[], object]] = {
        "pull": lambda: registry.version("model-0@candidate").pull(Path(scratch, f"pulled-{next(numbers)}")),
        "list models": lambda: expect(len(registry.describe()), models),
        "list newest 20": lambda: artifact.describe_versions(limit=PAGE),
        "list all": lambda: expect(len(artifact.describe_versions().events), total),
        "show": lambda: registry.version("model-0@v1").describe(),
        "moves, newest 20": lambda: artifact.describe_history("candidate", limit=PAGE),
        "aliases in status": lambda: [
            artifact.describe_history(alias, limit=1) for alias in ("candidate", "production")
        ],
        "history of 30": lambda: read_history(registry, "model-0", 30),
        "history of 1,000": lambda: read_history(registry, "model-0", 1000),
        "retire, plan": lambda: artifact.retirable(50),
        "verify": lambda: registry.version("model-0@candidate").verify(),
        "gc, plan": lambda: expect(len(registry.find_garbage(grace=PAST, withdrawn=True).entries), ORPHANS),
        "publish": publish,  # last: it adds versions
    }
    for name, act in acts.items():
        with count_requests(store) as requests:
            laps = [timed(act)]
        laps += [timed(act) for _ in range(rounds - 1)]
        seconds, cpu_seconds = min(laps)
        asked = {kind: count for kind, count in sorted(requests.items()) if count}
        figures[name] = {"requests": asked, "seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3)}
        tell(f"  {name}: {sum(asked.values())} requests, {seconds:.3f} s, {cpu_seconds:.3f} s of CPU")
    for words in (("registry", "list", "model-0"), ("history", "model-0")):
        seconds, cpu_seconds = min(timed(lambda words=words: run(store.url, *words)) for _ in range(rounds))
        command = f"ropeway {' '.join(words)}, with its start"
        figures[command] = {"seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3)}
        tell(f"  {command}: {seconds:.3f} s, {cpu_seconds:.3f} s of CPU")
    shutil.rmtree(scratch)
    return figures


def run(url: str, *words: str) -> None:
    command = [sys.executable, "-m", "ropeway.cli", *words, "--registry", url]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def expect(found: int, expected: int) -> None:
    if found != expected:
        raise AssertionError(f"found {found}, expected {expected}")


def timed_result(act: Callable[[], Result]) -> tuple[float, Result]:
    began = time.perf_counter()
    result = act()
    return time.perf_counter() - began, result


def timed(act: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of a call, and the processor time of this process and of children that ended in it."""
    began, used = time.perf_counter(), used_cpu_seconds()
    act()
    return time.perf_counter() - began, used_cpu_seconds() - used


def used_cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
