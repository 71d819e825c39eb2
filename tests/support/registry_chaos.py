"""Publishes killed at random moments; `make chaos-registry KILLS=30` prints one JSON line.

Each round publishes a new package of several parts from a child, kills it (-9) somewhere between its first and its last
write, looks at what is there, and publishes again: that must complete, send only the parts that are missing, and no
reader that looks all the time may ever see a version or an alias that leads to something not whole.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ropeway.registry import ANY, Registry
from ropeway.registry.layout import blob_key, versions_log
from ropeway.registry.log import read_events
from ropeway.registry.version_manifest import load_version_manifest
from ropeway.storage import Store, multipart, open_store
from tests.support.registry_world import make_package, tiny

ROOT = Path(__file__).parents[2]
PART = 5 << 20  # the smallest that S3 allows
PARTS = 4


@dataclass
class Outcome:
    """What the rounds showed; `faults` must stay empty."""

    store: str
    kills: int = 0
    too_late: int = 0  # the child had ended
    looks: int = 0
    parts_kept: int = 0
    parts_sent: int = 0
    faults: list[str] = field(default_factory=list)


def kill_publishes(url: str, place: Path, *, kills: int, seed: int) -> Outcome:
    """Return what became of `kills` publishes that were killed; more are begun where the kill came too late."""
    chance, outcome = random.Random(seed), Outcome(url.partition(":")[0])
    duration = _publish_in_child(url, _package(place, 0), None)[1]
    with _reader(url, outcome):
        for number in range(1, 4 * kills):
            if outcome.kills == kills:
                break
            package = _package(place, number)
            died, _ = _publish_in_child(url, package, chance.uniform(0, duration))
            outcome.kills += died
            outcome.too_late += not died
            _finish(open_store(url), package, outcome)
    if outcome.kills < kills:
        outcome.faults.append(f"only {outcome.kills} of {kills} kills came before the end")
    return outcome


def _finish(store: Store, package: Path, outcome: Outcome) -> None:
    """Publish again what was killed, count what had to be sent, and verify every byte."""
    there, sent = _parts_there(store), _count_parts(store)
    blob_there = any(entry.bytes > PART and _is_of(entry.key, package) for entry in store.list_entries("blobs/"))
    done = tiny(store).publish(package, provenance={}, attachments={})
    tiny(store).version(done.digest).promote("candidate", expect=ANY, by="chaos", reason=f"round {done.number}")
    if again := there & set(sent):  # one more may have arrived after the look: the server ends what it had begun
        outcome.faults.append(f"v{done.number}: parts {sorted(again)} were there and were sent again")
    if blob_there and sent:
        outcome.faults.append(f"v{done.number}: the file was whole in the store, and {len(sent)} parts were sent")
    outcome.parts_kept += len(there)
    outcome.parts_sent += len(sent)
    Registry(store).version(f"tiny@v{done.number}").verify()
    if strays := [stray for stray in store.list_incomplete_uploads() if outcome.store == "s3"]:
        outcome.faults.append(f"v{done.number}: {len(strays)} uploads left after completion")


def _is_of(key: str, package: Path) -> bool:
    manifest = json.loads((package / "manifest.json").read_bytes())
    return key.endswith(manifest["files"]["model.safetensors"]["sha256"])


def _parts_there(store: Store) -> set[int]:
    """Return the numbers of the parts that the server has of the one unfinished upload there can be."""
    if not hasattr(store, "client"):
        return set()
    there: set[int] = set()
    for stray in store.list_incomplete_uploads():
        if stray.name == ".probe":
            store.remove_incomplete_upload(stray)
            continue
        bucket, path = store._place(stray.name)
        try:
            answer = store.client.list_parts(Bucket=bucket, Key=path, UploadId=stray.token)
        except store.client.exceptions.NoSuchUpload:  # the server still completed it for the killed publish
            continue
        there |= {part["PartNumber"] for part in answer.get("Parts", [])}
    return there


def _count_parts(store: Store) -> list[int]:
    """Return a list that grows with every part sent from now on, the probe's not counted."""
    sent: list[int] = []
    multipart.PART_BYTES = PART
    if hasattr(store, "client"):
        real = store.client.upload_part

        def counted(**options):
            if not options["Key"].endswith(".probe"):
                sent.append(options["PartNumber"])
            return real(**options)

        store.client.upload_part = counted
    return sent


def _package(place: Path, number: int) -> Path:
    return make_package(place / f"p{number}", random.Random(number).randbytes(PARTS * PART + 1000))


def _publish_in_child(url: str, package: Path, kill_after_seconds: float | None) -> tuple[bool, float]:
    """Return whether a child that publishes was killed in time, and how long it took after it was ready."""
    command = [sys.executable, "-m", "tests.support.registry_chaos", "child", url, str(package)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        started = time.monotonic()
        if kill_after_seconds is not None:
            time.sleep(kill_after_seconds)
            child.kill()
        code = child.wait()
        return code != 0, time.monotonic() - started


def _child(url: str, package: str) -> None:
    """Publish, as a process of its own; warm before it says ready, so that a kill meets writes and not imports."""
    multipart.PART_BYTES = PART
    store = open_store(url)
    store.exists("registry.json")
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    tiny(store).publish(Path(package), provenance={}, attachments={})


@contextmanager
def _reader(url: str, outcome: Outcome) -> Iterator[None]:
    """Look all the time, as another machine would: what the newest number and every alias lead to must be whole."""
    stop, store = threading.Event(), open_store(url)

    def look() -> None:
        while not stop.is_set():
            try:
                newest = len(read_events(store, versions_log("tiny")))
                digests = {
                    *tiny(store).aliases().values(),
                    Registry(store).version(f"tiny@v{newest}").digest,
                }
                for digest in digests:
                    for file in load_version_manifest(store, "tiny", digest).files:
                        assert store.size(blob_key(file.sha256)) == file.bytes, file.path
                outcome.looks += 1
            except Exception as error:  # noqa: BLE001 - whatever a reader met is the finding
                outcome.faults.append(f"a reader met {type(error).__name__}: {error}")
            stop.wait(0.05)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def main(kills: int) -> int:
    """Kill on both stores; print what became of it, one JSON line; return 1 when a promise was missed."""
    from tests.support.s3_server import start_server

    started = time.monotonic()
    server = start_server()
    os.environ.update(server.environment)
    try:
        with tempfile.TemporaryDirectory() as place:
            server.make_bucket("chaos")
            urls = {"s3": "s3://chaos/registry", "file": (Path(place) / "registry").as_uri()}
            outcomes = [kill_publishes(url, Path(place) / name, kills=kills, seed=kills) for name, url in urls.items()]
    finally:
        server.stop()
    good = all(outcome.kills >= kills and not outcome.faults for outcome in outcomes)
    report = {
        "chaos": "registry",
        "ok": good,
        "seconds": round(time.monotonic() - started, 1),
        "stores": [asdict(outcome) for outcome in outcomes],
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    if sys.argv[1] == "child":
        _child(*sys.argv[2:])
    else:
        sys.exit(main(int(sys.argv[1])))
