"""The acting part: units made that are not there yet, one source's units to its folder, and a look through a reader."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropeway.data.shards import Shards, SourceShards
from ropeway.runtime.errors import DataError, TemporaryError, is_disk_full
from ropeway.runtime.manifest import load_manifest
from ropeway.stages.prepare import encode_workers as workers
from ropeway.stages.prepare.split import Split
from ropeway.stages.prepare.units import Unit, encode_unit, load_unit, sequence_digest


@dataclass(frozen=True)
class Units:
    """One source's whole units, in order, on disk.

    Attributes:
        folders: One per unit.
        facts: Each unit's manifest.
    """

    folders: tuple[Path, ...]
    facts: tuple[dict[str, Any], ...]

    @property
    def shard_sequences(self) -> list[int]:
        """Sequences of each unit."""
        return [facts["sequences"] for facts in self.facts]

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(facts["tokens"] for facts in self.facts)

    def count(self, what: str) -> int:
        """Return how many records are `kept`, `without_tokens` or `with_special_tokens`."""
        return sum(facts["records"][what] for facts in self.facts)

    def count_by(self, what: str) -> Counter[str]:
        """Return how many records were `refused` for each reason, or each string's `special_token_hits`."""
        return sum((Counter(facts["records"][what]) for facts in self.facts), Counter())

    def column(self, name: str) -> NDArray[Any]:
        """Return `(N,)` of all sequences: `lengths`, `keys`, `record_keys`, or `records` counted over the source."""
        parts = [np.load(folder / f"{name}.npy", allow_pickle=False) for folder in self.folders]
        if name == "records":
            parts = [part + first for part, first in zip(parts, self._first_records, strict=True)]
        return np.concatenate(parts)

    @cached_property
    def _first_records(self) -> NDArray[np.int64]:
        kept = [facts["records"]["kept"] for facts in self.facts]
        return np.cumsum([0, *kept[:-1]], dtype=np.int64)

    def place(self, folder: Path) -> None:
        """Put shards and lengths into a source's folder; the units stay, so a later failure costs no encoding."""
        folder.mkdir(parents=True)
        for number, unit in enumerate(self.folders):
            for part in ("tokens", "kinds"):
                _link(unit / f"{part}.npy", folder / f"{part}-{number:05d}.npy")
        np.save(folder / "lengths.npy", self.column("lengths"), allow_pickle=False)

    def check_placed(self, name: str, files: dict[str, Any]) -> None:
        """Raise DataError unless the files of data's manifest are the bytes that were encoded."""
        for number, (unit, facts) in enumerate(zip(self.folders, self.facts, strict=True)):
            for part in ("tokens", "kinds"):
                placed, made = files[f"{name}/{part}-{number:05d}.npy"], facts["files"][f"{part}.npy"]
                if placed["sha256"] != made["sha256"]:
                    raise DataError(
                        f"{unit / part}.npy: sha256 is {placed['sha256'][:12]}…, {made['sha256'][:12]}… was written; "
                        "the disk is at fault. Run `dvc repro prepare` again: this unit is made anew"
                    )


def make_units(planned: dict[str, Sequence[Unit]], *, work: Path) -> dict[str, Units]:
    """Make the units that are not there, and return all of them by source.

    Raises:
        ConfigError: The environment names workers that are not there.
        TemporaryError: A worker died or the disk is full; what is whole stays.
    """
    for partial in work.glob("**/.*.partial"):
        shutil.rmtree(partial)
    everything = [unit for units in planned.values() for unit in units]
    missing = [unit for unit in everything if load_unit(unit.folder) is None]
    if len(everything) > len(missing):
        print(f"prepare: {len(everything) - len(missing)} of {len(everything)} units are there already", flush=True)
    text_bytes = sum(group.text_bytes for unit in missing for group in unit.groups)
    made = workers.make(encode_unit, missing, text_bytes=text_bytes, work=work)
    for number, folder in enumerate(made, start=1):
        print(f"prepare: {folder.parent.name} {folder.name} made, {number} of {len(missing)}", flush=True)
    return {name: _open_units(units) for name, units in planned.items()}


def _open_units(units: Sequence[Unit]) -> Units:
    folders = tuple(unit.folder for unit in units)
    remedy = "Run `dvc repro prepare` again"
    return Units(folders, tuple(load_manifest(folder, remedy=remedy, verify=False) for folder in folders))


@contextmanager
def disk_may_be_full(work: Path) -> Iterator[None]:
    """Say what to do when it is."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        free = shutil.disk_usage(work).free if work.exists() else 0
        raise TemporaryError(
            f"{error.filename or work}: the disk is full ({free:,} bytes free). Make room and run the same command "
            f"again: whole units are kept in {work}"
        ) from error


def write_split(folder: Path, split: Split) -> None:
    """Write the training and validation parts."""
    np.save(folder / "train.npy", split.train.astype(np.int64), allow_pickle=False)
    np.save(folder / "validation.npy", split.validation.astype(np.int64), allow_pickle=False)


def check_readback(shards: Shards, ends: dict[str, list[list[str]]]) -> None:
    """Raise DataError unless the reader finds in each shard as many tokens as written, and its ends as they were.

    Fast: two sequences a shard are read, whatever its size.

    Args:
        shards: What was written, opened as training opens it.
        ends: By source and shard, digests of the first and the last sequence as they were encoded.
    """
    for source in shards.sources:
        _check_sizes(source)
        first = 0
        for count, written in zip(source.shard_sequences, ends[source.name], strict=True):
            for number, digest in zip((first, first + count - 1), written, strict=bool(written)):
                tokens, kinds = source.read(number)
                if sequence_digest(tokens, kinds) != digest:
                    raise DataError(
                        f"{source.folder}: sequence {number} reads back as {len(tokens)} tokens "
                        f"{tokens[:8].tolist()}…, which is not what was written; the disk or the format is at fault: "
                        "run `dvc repro prepare` again"
                    )
            first += count


def _check_sizes(source: SourceShards) -> None:
    first = 0
    for shard, count in enumerate(source.shard_sequences):
        expected = int(source.lengths[first : first + count].sum())
        for part in ("tokens", "kinds"):
            found = len(np.load(source.folder / f"{part}-{shard:05d}.npy", mmap_mode="r", allow_pickle=False))
            if found != expected:
                raise DataError(
                    f"{source.folder}: {part}-{shard:05d}.npy holds {found:,} entries, its {count:,} sequences "
                    f"{expected:,}; run `dvc repro prepare` again"
                )
        first += count


def _link(unit: Path, target: Path) -> None:
    """Give a unit's file a second name in data/; where the disk knows no links, copy it."""
    try:
        os.link(unit, target)
    except OSError:
        shutil.copyfile(unit, target)
