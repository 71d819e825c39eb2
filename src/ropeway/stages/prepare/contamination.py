"""Contamination: training sequences that share a word n-gram with a validation sequence or an evaluation prompt.

The published params use 13-grams. Source: Brown et al. 2020, arXiv:2005.14165, appendix C. Unlike there, n-grams that
are frequent in training are not exempt, and a hit removes the complete sequence. N-grams do not span turns, and system
messages are not compared, so a shared template is no hit.

Memory: 8 bytes per distinct n-gram of the validation text and at most 16 more for the filters; for training, the
n-grams of one shard per core.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ropeway.config.sections import Contamination
from ropeway.data.tokenized import TokenizedSource
from ropeway.data.words import hash_grams, is_short
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.worker_processes import count_cores
from ropeway.stages.prepare.split import Split

_HALF = np.uint64(32)
IN_VALIDATION, IN_PROMPTS = 1, 2  # bits of a sequence's hit


@dataclass(frozen=True, slots=True)
class GramSet:
    """A set of hashed word n-grams.

    Attributes:
        filters: `(2, F)`, F a power of two. False at `half % F` of a value's low or high half: it is not in the set.
            The filters avoid nearly all binary searches, which are slow because of cache misses.
    """

    values: NDArray[np.uint64]  # `(H,)`, ascending, distinct
    filters: NDArray[np.bool_]

    @classmethod
    def of(cls, values: NDArray[np.uint64]) -> "GramSet":
        """Return the set of these values."""
        distinct = distinct_values(values)
        filters = np.zeros((2, 1 << max(len(distinct) * 4 - 1, 1).bit_length()), np.bool_)
        for filter_, half in zip(filters, (distinct, distinct >> _HALF), strict=True):
            filter_[half & np.uint64(len(filter_) - 1)] = True
        return cls(distinct, filters)

    def contains(self, grams: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return `(G,)`, True for each n-gram that is in the set."""
        found = np.zeros(len(grams), np.bool_)
        if not len(self.values):
            return found
        low, high = self.filters
        mask = np.uint64(len(low) - 1)
        maybe = np.flatnonzero(low[grams & mask])
        maybe = maybe[high[(grams[maybe] >> _HALF) & mask]]
        maybe = maybe[np.argsort(grams[maybe])]  # sorted queries keep the binary search in the core's cache
        at = np.minimum(np.searchsorted(self.values, grams[maybe]), len(self.values) - 1)
        found[maybe] = self.values[at] == grams[maybe]
        return found


def distinct_values(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return each value once, ascending.

    numpy 2.3.5's `unique` hashes 64-bit integers and took 5 s for 3 million of them; this took 0.04 s.
    """
    ordered = np.sort(values)
    first = np.ones(len(ordered), np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    return ordered[first]


def find_contaminated(
    sources: Mapping[str, TokenizedSource], splits: Mapping[str, Split], options: Contamination, prompts: Sequence[str]
) -> dict[str, NDArray[np.uint8]]:
    """Return each sequence's contamination bits by source; 0 for all but training sequences."""
    hits = {name: np.zeros(sum(source.shard_sequences), np.uint8) for name, source in sources.items()}
    if options.action == "off":
        return hits
    evaluation = GramSet.of(hash_grams(prompts, options.ngram, mark_short=True).values)
    gathered = [np.empty(0, np.uint64)]
    for name, source in sources.items():
        gathered += _iterate_sequence_grams(source, splits[name].validation)
    validation = GramSet.of(np.concatenate(gathered))
    find = partial(find_hits, validation=validation, prompts=evaluation)
    with ThreadPoolExecutor(count_cores()) as pool:  # numpy releases the GIL while it searches
        for name, source in sources.items():
            found = np.concatenate([np.empty(0, np.uint8), *pool.map(find, *zip(*source.iterate_grams(), strict=True))])
            train = splits[name].train
            hits[name][train] = found[train]
    return hits


def _iterate_sequence_grams(source: TokenizedSource, sequences: NDArray[np.int64]) -> Iterator[NDArray[np.uint64]]:
    """Yield the n-grams of these sequences; a turn with fewer words than an n-gram has none."""
    first, ordered = 0, np.unique(sequences)
    for grams, offsets in source.iterate_grams():
        end = first + len(offsets) - 1
        here = ordered[slice(*np.searchsorted(ordered, (first, end)))] - first
        spans = zip(offsets[here].tolist(), offsets[here + 1].tolist(), strict=True)
        found = np.concatenate([np.empty(0, np.uint64), *(grams[begin:until] for begin, until in spans)])
        yield distinct_values(found[~is_short(found)])
        first = end


def find_hits(
    grams: NDArray[np.uint64], offsets: NDArray[np.int64], validation: GramSet, prompts: GramSet
) -> NDArray[np.uint8]:
    """Return `(n,)` contamination bits: IN_VALIDATION and IN_PROMPTS, set if a sequence shares an n-gram with them.

    The n-grams of sequence i are `grams[offsets[i]:offsets[i + 1]]`. A prompt with fewer words than an n-gram is one
    n-gram, which matches a complete turn only.
    """
    hits = np.zeros(len(offsets) - 1, np.uint8)
    for bit, known in ((IN_VALIDATION, validation), (IN_PROMPTS, prompts)):
        at = np.flatnonzero(known.contains(grams))
        hits[np.searchsorted(offsets, at, side="right") - 1] |= np.uint8(bit)
    return hits


def parse_prompts(text: str, name: str) -> list[str]:
    """Return the texts of a file of evaluation prompts: its lines, or every string in the lines of a .jsonl file.

    Raises:
        ConfigError: A line of a .jsonl file is not JSON.
    """
    lines = text.split("\n")  # not splitlines: JSON strings may contain U+2028
    if not name.endswith(".jsonl"):
        return [line for line in lines if line.strip()]
    try:
        return [one for line in lines if line.strip() for one in _strings(parse_json(line))]
    except ValueError as error:
        raise ConfigError(f"{name}: expected one JSON value per line in a .jsonl file: {error}") from None


def _strings(value: object) -> Iterator[str]:
    """Yield every string of a JSON value, except field names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
