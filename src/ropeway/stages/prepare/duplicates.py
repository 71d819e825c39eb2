"""Duplicates among records, within and across sources: exact by the hash of the text, near by MinHash.

The first record stays, in the order of (source in params, record number); so nothing depends on who read what when.
`docs/decisions/0005-duplicates.md` says what counts as equal.

In memory: 16 bytes a record for its exact key, while they are sorted 48; for the near ones 8 bytes a record for a
band's key, while it is sorted 32, and 16 bytes a near pair. Signatures are on disk: 512 bytes a record at 128
permutations, laid out once more for all sources together, and 8 bytes a band and record (144 at 18 bands).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ropeway.config.params import Duplicates
from ropeway.data.tokenized import TokenizedSource
from ropeway.data.words import mix, powers

_RECALL_AT_THRESHOLD = 0.95  # of pairs that are just similar enough; more similar ones are found more surely
_LEADERS = 16  # records of one bucket that others are compared with; bounds a bucket of unlike texts
_BLOCK = 1 << 14  # pairs compared at once: 2 x 8 MB of signatures
_NOTHING = np.iinfo(np.uint32).max  # what a permutation's minimum over no gram is


@dataclass(frozen=True, slots=True)
class Repeats:
    """Which kept records of one source repeat an earlier one, here or in a source before it, `(R,)` each."""

    exact: NDArray[np.bool_]
    near: NDArray[np.bool_]


def find_repeats(sources: Mapping[str, TokenizedSource], options: Duplicates, *, work: Path) -> dict[str, Repeats]:
    """Return each source's repeated records; `work` is an empty folder for what is too large to be held."""
    exact = find_exact(np.concatenate([source.column("exact") for source in sources.values()]))
    near = np.zeros_like(exact)
    if options.near != "off" and len(exact):
        near = _find_near_on_disk(sources, ~exact, options, work=work)
    borders = np.cumsum([source.records_kept for source in sources.values()])[:-1]
    parts = zip(np.split(exact, borders), np.split(near, borders), strict=True)
    return {name: Repeats(*part) for name, part in zip(sources, parts, strict=True)}


def _find_near_on_disk(
    sources: Mapping[str, TokenizedSource], candidates: NDArray[np.bool_], options: Duplicates, *, work: Path
) -> NDArray[np.bool_]:
    """Lay the signatures of all shards one after another, and each band of them, and group them."""
    shape = (len(candidates), options.permutations)
    signed = [np.empty(0, np.bool_)]
    bands = [work / f"band-{number:02d}" for number in range(plan_bands(options.threshold, options.permutations)[0])]
    with ExitStack() as stack:
        everything, *by_band = (stack.enter_context(path.open("wb")) for path in (work / "signatures", *bands))
        for source in sources.values():
            for number in range(len(source.shard_sequences)):
                signatures = source.shard("signatures", number)
                signatures.tofile(everything)
                signed.append(has_grams(signatures))
                for file, keys in zip(by_band, band_keys(signatures, options.threshold), strict=True):
                    keys.tofile(file)
    mapped = np.memmap(work / "signatures", np.uint32, "r", shape=shape)
    columns = (np.fromfile(band, np.uint64) for band in bands)
    return find_near(mapped, columns, candidates & np.concatenate(signed), threshold=options.threshold)


def find_exact(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return `(N,)`: True where an earlier record has the same key; records without text are no duplicates."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in the order of records
    ordered = keys[order]
    found = np.zeros(len(keys), np.bool_)
    found[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1) & ordered[1:].any(axis=1)
    return found


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
