"""Transfer and verify at 1 GiB, beside boto3's own calls on the same server: one JSON line, 1 when a promise fails.

The server is SeaweedFS on loopback, so it shares the processor with the client. Ours computes the SHA-256 of the file
on the way, up and down; boto3's `upload_file` and `download_file` do not. Both write a download to disk with fsync.
What comes second in a round is slower, so who goes first alternates, and a ratio is the geometric mean of the medians
of both orders. Before the clock starts both clients exist, ours has tested whether the store supports conditional
requests (0.08 s, once per process), and one download was made: the first after uploads takes up to twice as long.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig

from ropeway.registry.pulling import fetch_file
from ropeway.registry.rules import PackageFile
from ropeway.storage import open_store
from ropeway.storage.s3 import ONE_PUT_BYTES
from tests.support.s3_server import start_server

SIZE_BYTES = 1 << 30
BUCKET = "bench"
PROMISED_RATIO, PROMISED_VERIFY_GB_PER_S = 1.0, 1.0
HEADER = b'{"__metadata__":{}}'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="even")
    parser.add_argument("--mebibytes", type=int, default=SIZE_BYTES >> 20)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # through the `finally` below: no server, no file stays
    server = start_server()
    os.environ.update(server.environment)
    try:
        server.make_bucket(BUCKET)
        with tempfile.TemporaryDirectory() as place:
            return report(Path(place), options.mebibytes << 20, options.rounds)
    finally:
        server.stop()


def report(place: Path, size: int, rounds: int) -> int:
    """Measure, print, and return the exit code."""
    source, sha256 = write_source(place / "source.safetensors", size)
    file = PackageFile("model.safetensors", sha256, size)
    seconds: dict[str, list[float]] = {name: [] for name in ("up", "boto_up", "down", "boto_down")}
    for number in range(rounds):
        for name, lap in lap_of(place, source, file, number).items():
            taken = timed(lap)
            if name == "settle":
                continue
            seconds[name].append(taken)
            print(f"round {number}: {name} {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    median = {name: statistics.median(laps) for name, laps in seconds.items()}
    ratios = {way: compare(seconds[way], seconds[f"boto_{way}"]) for way in ("up", "down")}
    verify_seconds = min(timed(lambda: verify_in_folder(place, source, file)) for _ in range(rounds))
    verified = size / verify_seconds / 1e9
    instructions = has_sha_instructions()
    kept = min(ratios.values()) >= PROMISED_RATIO and (verified >= PROMISED_VERIFY_GB_PER_S or not instructions)
    facts = {
        "bench": "registry",
        "bytes": size,
        "rounds": rounds,
        "mb_per_s": {name: round(size / value / 1e6, 1) for name, value in median.items()},
        "seconds": {name: [round(lap, 2) for lap in laps] for name, laps in seconds.items()},
        "up_ratio": round(ratios["up"], 3),
        "down_ratio": round(ratios["down"], 3),
        "verify_gb_per_s": round(verified, 2),
        "sha_instructions": instructions,
        "load_1_min": round(os.getloadavg()[0], 1),
        "promise_kept": kept,
    }
    print(json.dumps(facts))
    return 0 if kept else 1


def compare(ours: list[float], theirs: list[float]) -> float:
    """Return their time over ours, of rounds in which who went first alternated."""
    pairs = [one / own for own, one in zip(ours, theirs, strict=True)]
    return statistics.geometric_mean(map(statistics.median, (pairs[::2], pairs[1::2])))


def lap_of(place: Path, source: Path, file: PackageFile, number: int) -> dict[str, Callable[[], object]]:
    """Return one round's laps; who goes first changes from round to round."""
    store, client = open_store(f"s3://{BUCKET}/r{number}"), boto3.client("s3")  # theirs as it comes
    config = TransferConfig(preferred_transfer_client="classic")
    with (place / "small").open("wb") as small:
        small.truncate(ONE_PUT_BYTES + 1)
    store.put_if_absent("probed", place / "small")  # creates the client and tests the store
    key, theirs = f"blobs/sha256/{file.sha256[:2]}/{file.sha256}", f"boto/r{number}"
    down, boto_down = place / f"down-{number}", place / f"boto-{number}"

    def download_theirs() -> None:
        client.download_file(BUCKET, theirs, str(boto_down), Config=config)
        with boto_down.open("rb") as fetched:
            os.fsync(fetched.fileno())
        boto_down.unlink()

    def download_ours() -> None:
        fetch_file(store, file, down)
        down.unlink()

    laps: dict[str, Callable[[], object]] = {
        "up": lambda: store.put_if_absent(key, source, sha256=file.sha256),
        "boto_up": lambda: client.upload_file(str(source), BUCKET, theirs, Config=config),
        "settle": download_theirs,
        "down": download_ours,
        "boto_down": download_theirs,
    }
    ours_first, theirs_first = (
        ("up", "boto_up", "settle", "down", "boto_down"),
        ("boto_up", "up", "settle", "boto_down", "down"),
    )
    order = ours_first if number % 2 else theirs_first
    return {name: laps[name] for name in order}


def verify_in_folder(place: Path, source: Path, file: PackageFile) -> None:
    """Re-hash the file as a folder registry's blob: one core, the page cache warm."""
    from ropeway.registry.blobs import blob_fault

    store = open_store((place / "registry").as_uri())
    key = f"blobs/sha256/{file.sha256[:2]}/{file.sha256}"
    if not store.exists(key):
        (store.root / key).parent.mkdir(parents=True)
        os.link(source, store.root / key)
    if fault := blob_fault(store, file, rehash=True):
        raise AssertionError(fault)


def write_source(path: Path, size: int) -> tuple[Path, str]:
    """Write a safetensors file of random bytes; return it and its sha256."""
    head = len(HEADER).to_bytes(8, "little") + HEADER
    digest = hashlib.sha256(head)
    with path.open("wb") as file:
        file.write(head)
        left = size - len(head)
        while left:
            block = os.urandom(min(1 << 20, left))
            digest.update(block)
            left -= file.write(block)
    return path, digest.hexdigest()


def timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def has_sha_instructions() -> bool:
    """Return whether the processor says it has them: `sha_ni` on x86, `sha2` on ARM."""
    return bool(re.search(r"\b(sha_ni|sha2)\b", Path("/proc/cpuinfo").read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main())
