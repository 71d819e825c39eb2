"""Contamination: training sequences that share a run of words with a validation sequence or an evaluation prompt.

A run has 13 words in params as published. Source: Brown et al. 2020, arXiv:2005.14165, appendix C; unlike there, a run
that is common in training is not forgiven, and a hit concerns the whole sequence. Runs do not cross from one turn into
the next, and system messages are left out, so a shared template is no hit.

Memory: 8 bytes a distinct run of the validation text and at most 8 more for its filter, on disk and mapped.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ropeway.data.mixture import plan_chunks
from ropeway.data.raw_records import Record
from ropeway.models.chat_template import Conversation
from ropeway.runtime.errors import ConfigError
from ropeway.stages.prepare.words import hash_grams

IN_VALIDATION, IN_PROMPTS = 1, 2  # bits of a sequence's hit


@dataclass(frozen=True, slots=True)
class GramSet:
    """A set of hashed runs of words.

    Attributes:
        values: `(H,)`, ascending, distinct.
        filter: `(F,)`, F a power of two: False at `value % F` means not in the set. It spares most binary searches.
    """

    values: NDArray[np.uint64]
    filter: NDArray[np.bool_]

    @classmethod
    def of(cls, values: NDArray[np.uint64]) -> "GramSet":
        """Return the set of these values."""
        distinct = distinct_values(values)
        sieve = np.zeros(1 << max(len(distinct) * 4 - 1, 1).bit_length(), np.bool_)
        sieve[distinct & np.uint64(len(sieve) - 1)] = True
        return cls(distinct, sieve)

    @classmethod
    def load(cls, folder: Path) -> "GramSet":
        """Map a set that `save` wrote."""
        return cls(*(np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("values", "filter")))

    def save(self, folder: Path) -> None:
        """Write two files that processes share by mapping them."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "values.npy", self.values, allow_pickle=False)
        np.save(folder / "filter.npy", self.filter, allow_pickle=False)

    def contains(self, grams: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return `(G,)`, True for each gram that is in the set."""
        found = np.asarray(self.filter[grams & np.uint64(len(self.filter) - 1)])
        maybe = np.flatnonzero(found)
        at = np.searchsorted(self.values, grams[maybe])
        found[maybe] = self.values[np.minimum(at, len(self.values) - 1)] == grams[maybe] if len(self.values) else False
        return found


def distinct_values(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return each value once, ascending.

    numpy 2.3.5's `unique` hashes 64-bit integers and took 5 s for 3 million of them; this took 0.04 s.
    """
    ordered = np.sort(values)
    first = np.ones(len(ordered), np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    return ordered[first]


def sequence_texts(record: Record, max_chunk_size: int | None) -> list[tuple[str, ...]]:
    """Return the compared texts of each sequence of a record: the turns, or one chunk of a document."""
    if isinstance(record, Conversation):
        return [record.turns]
    return [(record[begin:end],) for begin, end in plan_chunks(len(record), max_chunk_size)]


def validation_grams(sequences: Sequence[Sequence[str]], ngram: int) -> NDArray[np.uint64]:
    """Return the runs of words of validation sequences; a turn that is shorter than a run has none."""
    return hash_grams([text for texts in sequences for text in texts], ngram, short="none").values


def prompt_grams(prompts: Sequence[str], ngram: int) -> NDArray[np.uint64]:
    """Return the runs of words of evaluation prompts; a short prompt is one run, which a whole turn may equal."""
    return hash_grams(prompts, ngram, short="whole").values


def find_hits(
    sequences: Sequence[Sequence[str]], validation: GramSet, prompts: GramSet, ngram: int
) -> NDArray[np.uint8]:
    """Return `(n,)` bits for each sequence: what it shares a run of words with."""
    grams = hash_grams([text for texts in sequences for text in texts], ngram, short="whole")
    borders = np.concatenate([[0], np.cumsum([len(texts) for texts in sequences], dtype=np.int64)])
    offsets = grams.offsets[borders]
    hits = np.zeros(len(sequences), np.uint8)
    for bit, known in ((IN_VALIDATION, validation), (IN_PROMPTS, prompts)):
        counts = np.concatenate([[0], np.cumsum(known.contains(grams.values))])
        hits[counts[offsets[1:]] > counts[offsets[:-1]]] |= bit
    return hits


def parse_prompts(text: str, name: str) -> list[str]:
    """Return the texts of a file of evaluation prompts: lines of text, or every string in lines of JSON.

    Args:
        text: What the file holds.
        name: Its name; .jsonl means JSON.

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
