"""The acting part: sequences to shard files, a shard at a time, and a look at them through the reader's eyes."""

from array import array
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ropeway.errors import DataError
from ropeway.prepare.encode import Sequence
from ropeway.prepare.split import Split
from ropeway.shards import Shards, SourceShards, write_shard

SHARD_TOKENS = 1 << 26  # 128 MiB of uint16


class ShardWriter:
    """Writes one source's folder; holds the tokens of one shard and some twenty bytes per sequence.

    Attributes:
        shard_sequences: Sequences of each shard written.
        tokens: All tokens written.
        samples: Sequence number -> sequence, the first and the last of each shard, for `check_readback`.
    """

    def __init__(self, folder: Path, *, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        """Make the folder."""
        folder.mkdir(parents=True)
        self._folder, self._vocab_size, self._shard_tokens = folder, vocab_size, shard_tokens
        self._waiting: list[Sequence] = []
        self._waiting_tokens = 0
        self._lengths, self._records, self._keys, self._record_keys = array("i"), array("q"), array("Q"), array("Q")
        self.shard_sequences: list[int] = []
        self.tokens = 0
        self.samples: dict[int, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        """Append one sequence."""
        self._waiting.append(sequence)
        self._waiting_tokens += len(sequence.tokens)
        self._lengths.append(len(sequence.tokens))
        self._records.append(sequence.record)
        self._keys.append(sequence.key)
        self._record_keys.append(sequence.record_key)
        if self._waiting_tokens >= self._shard_tokens:
            self._flush()

    def finish(self, *, by_document: bool) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Write what waits and the lengths; return (records, keys), `(N,)` each, as `plan_split` takes them."""
        if self._waiting or not self.shard_sequences:
            self._flush()
        np.save(self._folder / "lengths.npy", np.asarray(self._lengths, dtype=np.int32), allow_pickle=False)
        keys = self._record_keys if by_document else self._keys
        return np.asarray(self._records, dtype=np.int64), np.asarray(keys, dtype=np.uint64)

    def write_split(self, split: Split) -> None:
        """Write the training and validation parts."""
        np.save(self._folder / "train.npy", split.train.astype(np.int64), allow_pickle=False)
        np.save(self._folder / "validation.npy", split.validation.astype(np.int64), allow_pickle=False)

    def _flush(self) -> None:
        first = sum(self.shard_sequences)
        pairs = [(sequence.tokens, sequence.kinds) for sequence in self._waiting]
        write_shard(self._folder, len(self.shard_sequences), pairs, vocab_size=self._vocab_size)
        if self._waiting:
            self.samples[first] = self._waiting[0]
            self.samples[first + len(pairs) - 1] = self._waiting[-1]
        self.shard_sequences.append(len(pairs))
        self.tokens += self._waiting_tokens
        self._waiting, self._waiting_tokens = [], 0


def check_readback(shards: Shards, samples: dict[str, dict[int, Sequence]]) -> None:
    """Raise DataError unless the reader finds in each shard as many tokens as written, and its ends as they were.

    Fast: two sequences a shard are read, whatever its size.
    """
    for source in shards.sources:
        _check_sizes(source)
        for number, written in samples[source.name].items():
            tokens, kinds = source.read(number)
            if not (np.array_equal(tokens, written.tokens) and np.array_equal(kinds, written.kinds)):
                raise DataError(
                    f"{source.folder}: sequence {number} reads back as {len(tokens)} tokens {tokens[:8].tolist()}…, "
                    f"written were {len(written.tokens)}: {written.tokens[:8].tolist()}…; the disk or the format is "
                    "at fault: run `dvc repro prepare` again"
                )


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
