"""The acting part: units made that are not there yet, and one source's units to its folder in tokens/."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropeway.data.raw_records import RecordKind
from ropeway.data.tokenized import COLUMNS, SHARDS, TokenizedFacts, shard_path
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import FileFacts, link_file
from ropeway.stages.tokenize import encode_workers as workers
from ropeway.stages.tokenize.units import Unit, UnitFacts, load_unit, read_unit, tokenize_unit


@dataclass(frozen=True)
class Units:
    """One source's whole units, in order, on disk.

    Attributes:
        folders: One per unit.
        facts: Each unit's manifest.
    """

    folders: tuple[Path, ...]
    facts: tuple[UnitFacts, ...]

    def describe(self, name: str, kind: RecordKind) -> TokenizedFacts:
        """Return the source's entry in tokens/manifest.json, in the shape `ropeway.data.tokenized` reads."""
        counts = [facts["records"] for facts in self.facts]
        return {
            "name": name,
            "kind": kind,
            "tokens": sum(facts["tokens"] for facts in self.facts),
            "shard_sequences": [facts["sequences"] for facts in self.facts],
            "shard_records": [count["kept"] for count in counts],
            "ends": [facts["ends"] for facts in self.facts],
            "records": {
                "with_special_tokens": sum(count["with_special_tokens"] for count in counts),
                "without_tokens": sum(count["without_tokens"] for count in counts),
                "refused": dict(sum((Counter(count["refused"]) for count in counts), Counter())),
                "special_token_hits": dict(sum((Counter(count["special_token_hits"]) for count in counts), Counter())),
            },
        }

    def place(self, folder: Path) -> None:
        """Put shards and columns into a source's folder; the units stay, so a later failure costs no tokenizing."""
        folder.mkdir(parents=True)
        for number, unit in enumerate(self.folders):
            for part in SHARDS:
                link_file(unit / f"{part}.npy", shard_path(folder, part, number))
        for name in COLUMNS:
            np.save(folder / f"{name}.npy", self._column(name), allow_pickle=False)

    def check_placed(self, name: str, files: Mapping[str, FileFacts]) -> None:
        """Raise DataError unless the files of tokens' manifest are the bytes that were made."""
        for number, (unit, facts) in enumerate(zip(self.folders, self.facts, strict=True)):
            for part in SHARDS:
                placed, made = files[f"{name}/{part}-{number:05d}.npy"], facts["files"][f"{part}.npy"]
                if placed["sha256"] != made["sha256"]:
                    raise DataError(
                        f"{unit / part}.npy: sha256 is {placed['sha256'][:12]}…, {made['sha256'][:12]}… was written; "
                        "the disk is at fault. Run `dvc repro tokenize` again: this unit is made again"
                    )

    def _column(self, name: str) -> NDArray[Any]:
        """Return a column of all units; records, which a unit counts from its first, are counted over the source."""
        parts = [np.load(folder / f"{name}.npy", allow_pickle=False) for folder in self.folders]
        if name == "records":
            kept = [facts["records"]["kept"] for facts in self.facts]
            parts = [part + first for part, first in zip(parts, np.cumsum([0, *kept[:-1]]), strict=True)]
        return np.concatenate(parts)


def make_units(planned: Mapping[str, Sequence[Unit]], *, work: Path) -> dict[str, Units]:
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
        print(f"tokenize: {len(everything) - len(missing)} of {len(everything)} units are there already", flush=True)
    text_bytes = sum(group.text_bytes for unit in missing for group in unit.groups)
    made = workers.make(tokenize_unit, missing, text_bytes=text_bytes, work=work)
    for number, folder in enumerate(made, start=1):
        print(f"tokenize: {folder.parent.name} {folder.name} made, {number} of {len(missing)}", flush=True)
    return {name: _open_units(units) for name, units in planned.items()}


def _open_units(units: Sequence[Unit]) -> Units:
    folders = tuple(unit.folder for unit in units)
    remedy = "Run `dvc repro tokenize` again"
    return Units(folders, tuple(read_unit(folder, remedy=remedy, verify=False) for folder in folders))
