"""Fingerprints for dedup and decontamination: MinHash signatures and word n-gram hashes.

`ropeway.data.record_identity` has the digests of exact duplicates, `docs/decisions/0005-duplicates.md` the definitions.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ropeway.data.mixture import plan_chunks
from ropeway.data.raw_records import Record
from ropeway.data.words import hash_grams
from ropeway.models.conversation import Conversation

_SEED = 0x5EED  # of the permutations; constant, so that signatures of different runs can be compared


def sequence_texts(record: Record, max_chunk_size: int | None, sequences: int = 1) -> list[tuple[str, ...]]:
    """Return the fingerprinted texts of each sequence of a record: the turns, or one chunk of a document.

    A conversation of several `sequences` has one for each answer, with the turns up to it.
    """
    if not isinstance(record, Conversation):
        return [(record[begin:end],) for begin, end in plan_chunks(len(record), max_chunk_size)]
    if sequences == 1:
        return [record.turns]
    first = int(bool(record.system))
    return [record.turns[: at + 1 - first] for at in record.supervised_messages() if at > 0]


def minhash_signatures(records: Sequence[Sequence[str]], *, ngram: int, permutations: int) -> NDArray[np.uint32]:
    """Return the `(n, permutations)` MinHash signatures of the word n-grams of records; a short turn is one n-gram.

    Source: Broder 1997; rensa 0.5's R-MinHash (Rust), compared with datasketch in the tests.
    """
    from rensa import RMinHash

    grams = hash_grams([text for texts in records for text in texts], ngram)
    rows = grams.offsets[_offsets(records)].astype(np.uint64)
    signed = RMinHash.digest_matrix_from_flat_token_hashes(grams.values, rows, permutations, _SEED)
    return np.asarray(signed.to_rows(), np.uint32).reshape(len(records), permutations)


def hash_sequence_grams(sequences: Sequence[Sequence[str]], ngram: int) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """Return the concatenated word n-gram hashes of sequences, and the `(n,)` number of n-grams of each.

    A text with fewer words than an n-gram is one n-gram, marked as short; see `ropeway.data.words.hash_grams`.
    """
    grams = hash_grams([text for texts in sequences for text in texts], ngram, mark_short=True)
    return grams.values, np.diff(grams.offsets[_offsets(sequences)]).astype(np.int32)


def _offsets(groups: Sequence[Sequence[str]]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum([len(texts) for texts in groups], dtype=np.int64)])
