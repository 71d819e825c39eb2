"""data/: one source's shards and split to its folder, and a look through the reader that training uses."""

from pathlib import Path

import numpy as np

from ropeway.data.shards import Shards, SourceShards, sequence_digest
from ropeway.data.tokenized import TokenizedSource, shard_path
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import link_file
from ropeway.stages.prepare.split import Split


def write_source(folder: Path, source: TokenizedSource, split: Split) -> None:
    """Put a source's shards, lengths and split into its folder; the shards are second names of those in tokens/."""
    folder.mkdir(parents=True)
    for number in range(len(source.shard_sequences)):
        for part in ("tokens", "kinds"):
            link_file(shard_path(source.folder, part, number), shard_path(folder, part, number))
    link_file(source.folder / "lengths.npy", folder / "lengths.npy")
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
                        "run `dvc repro tokenize` again"
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
                    f"{expected:,}; run `dvc repro tokenize` again"
                )
        first += count
