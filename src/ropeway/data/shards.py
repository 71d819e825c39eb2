"""Token shards: every sequence of every source, stored complete and once; windows and packing are plans over lengths.

data/manifest.json                    written last; see `ropeway.runtime.manifest`
data/<source>/tokens-00000.npy        uint16 or uint32, concatenated sequences
data/<source>/kinds-00000.npy         uint8 per token: its speaker (`Kind`)
data/<source>/lengths.npy             int32 per sequence, of all shards
data/<source>/train.npy               int64 sequence numbers of the training part, in the sampler's order
data/<source>/validation.npy          int64 sequence numbers of validation; a sequence in neither is unused or removed
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from ropeway.config.faults import check_json
from ropeway.models.chat_template import Speaker
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import NAME, FileFacts, check_listed, digest_of, load_manifest

FORMAT = 1
REMEDY = "Run `dvc repro prepare` to restore it"


class Kind(IntEnum):
    """The speaker of a token, or in a Jinja template whether the model generates it. The loss mask depends on it."""

    SYSTEM = Speaker.SYSTEM  # BOS and the system message
    PROMPTER = Speaker.USER
    ASSISTANT = Speaker.ASSISTANT
    DOCUMENT = 3
    DOCUMENT_END = 4  # the last token of a document's last chunk
    CONTEXT = 5  # of a conversation in a Jinja template: not supervised, of any speaker
    ANSWER = 6  # of a conversation in a Jinja template: content or end token of an answer


@dataclass(frozen=True)
class SourceShards:
    """One source's sequences, memory-mapped.

    Attributes:
        name: As in params.
        kind: `conversation` or `document`.
        lengths: `(N,)` tokens of each sequence.
        train: `(n,)` sequence numbers of the training part.
        validation: `(v,)` sequence numbers of the validation part.
    """

    name: str
    kind: str
    folder: Path
    shard_sequences: tuple[int, ...]
    lengths: NDArray[np.int32]
    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    _open: dict[int, tuple[NDArray[Any], NDArray[np.uint8]]] = field(default_factory=dict)

    @property
    def is_document(self) -> bool:
        """True for plain text, False for conversations."""
        return self.kind == "document"

    @cached_property
    def _firsts(self) -> NDArray[np.int64]:
        return np.concatenate(([0], np.cumsum(self.shard_sequences, dtype=np.int64)))

    @cached_property
    def _begins(self) -> NDArray[np.int64]:
        return np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))

    def read(self, sequence: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return (tokens, kinds) of one whole sequence, `(T,)` each."""
        shard = int(np.searchsorted(self._firsts, sequence, side="right")) - 1
        if shard not in self._open:
            paths = (self.folder / f"{part}-{shard:05d}.npy" for part in ("tokens", "kinds"))
            tokens, kinds = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
            self._open[shard] = (tokens, kinds)
        tokens, kinds = self._open[shard]
        base = self._begins[self._firsts[shard]]
        span = slice(int(self._begins[sequence] - base), int(self._begins[sequence + 1] - base))
        return tokens[span].astype(np.int64), np.asarray(kinds[span])

    def iterate_kinds(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int32]]]:
        """Yield each shard's `(T,)` kinds and the lengths of its sequences; one shard is mapped at a time."""
        for shard, (first, end) in enumerate(pairwise(self._firsts)):
            kinds = np.load(self.folder / f"kinds-{shard:05d}.npy", mmap_mode="r", allow_pickle=False)
            yield np.asarray(kinds), self.lengths[first:end]


@dataclass(frozen=True)
class Shards:
    """All sources of a run, in the order of params."""

    sources: tuple[SourceShards, ...]
    manifest: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Digest of the data; part of the training fingerprint."""
        return digest_of(self.manifest)

    @property
    def special(self) -> Mapping[str, int]:
        """Ids the collator needs: `bos`, `eos`, `pad`."""
        special: Mapping[str, int] = self.manifest["special"]
        return special


def open_shards(folder: Path, *, verify: bool = True) -> Shards:
    """Open a data folder; `verify` hashes its files.

    Raises:
        DataError: The folder is incomplete, a file has changed, or the manifest lacks a key or a file.
    """
    manifest = load_manifest(folder, remedy=REMEDY, verify=verify)
    stated = check_json(manifest, DataManifest, where=folder / NAME, remedy=REMEDY)
    return Shards(tuple(_open_source(folder, facts, stated["files"]) for facts in stated["sources"]), manifest)


class SpecialIds(TypedDict):
    """Ids that the collator needs; the manifest also holds those of the template's tokens."""

    bos: NotRequired[int]  # some tokenizers have none
    eos: int
    pad: int


class ShardFacts(TypedDict):
    """A source's entry in data/manifest.json; `shard_sequences` has one item per shard."""

    name: str
    kind: str
    shard_sequences: list[int]


class DataManifest(TypedDict):
    """data/manifest.json, as `open_shards` reads it."""

    special: SpecialIds
    sources: list[ShardFacts]
    files: dict[str, FileFacts]


def _open_source(folder: Path, facts: ShardFacts, files: Mapping[str, FileFacts]) -> SourceShards:
    here, counts = folder / facts["name"], facts["shard_sequences"]
    expected = [f"{facts['name']}/{part}.npy" for part in ("lengths", "train", "validation")]
    expected += [f"{facts['name']}/{part}-{n:05d}.npy" for part in ("tokens", "kinds") for n in range(len(counts))]
    check_listed(folder, expected, files, remedy=REMEDY)
    lengths, train, validation = (
        np.load(here / f"{part}.npy", allow_pickle=False) for part in ("lengths", "train", "validation")
    )
    if len(lengths) != sum(counts):
        raise DataError(
            f"{folder / NAME}: source {facts['name']}: shard_sequences add up to {sum(counts):,}, but lengths.npy has "
            f"{len(lengths):,} entries. {REMEDY}"
        )
    return SourceShards(facts["name"], facts["kind"], here, tuple(counts), lengths, train, validation)


def token_dtype(vocab_size: int) -> type[np.uint16 | np.uint32]:
    """Return the narrowest dtype for token ids of this vocabulary."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def write_shard(
    folder: Path, number: int, sequences: Iterable[tuple[NDArray[np.integer], NDArray[np.uint8]]], *, vocab_size: int
) -> tuple[int, ...]:
    """Write one shard's tokens and kinds; return the lengths of its sequences."""
    pairs = list(sequences)
    tokens = np.concatenate([pair[0] for pair in pairs] or [np.empty(0, np.uint32)]).astype(token_dtype(vocab_size))
    kinds = np.concatenate([pair[1] for pair in pairs] or [np.empty(0, dtype=np.uint8)]).astype(np.uint8)
    np.save(folder / f"tokens-{number:05d}.npy", tokens, allow_pickle=False)
    np.save(folder / f"kinds-{number:05d}.npy", kinds, allow_pickle=False)
    return tuple(len(pair[0]) for pair in pairs)


def sequence_digest(tokens: NDArray[np.integer], kinds: NDArray[np.uint8]) -> str:
    """Return a digest of one sequence that does not depend on the dtype of its tokens."""
    return sha256(tokens.astype("<i8").tobytes() + kinds.tobytes()).hexdigest()
