"""How many rows and tokens a run reads, by source: from the data where it is prepared, else from `expected_rows`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ropeway.config.params import Profile
from ropeway.data.batches import plan_epoch
from ropeway.data.mixture import epoch_count
from ropeway.data.shards import Shards, SourceShards, open_shards
from ropeway.runtime.manifest import NAME
from ropeway.runtime.workspace import Workspace

OTHER_RANKS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Counted:
    """What an epoch reads, and the tokens of all epochs."""

    rows_per_source: dict[str, int | None]
    tokens_per_source: dict[str, int | None]
    rows: int | None
    tokens: int | None
    most_tokens: int | None
    from_data: bool

    def steps(self, profile: Profile) -> int | None:
        """Return the optimizer steps of the whole run."""
        return None if self.rows is None else self.rows // profile.global_batch_size * profile.num_train_epochs


def count_reading(workspace: Workspace, profile: Profile) -> Counted:
    """Return what a run reads."""
    shards = open_shards(workspace.data, verify=False) if (workspace.data / NAME).is_file() else None
    sizes = _prepared_sizes(shards) if shards else _expected_sizes(profile)
    rows = {
        name: None if (size := sizes[name]) is None else epoch_count(size, options, name=name)
        for name, options in profile.mixture
    }
    tokens: dict[str, int | None] = dict.fromkeys(rows)
    if shards:
        tokens = {part.name: _tokens(part, rows[part.name] or 0, profile) for part in shards.sources}
    total = _sum(rows)
    if profile.layout == "packed":  # how many rows the sequences fill is known once they are counted
        total = plan_epoch(shards, profile, epoch=0).rows if shards else None
    epochs, read = profile.num_train_epochs, _sum(tokens)
    return Counted(
        rows_per_source=rows,
        tokens_per_source=tokens,
        rows=total,
        tokens=None if read is None else read * epochs,
        most_tokens=None if total is None else total * profile.max_length * epochs,
        from_data=shards is not None,
    )


def _sum(counts: Mapping[str, int | None]) -> int | None:
    known = [count for count in counts.values() if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _prepared_sizes(shards: Shards) -> dict[str, int | None]:
    return {source.name: len(source.train) for source in shards.sources}


def _expected_sizes(profile: Profile) -> dict[str, int | None]:
    """Return the training parts that the sources' `expected_rows` leave after the split."""
    split = profile.val_split
    return {
        name: None if source.expected_rows is None else source.expected_rows - math.ceil(split * source.expected_rows)
        for name, source in profile.sources.items()
    }


def _tokens(source: SourceShards, rows: int, profile: Profile) -> int:
    """Return the tokens an epoch reads of a source; packed documents are read whole, all else up to `max_length`."""
    lengths = source.lengths[source.train].astype(np.int64)
    if not (profile.layout == "packed" and source.is_document):
        lengths = np.minimum(lengths, profile.max_length)
    return round(float(lengths.mean()) * rows) if len(lengths) else 0


def plan_elsewhere(profile: Profile, rows: int | None, ranks: int) -> dict[int, dict[str, int | str]]:
    """Return what other rank counts would do."""
    return {} if rows is None else {count: _elsewhere(profile, rows, count) for count in OTHER_RANKS if count != ranks}


def _elsewhere(profile: Profile, rows: int, ranks: int) -> dict[str, int | str]:
    """Return what another rank count does here (equal steps), and did in the original (accumulation fixed)."""
    rows_per_pass = profile.per_device_train_batch_size * ranks
    original = rows // (rows_per_pass * profile.gradient_accumulation_steps) * profile.num_train_epochs
    if profile.global_batch_size % rows_per_pass:
        return {"refused": f"{profile.global_batch_size} rows do not divide by {rows_per_pass}", "original": original}
    return {
        "accumulation_steps": profile.global_batch_size // rows_per_pass,
        "optimizer_steps": rows // profile.global_batch_size * profile.num_train_epochs,
        "original": original,
    }
