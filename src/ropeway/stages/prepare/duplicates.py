"""Dedup of records within and across sources: exact duplicates by hash, near-duplicates by MinHash LSH.

The first record is kept, in the order of (source in params, record number), so the result does not depend on timing.
`docs/decisions/0005-duplicates.md` defines equality.

Memory: exact keys take 16 bytes per record, 48 while they are sorted. Near-duplicates take 8 bytes per record for the
keys of one band, 32 while they are sorted, and 16 bytes per similar pair. Disk: signatures take 512 bytes per record at
128 permutations, copied once for all sources together, and band keys 8 bytes per band and record (144 at 18 bands).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ropeway.config.sections import Duplicates
from ropeway.data.tokenized import TokenizedSource
from ropeway.data.words import mix_bits, position_weights

_RECALL_AT_THRESHOLD = 0.95  # of pairs whose similarity equals the threshold; recall is higher for more similar pairs
_LEADERS = (
    16  # records of one bucket that the others are compared with; bounds the work in a bucket of dissimilar texts
)
_BLOCK = 1 << 14  # pairs per comparison: 2 x 8 MB of signatures
_NO_GRAM = np.iinfo(np.uint32).max  # minimum of a permutation over 0 n-grams


@dataclass(frozen=True, slots=True)
class DuplicateMasks:
    """`(R,)` each, True for the kept records of one source that duplicate an earlier record of any source."""

    exact: NDArray[np.bool_]
    near: NDArray[np.bool_]


def find_duplicates(
    sources: Mapping[str, TokenizedSource], options: Duplicates, *, work: Path
) -> dict[str, DuplicateMasks]:
    """Return the duplicates of each source; `work` is an empty folder for arrays that do not fit in memory."""
    exact = find_exact(np.concatenate([source.column("exact") for source in sources.values()]))
    near = np.zeros_like(exact)
    if options.near != "off" and len(exact):
        near = _find_near_on_disk(sources, ~exact, options, work=work)
    borders = np.cumsum([source.records_kept for source in sources.values()])[:-1]
    parts = zip(np.split(exact, borders), np.split(near, borders), strict=True)
    return {name: DuplicateMasks(*part) for name, part in zip(sources, parts, strict=True)}


def _find_near_on_disk(
    sources: Mapping[str, TokenizedSource], candidates: NDArray[np.bool_], options: Duplicates, *, work: Path
) -> NDArray[np.bool_]:
    """Concatenate the signatures and band keys of all shards in files; return `(N,)`, True for near-duplicates."""
    shape = (len(candidates), options.permutations)
    signed = [np.empty(0, np.bool_)]
    bands = [work / f"band-{number:02d}" for number in range(plan_bands(options.threshold, options.permutations)[0])]
    with ExitStack() as stack:
        all_signatures, *by_band = (stack.enter_context(path.open("wb")) for path in (work / "signatures", *bands))
        for source in sources.values():
            for number in range(len(source.shard_sequences)):
                signatures = source.shard("signatures", number)
                signatures.tofile(all_signatures)
                signed.append(has_grams(signatures))
                for file, keys in zip(by_band, band_keys(signatures, options.threshold), strict=True):
                    keys.tofile(file)
    mapped = np.memmap(work / "signatures", np.uint32, "r", shape=shape)
    columns = (np.fromfile(band, np.uint64) for band in bands)
    return find_near(mapped, columns, candidates & np.concatenate(signed), threshold=options.threshold)


def find_exact(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return `(N,)`, True if an earlier record has the same key; records without text are not duplicates."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys keep the order of records
    ordered = keys[order]
    found = np.zeros(len(keys), np.bool_)
    found[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1) & ordered[1:].any(axis=1)
    return found


def plan_bands(threshold: float, permutations: int) -> tuple[int, int]:
    """Return (bands, values per band): the longest bands that reach `_RECALL_AT_THRESHOLD`.

    A pair of Jaccard similarity s shares a band of r values with probability s**r, and any of b bands with probability
    1 - (1 - s**r)**b.
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
    """Return `(bands, n)` keys; records with the same key in a band are candidate near-duplicates."""
    bands, values = plan_bands(threshold, signatures.shape[1])
    parts = signatures[:, : bands * values].reshape(len(signatures), bands, values).astype(np.uint64)
    return np.ascontiguousarray(mix_bits((parts * position_weights(values)).sum(axis=2, dtype=np.uint64)).T)


def has_grams(signatures: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Return `(n,)`, False for the signature of a record without words, which is never a near-duplicate."""
    return np.asarray((signatures != _NO_GRAM).any(axis=1))


def find_near(
    signatures: NDArray[np.uint32],
    bands: Iterable[NDArray[np.uint64]],
    candidates: NDArray[np.bool_],
    *,
    threshold: float,
) -> NDArray[np.bool_]:
    """Return `(N,)`, True if an earlier record that is kept has an estimated similarity of at least `threshold`.

    Args:
        signatures: `(N, permutations)`, may be memory-mapped.
        bands: `(N,)` keys of each band.
        candidates: `(N,)`, False for records that are not compared: exact duplicates and records without words.
        threshold: Jaccard similarity of two sets of word n-grams.
    """
    numbers, edges = np.flatnonzero(candidates), np.empty((0, 2), np.int64)
    for keys in bands:  # most pairs share several bands: keep each pair once
        edges = np.unique(np.concatenate([edges, *_compare_bucketed(signatures, keys, numbers, threshold)]), axis=0)
    found = np.zeros(len(candidates), np.bool_)
    for later, earlier in edges.tolist():  # sorted by `later`, so it is decided already whether `earlier` is kept
        found[later] |= not found[earlier]
    return found


def _compare_bucketed(
    signatures: NDArray[np.uint32], keys: NDArray[np.uint64], numbers: NDArray[np.int64], threshold: float
) -> Iterator[NDArray[np.int64]]:
    """Yield `(p, 2)` similar pairs (later, earlier) of one band.

    Each record of a bucket is compared with the bucket's first record; those that are not similar with the first of
    them, and so on, at most `_LEADERS` times.
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
