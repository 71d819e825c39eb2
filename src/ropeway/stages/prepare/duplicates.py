"""Duplicates among records, within and across sources: exact by the hash of the text, near by MinHash.

What is compared is what teaches: a document whole, a conversation's turns; its system message is not compared, since
thousands of different conversations share one. The first record stays, in the order of (source in params, record
number); so nothing depends on who read what when. `docs/decisions/0005-duplicates.md` says what counts as equal.

In memory: 16 bytes a record for its exact key, while they are sorted 48; for the near ones 8 bytes a record for a
band's key, while it is sorted 32, and 16 bytes a near pair. Signatures are on disk (see `compare`).
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from ropeway.data.raw_records import Record
from ropeway.models.chat_template import Conversation
from ropeway.stages.prepare.words import hash_grams, mix, powers

_SEED = 0x5EED  # of the permutations; a constant, so signatures of different runs compare
_RECALL_AT_THRESHOLD = 0.95  # of pairs that are just similar enough; more similar ones are found more surely
_LEADERS = 16  # records of one bucket that others are compared with; bounds a bucket of unlike texts
_BLOCK = 1 << 14  # pairs compared at once: 2 x 8 MB of signatures
_NOTHING = np.iinfo(np.uint32).max  # what a permutation's minimum over no gram is


def compared_texts(record: Record) -> tuple[str, ...]:
    """Return the texts of a record that are compared: a document, or a conversation's turns."""
    return record.turns if isinstance(record, Conversation) else (record,)


def exact_key(texts: Sequence[str]) -> bytes:
    r"""Return 16 bytes that are equal for equal texts, whatever their blanks and normal form; zeros for no text.

    >>> exact_key(["a  b\n"]) == exact_key([" a b"]), exact_key(["a", "b"]) == exact_key(["a b"])
    (True, False)
    """
    folded = [" ".join(unicodedata.normalize("NFC", text).split()) for text in texts]
    if not any(folded):
        return bytes(16)
    # U+001E is a blank to `split`, so no folded text holds it.
    return blake2b("\x1e".join(folded).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def exact_keys(records: Sequence[Sequence[str]]) -> NDArray[np.uint64]:
    """Return `(n, 2)` keys of the compared texts of records."""
    return np.frombuffer(b"".join(map(exact_key, records)), "<u8").reshape(-1, 2)


def find_exact(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return `(N,)`: True where an earlier record has the same key; records without text are no duplicates."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in the order of records
    ordered = keys[order]
    found = np.zeros(len(keys), np.bool_)
    found[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1) & ordered[1:].any(axis=1)
    return found


def sign(records: Sequence[Sequence[str]], *, ngram: int, permutations: int) -> NDArray[np.uint32]:
    """Return `(n, permutations)` MinHash signatures of the word n-grams of records; a short turn is one gram.

    Source: Broder 1997; rensa 0.5's R-MinHash (Rust), held against datasketch in the tests.
    """
    from rensa import RMinHash

    grams = hash_grams([text for texts in records for text in texts], ngram, short="whole")
    borders = np.concatenate([[0], np.cumsum([len(texts) for texts in records], dtype=np.int64)])
    rows = grams.offsets[borders].astype(np.uint64)
    signed = RMinHash.digest_matrix_from_flat_token_hashes(grams.values, rows, permutations, _SEED)
    return np.asarray(signed.to_rows(), np.uint32).reshape(len(records), permutations)


def plan_bands(threshold: float, permutations: int) -> tuple[int, int]:
    """Return (bands, values of a signature in each): the longest bands that still find just similar pairs.

    A pair of Jaccard similarity s shares a band of r values with s**r, one of b bands with 1 - (1 - s**r)**b.
    Source: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4.

    >>> plan_bands(0.8, 128)
    (18, 7)
    """
    for values in range(permutations, 1, -1):
        bands = permutations // values
        if 1 - (1 - threshold**values) ** bands >= _RECALL_AT_THRESHOLD:
            return bands, values
    return permutations, 1


def band_keys(signatures: NDArray[np.uint32], threshold: float) -> NDArray[np.uint64]:
    """Return `(bands, n)`: records with the same key in one band may be near duplicates."""
    bands, values = plan_bands(threshold, signatures.shape[1])
    parts = signatures[:, : bands * values].reshape(len(signatures), bands, values).astype(np.uint64)
    return np.ascontiguousarray(mix((parts * powers(values)).sum(axis=2, dtype=np.uint64)).T)


def has_grams(signatures: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Return `(n,)`: False for the signature of a record without a word, which is like no other."""
    return np.asarray((signatures != _NOTHING).any(axis=1))


def find_near(
    signatures: NDArray[np.uint32],
    bands: Iterable[NDArray[np.uint64]],
    candidates: NDArray[np.bool_],
    *,
    threshold: float,
) -> NDArray[np.bool_]:
    """Return `(N,)`: True where an earlier record that stays is estimated to be at least as similar as `threshold`.

    Args:
        signatures: `(N, permutations)`, may be mapped from disk.
        bands: `(N,)` keys of one band after another.
        candidates: `(N,)` records that take part: exact duplicates and records without words do not.
        threshold: Jaccard similarity of two sets of word n-grams.
    """
    numbers, edges = np.flatnonzero(candidates), np.empty((0, 2), np.int64)
    for keys in bands:  # most pairs share several bands: one of each is held
        edges = np.unique(np.concatenate([edges, *_compare_bucketed(signatures, keys, numbers, threshold)]), axis=0)
    found = np.zeros(len(candidates), np.bool_)
    for later, earlier in edges.tolist():  # by the later one: whether the earlier one stays is known by then
        found[later] |= not found[earlier]
    return found


def _compare_bucketed(
    signatures: NDArray[np.uint32], keys: NDArray[np.uint64], numbers: NDArray[np.int64], threshold: float
) -> Iterator[NDArray[np.int64]]:
    """Yield `(p, 2)` pairs (later, earlier) of one band that are similar.

    Each record of a bucket is compared with the bucket's first; those unlike it with the first of these, and so on.
    """
    own = keys[numbers]
    order = np.argsort(own, kind="stable")
    numbers, own = numbers[order], own[order]
    for _ in range(_LEADERS):
        first = np.concatenate([[True], own[1:] != own[:-1]])[: len(own)]
        leaders = numbers[np.maximum.accumulate(np.where(first, np.arange(len(own)), 0))]
        rest = np.flatnonzero(~first)
        if not len(rest):
            return
        later, earlier = numbers[rest], leaders[rest]
        alike = _similar(signatures, later, earlier, threshold)
        yield np.stack([later[alike], earlier[alike]], axis=1)
        numbers, own = later[~alike], own[rest][~alike]


def _similar(
    signatures: NDArray[np.uint32], left: NDArray[np.int64], right: NDArray[np.int64], threshold: float
) -> NDArray[np.bool_]:
    blocks = [np.empty(0, np.bool_)]
    for begin in range(0, len(left), _BLOCK):
        one, other = (signatures[side[begin : begin + _BLOCK]] for side in (left, right))
        blocks.append((one == other).mean(axis=1) >= threshold)
    return np.concatenate(blocks)
