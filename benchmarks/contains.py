"""The time of `ropeway contains` over versions of 10 million records each, and the bytes of an index: one JSON line.

The records are random digests: what counts is their number. The registry is a folder; on S3 each read is one request,
so the figures name the number of reads and the largest.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ropeway.data.data_profile import FILE
from ropeway.data.record_index import RecordGroup, RecordOutcome, build_record_index
from ropeway.orchestration.record_search import search_records
from ropeway.registry import Registry
from ropeway.runtime.manifest import describe_files, file_sha256, write_json, write_manifest
from ropeway.storage import FileStore

PROMISED_SECONDS, PROMISED_BYTES = 2.0, 12.0
_ROLES = (("trained", ""), ("validation", ""), ("dropped", "near duplicate"))


class CountingStore(FileStore):
    """A folder that counts the ranges read from it."""

    def __init__(self, root: Path) -> None:
        """Use this folder."""
        super().__init__(root)
        self.reads: list[int] = []

    def read_range(self, key: str, start_byte: int, count: int) -> bytes:
        """Read, and note the size."""
        self.reads.append(count)
        return super().read_range(key, start_byte, count)


def publish(store: FileStore, folder: Path, records: int, number: int) -> tuple[float, int, str]:
    """Publish a version with an index of random digests; return seconds to build it, its bytes, and one digest."""
    keys = np.random.default_rng(number).integers(0, 2**64, (records, 2), np.uint64)
    borders = [int(records * share) for share in (0.9, 0.95)]
    groups = [
        RecordGroup(RecordOutcome("random", role, reason), part)  # type: ignore[arg-type]
        for (role, reason), part in zip(_ROLES, np.split(keys, borders), strict=True)
    ]
    began = time.perf_counter()
    data = build_record_index(groups)
    seconds = time.perf_counter() - began
    run, package, pages = folder / "run", folder / "run" / "package", folder / "run" / "pages"
    for place in (package, pages):
        place.mkdir(parents=True, exist_ok=True)
    index = run / "records.index"
    index.write_bytes(data)
    write_json(package / "run.json", {"params": {"sources": {}}, "number": number})
    write_manifest(package, {})
    write_json(pages / FILE, {"record_index": describe_files(run, [index.name])[index.name]})
    (pages / "manifest.json").unlink(missing_ok=True)
    (pages / "README.md").write_text(f"# {number}\n")
    listed = json.loads((package / "manifest.json").read_bytes())["files"]
    whole = {
        "package": file_sha256(package / "manifest.json"),
        "files": {**listed, **write_manifest(pages, {})["files"]},
    }
    write_json(pages / "manifest.json", whole)
    Registry(store).artifact("bench").publish(package, provenance={}, attachments={index.name: index}, pages=pages)
    return seconds, len(data), keys[0].astype("<u8").tobytes().hex()


def main() -> int:
    """Print the figures; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--versions", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--file-records", type=int, default=10_000, help="records of the file that is looked up")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-contains-") as place:
        store = CountingStore(Path(place) / "registry")
        made = [publish(store, Path(place), options.records, number) for number in range(options.versions)]
        registry, wanted = Registry(store), [digest for *_, digest in made]
        one: list[float] = []
        for number in range(options.rounds):
            store.reads.clear()
            began = time.perf_counter()
            answer = search_records(registry, wanted[number % len(wanted)])
            one.append(time.perf_counter() - began)
            found = [version.count("trained") for version in answer.versions]
            if sum(found) != 1 or found[number % len(wanted)] != 1:
                raise SystemExit(f"expected the digest in one version, found {found}")
        reads = list(store.reads)
        listed = Path(place) / "digests.txt"
        others = np.random.default_rng(-1 & 0xFFFF).integers(0, 2**64, (options.file_records - 1, 2), np.uint64)
        listed.write_text("\n".join([wanted[0], *(key.astype("<u8").tobytes().hex() for key in others)]))
        began = time.perf_counter()
        many = search_records(registry, str(listed))
        many_seconds = time.perf_counter() - began
    if sum(version.count("trained") for version in many.versions) != 1:
        raise SystemExit("expected one record of the file in one version")
    figures = {
        "records": options.records,
        "versions": options.versions,
        "bytes_per_record": round(max(size for _, size, _ in made) / options.records, 4),
        "build_seconds": round(statistics.median(seconds for seconds, *_ in made), 2),
        "one_record_seconds": round(statistics.median(one), 4),
        "one_record_reads": len(reads),
        "largest_read_bytes": max(reads),
        "file_records": options.file_records,
        "file_seconds": round(many_seconds, 2),
        "false_match_probability": answer.false_match_probability,
    }
    kept = figures["one_record_seconds"] <= PROMISED_SECONDS and figures["bytes_per_record"] <= PROMISED_BYTES
    print(json.dumps(figures | {"promise_kept": kept}))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
