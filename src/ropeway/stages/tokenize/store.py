"""Make missing units, and write the units of each source to its folder in tokens/."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropeway.data.data_profile import DataProfile
from ropeway.data.raw_records import RecordKind
from ropeway.data.tokenized import COLUMNS, PROFILE, SHARDS, TokenizedFacts, shard_path
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import FileFacts, link_file
from ropeway.runtime.progress import StageProgress
from ropeway.stages.tokenize import encode_workers as workers
from ropeway.stages.tokenize.units import Unit, UnitFacts, load_unit, read_unit, tokenize_unit


@dataclass(frozen=True)
class Units:
    """The completed units of one source on disk, in order.

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
                "personal_data": dict(sum((Counter(count["personal_data"]) for count in counts), Counter())),
                "with_personal_data": sum(count["with_personal_data"] for count in counts),
            },
        }

    def sum_profiles(self) -> DataProfile:
        """Return the data profile of the source; one unit's is in memory at a time."""
        total = DataProfile()
        for folder in self.folders:
            total.add(DataProfile.from_json(json.loads((folder / PROFILE).read_bytes())))
        return total

    def write_source(self, folder: Path) -> None:
        """Write shards and columns to a source's folder; the units are kept, so a later failure loses no work."""
        folder.mkdir(parents=True)
        for number, unit in enumerate(self.folders):
            for part in SHARDS:
                link_file(unit / f"{part}.npy", shard_path(folder, part, number))
        for name in COLUMNS:
            np.save(folder / f"{name}.npy", self._column(name), allow_pickle=False)

    def verify_source(self, name: str, files: Mapping[str, FileFacts]) -> None:
        """Raise DataError unless the files of tokens/ have the digests that the units' manifests state."""
        for number, (unit, facts) in enumerate(zip(self.folders, self.facts, strict=True)):
            for part in SHARDS:
                written, made = files[f"{name}/{part}-{number:05d}.npy"], facts["files"][f"{part}.npy"]
                if written["sha256"] != made["sha256"]:
                    raise DataError(
                        f"{unit / part}.npy: sha256 is {written['sha256'][:12]}…, expected {made['sha256'][:12]}…; the "
                        "file changed after it was written. Check the disk and run `dvc repro tokenize` again: it "
                        "makes this unit again"
                    )

    def _column(self, name: str) -> NDArray[Any]:
        """Return a column of all units; numbers of records and reasons, which are a unit's own, become the source's."""
        parts = [np.load(folder / f"{name}.npy", allow_pickle=False) for folder in self.folders]
        if name == "records":
            kept = [facts["records"]["kept"] for facts in self.facts]
            parts = [part + first for part, first in zip(parts, np.cumsum([0, *kept[:-1]]), strict=True)]
        if name == "refused_reasons":
            of_units = [sorted(facts["records"]["refused"]) for facts in self.facts]
            whole = sorted({reason for reasons in of_units for reason in reasons})
            parts = [
                np.asarray([whole.index(reason) for reason in reasons], np.uint16)[part]
                for reasons, part in zip(of_units, parts, strict=True)
            ]
        return np.concatenate(parts)


def make_units(planned: Mapping[str, Sequence[Unit]], *, work: Path) -> dict[str, Units]:
    """Make the missing units, and return all units by source.

    Raises:
        ConfigError: The workers that the environment names cannot be used.
        TemporaryError: A worker died or the disk is full; completed units are kept.
    """
    for partial in work.glob("**/.*.partial"):
        shutil.rmtree(partial)
    all_units = [unit for units in planned.values() for unit in units]
    missing = [unit for unit in all_units if load_unit(unit.folder) is None]
    if len(all_units) > len(missing):
        print(f"tokenize: {len(all_units) - len(missing)} of {len(all_units)} units are complete already", flush=True)
    text_bytes = sum(group.text_bytes for unit in missing for group in unit.groups)
    made = workers.run_jobs(tokenize_unit, missing, text_bytes=text_bytes, work=work)
    with StageProgress("units", len(missing)) as progress:
        for number, folder in enumerate(made, start=1):
            print(f"tokenize: {folder.parent.name} {folder.name} made, {number} of {len(missing)}", flush=True)
            progress.advance()
    return {name: _read_units(units) for name, units in planned.items()}


def _read_units(units: Sequence[Unit]) -> Units:
    folders = tuple(unit.folder for unit in units)
    remedy = "Run `dvc repro tokenize` again"
    return Units(folders, tuple(read_unit(folder, remedy=remedy, verify=False) for folder in folders))
