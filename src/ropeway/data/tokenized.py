"""Tokens, written by tokenize and read by prepare: every sequence of every source, and the fingerprints of records.

tokens/manifest.json                                written last; see `ropeway.runtime.manifest`
tokens/profile.json                                 counts and sketches of each source; see `ropeway.data.data_profile`
tokens/<source>/tokens-00000.npy, kinds-00000.npy   a shard, as `ropeway.data.shards` has it
tokens/<source>/signatures-00000.npy                uint32 `(r, permutations)`: MinHash signatures of its records, 512
                                                    bytes each at 128; empty if near-duplicate detection is off
tokens/<source>/grams-00000.npy                     uint64 `(g,)`: word n-gram hashes of its sequences, 8 bytes per word
                                                    of text; empty if contamination detection is off
tokens/<source>/lengths.npy, gram_counts.npy        int32 `(N,)`: tokens and n-grams of each sequence
tokens/<source>/records.npy                         int64 `(N,)`: the kept record that each sequence comes from
tokens/<source>/keys.npy, record_keys.npy           uint64 `(N,)`: hashes of each sequence's text and of its record's
tokens/<source>/exact.npy                           uint64 `(R, 2)`: digest of each kept record, as
                                                    `ropeway.data.record_identity` has it
tokens/<source>/refused_exact.npy                   uint64 `(r, 2)`: digest of each record that tokenize refused
tokens/<source>/refused_reasons.npy                 uint16 `(r,)`: why, as a position in the sorted keys of
                                                    `records.refused` in the manifest
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from ropeway.config.faults import check_json
from ropeway.data.mixture import SPLIT_SEED
from ropeway.data.raw_records import RecordKind
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import NAME, FileFacts, check_listed, load_manifest

REMEDY = "Run `dvc repro tokenize` to restore it"
# One file per source.
COLUMNS = ("lengths", "records", "keys", "record_keys", "exact", "gram_counts", "refused_exact", "refused_reasons")
SHARDS = ("tokens", "kinds", "signatures", "grams")
PROFILE = "profile.json"  # also in each unit


class RecordCounts(TypedDict):
    """Record counts of tokenize."""

    with_special_tokens: int
    without_tokens: int
    refused: dict[str, int]
    special_token_hits: dict[str, int]
    personal_data: dict[str, int]  # kind -> occurrences in all records, kept or refused; empty if not looked for
    with_personal_data: int  # records with any


class TokenizedFacts(TypedDict):
    """A source's manifest entry; lists have one item per shard, `ends` the digests of its first and last sequence."""

    name: str
    kind: RecordKind
    tokens: int
    shard_sequences: list[int]
    shard_records: list[int]
    ends: list[list[str]]
    records: RecordCounts


class TokensManifest(TypedDict):
    """tokens/manifest.json."""

    format: int
    special: dict[str, int]
    tokenizer: str
    template: str
    vocab_size: int
    params: dict[str, Any]
    sources: list[TokenizedFacts]
    files: dict[str, FileFacts]


@dataclass(frozen=True, slots=True)
class TokenizedSource:
    """One source.

    Attributes:
        folder: The folder of its files.
        facts: Its manifest entry.
    """

    folder: Path
    facts: TokenizedFacts

    @property
    def shard_sequences(self) -> list[int]:
        """Number of sequences of each shard."""
        return list(self.facts["shard_sequences"])

    @property
    def records_kept(self) -> int:
        """Number of records that were not refused."""
        return sum(self.facts["shard_records"])

    def column(self, name: str) -> NDArray[Any]:
        """Return one of `COLUMNS`."""
        return np.asarray(np.load(self.folder / f"{name}.npy", allow_pickle=False))

    def shard(self, name: str, number: int) -> NDArray[Any]:
        """Return one of `SHARDS`, memory-mapped."""
        return np.asarray(np.load(shard_path(self.folder, name, number), mmap_mode="r", allow_pickle=False))

    def iterate_grams(self) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
        """Yield each shard's n-gram hashes, and the `(n + 1,)` offsets of its sequences in them."""
        counts = self.column("gram_counts").astype(np.int64)
        for number, (first, end) in enumerate(pairwise(np.cumsum([0, *self.shard_sequences]))):
            yield self.shard("grams", number), np.concatenate([[0], np.cumsum(counts[first:end])])


def open_tokenized(folder: Path, *, verify: bool = True) -> tuple[dict[str, TokenizedSource], TokensManifest]:
    """Return the sources of a tokens folder in the order of its manifest, and the manifest.

    Raises:
        DataError: The folder is incomplete, a file has changed, or the manifest lacks a key or a file.
    """
    manifest = check_json(
        load_manifest(folder, remedy=REMEDY, verify=verify), TokensManifest, where=folder / NAME, remedy=REMEDY
    )
    check_listed(folder, [PROFILE], manifest["files"], remedy=REMEDY)
    for facts in manifest["sources"]:
        name, shards = facts["name"], len(facts["shard_sequences"])
        if not shards == len(facts["shard_records"]) == len(facts["ends"]):
            raise DataError(
                f"{folder / NAME}: source {name}: shard_sequences, shard_records and ends have {shards}, "
                f"{len(facts['shard_records'])} and {len(facts['ends'])} items, expected one per shard. {REMEDY}"
            )
        expected = [f"{name}/{column}.npy" for column in COLUMNS]
        expected += [f"{name}/{part}-{number:05d}.npy" for part in SHARDS for number in range(shards)]
        check_listed(folder, expected, manifest["files"], remedy=REMEDY)
    return {facts["name"]: TokenizedSource(folder / facts["name"], facts) for facts in manifest["sources"]}, manifest


def shard_path(folder: Path, name: str, number: int) -> Path:
    """Return the path of a shard's array in a source's folder."""
    return folder / f"{name}-{number:05d}.npy"


def text_key(text: str) -> int:
    """Return a 64-bit hash of a text, keyed with the split's fixed seed; equal on every machine."""
    seed = SPLIT_SEED.to_bytes(8)
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=seed).digest())
