"""Contamination: training sequences that share a run of words with a validation sequence or an evaluation prompt.

A run has 13 words in params as published. Source: Brown et al. 2020, arXiv:2005.14165, appendix C; unlike there, a run
that is common in training is not forgiven, and a hit concerns the whole sequence. Runs do not cross from one turn into
the next, and system messages are left out, so a shared template is no hit.

Memory: 8 bytes a distinct run of the validation text and at most 16 more for its sieves; of training's runs a
shard's a core.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ropeway.config.params import Contamination
from ropeway.data.tokenized import TokenizedSource
from ropeway.data.words import hash_grams, is_short
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.worker_processes import count_cores
from ropeway.stages.prepare.split import Split

_HALF = np.uint64(32)
IN_VALIDATION, IN_PROMPTS = 1, 2  # bits of a sequence's hit


@dataclass(frozen=True, slots=True)
class GramSet:
    """A set of hashed runs of words.

    Attributes:
        sieves: `(2, F)`, F a power of two: False at `part % F` of a value's low or high half means not in the set. They
            spare nearly all binary searches, each of which waits for memory.
    """

    values: NDArray[np.uint64]  # `(H,)`, ascending, distinct
    sieves: NDArray[np.bool_]

    @classmethod
    def of(cls, values: NDArray[np.uint64]) -> "GramSet":
        """Return the set of these values."""
        distinct = distinct_values(values)
        sieves = np.zeros((2, 1 << max(len(distinct) * 4 - 1, 1).bit_length()), np.bool_)
        for sieve, half in zip(sieves, (distinct, distinct >> _HALF), strict=True):
            sieve[half & np.uint64(len(sieve) - 1)] = True
        return cls(distinct, sieves)

    def contains(self, grams: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return `(G,)`, True for each gram that is in the set."""
        found = np.zeros(len(grams), np.bool_)
        if not len(self.values):
            return found
        low, high = self.sieves
        mask = np.uint64(len(low) - 1)
        maybe = np.flatnonzero(low[grams & mask])
        maybe = maybe[high[(grams[maybe] >> _HALF) & mask]]
        maybe = maybe[np.argsort(grams[maybe])]  # asked in order, the search finds what it compares in the core's cache
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
    """Return for every sequence of each source what it shares a run of words with: 0 for all but training sequences."""
    hits = {name: np.zeros(sum(source.shard_sequences), np.uint8) for name, source in sources.items()}
    if options.action == "off":
        return hits
    evaluation = GramSet.of(hash_grams(prompts, options.ngram, marks_short=True).values)
    gathered = [np.empty(0, np.uint64)]
    for name, source in sources.items():
        gathered += _gather(source, splits[name].validation)
    validation = GramSet.of(np.concatenate(gathered))
    find = partial(find_hits, validation=validation, prompts=evaluation)
    with ThreadPoolExecutor(count_cores()) as pool:  # numpy lets go of the interpreter while it looks values up
        for name, source in sources.items():
            found = np.concatenate([np.empty(0, np.uint8), *pool.map(find, *zip(*source.iterate_grams(), strict=True))])
            train = splits[name].train
            hits[name][train] = found[train]
    return hits


def _gather(source: TokenizedSource, sequences: NDArray[np.int64]) -> Iterator[NDArray[np.uint64]]:
    """Yield the runs of words of these sequences; a turn that is shorter than a run has none."""
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
    """Return `(n,)` bits for each sequence: what it shares a run of words with.

    The `(n + 1,)` offsets say where the runs of each sequence begin and end. A short prompt is one run, which a whole
    turn may equal.
    """
    hits = np.zeros(len(offsets) - 1, np.uint8)
    for bit, known in ((IN_VALIDATION, validation), (IN_PROMPTS, prompts)):
        at = np.flatnonzero(known.contains(grams))
        hits[np.searchsorted(offsets, at, side="right") - 1] |= np.uint8(bit)
    return hits


def parse_prompts(text: str, name: str) -> list[str]:
    """Return the texts of a file of evaluation prompts: lines of text, or every string in the lines of a .jsonl file.

    Raises:
        ConfigError: A line of a .jsonl file is not JSON.
    """
    lines = text.split("\n")  # not splitlines: JSON strings may hold U+2028
    if not name.endswith(".jsonl"):
        return [line for line in lines if line.strip()]
    try:
        return [one for line in lines if line.strip() for one in _strings(json.loads(line))]
    except ValueError as error:
        raise ConfigError(f"{name}: expected one JSON value a line in a .jsonl file: {error}") from None


def _strings(value: object) -> Iterator[str]:
    """Yield every string of a JSON value but the names of its fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
