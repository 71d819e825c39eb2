"""The passes that look for contamination, behind the split: validation's runs of words gathered, then training's asked.

.work/prepare-<profile>-<fingerprint>/contamination/{validation,prompts}/   two `GramSet`s that the workers map
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ropeway.config.params import Contamination
from ropeway.stages.prepare import encode_workers as workers
from ropeway.stages.prepare.chunks import BATCH_CHARACTERS, count_characters, in_batches
from ropeway.stages.prepare.compare import count_text_bytes
from ropeway.stages.prepare.contamination import (
    GramSet,
    distinct_values,
    find_hits,
    prompt_grams,
    sequence_texts,
    validation_grams,
)
from ropeway.stages.prepare.split import Split
from ropeway.stages.prepare.units import Unit, kept_records
from ropeway.stages.prepare.write import Units

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Asking:
    """One unit's work.

    Attributes:
        source: Name of the source.
        first: Number of the unit's first sequence in the source.
        wanted: `(n,)` which of the unit's sequences are read.
        sets: Folder of the gram sets.
    """

    unit: Unit
    source: str
    first: int
    wanted: NDArray[np.bool_]
    ngram: int
    sets: Path


def find_contaminated(
    planned: Mapping[str, Sequence[Unit]],
    made: Mapping[str, Units],
    splits: Mapping[str, Split],
    options: Contamination,
    *,
    prompts: Sequence[str],
    work: Path,
) -> dict[str, NDArray[np.uint8]]:
    """Return for every sequence of each source what it shares a run of words with: 0 for all but training sequences.

    Raises:
        TemporaryError: A worker died.
    """
    hits = {name: np.zeros(sum(units.shard_sequences), np.uint8) for name, units in made.items()}
    if options.action == "off":
        return hits
    sets = work / "contamination"
    GramSet.of(prompt_grams(prompts, options.ngram)).save(sets / "prompts")
    asked = _plan(planned, made, {name: split.validation for name, split in splits.items()}, options.ngram, sets)
    parts = [np.empty(0, np.uint64), *_make(gather_unit, asked, work)]
    GramSet.of(np.concatenate(parts)).save(sets / "validation")
    del parts
    asked = _plan(planned, made, {name: split.train for name, split in splits.items()}, options.ngram, sets)
    for job, found in _make(ask_unit, asked, work):
        hits[job.source][job.first : job.first + len(found)] = found
    return hits


def _make(function: Callable[[Asking], Result], jobs: Sequence[Asking], work: Path) -> Iterator[Result]:
    text_bytes = count_text_bytes([job.unit for job in jobs])
    return workers.make(function, jobs, text_bytes=text_bytes, work=work)


def _plan(
    planned: Mapping[str, Sequence[Unit]],
    made: Mapping[str, Units],
    parts: Mapping[str, NDArray[np.int64]],
    ngram: int,
    sets: Path,
) -> list[Asking]:
    """Return the units that hold a sequence of these parts of the sources."""
    jobs = []
    for name, units in planned.items():
        sizes = made[name].shard_sequences
        wanted = np.zeros(sum(sizes), np.bool_)
        wanted[parts[name]] = True
        firsts = np.cumsum([0, *sizes[:-1]])
        for unit, first, size in zip(units, firsts.tolist(), sizes, strict=True):
            here = wanted[first : first + size]
            if here.any():
                jobs.append(Asking(unit, name, first, here, ngram, sets))
    return jobs


def gather_unit(job: Asking) -> NDArray[np.uint64]:
    """Return the distinct runs of words of the wanted sequences; what a worker runs."""
    grams = [np.empty(0, np.uint64)]
    grams += [validation_grams(texts, job.ngram) for _, texts in _batches(job)]
    return distinct_values(np.concatenate(grams))


def ask_unit(job: Asking) -> tuple[Asking, NDArray[np.uint8]]:
    """Return what each sequence of a unit shares a run of words with; what a worker runs."""
    validation, prompts = (GramSet.load(job.sets / name) for name in ("validation", "prompts"))
    hits = np.zeros(len(job.wanted), np.uint8)
    for numbers, texts in _batches(job):
        hits[numbers] = find_hits(texts, validation, prompts, job.ngram)
    return job, hits


def _batches(job: Asking) -> Iterator[tuple[list[int], list[tuple[str, ...]]]]:
    """Yield (numbers in the unit, compared texts) of the wanted sequences, about a million characters at a time."""
    records = (sequence_texts(record, job.unit.recipe.max_chunk_size) for record in kept_records(job.unit))
    every = zip(range(len(job.wanted)), chain.from_iterable(records), strict=True)
    wanted = ((number, texts) for number, texts in every if job.wanted[number])
    for batch in in_batches(wanted, lambda pair: count_characters(pair[1]), BATCH_CHARACTERS):
        yield [number for number, _ in batch], [texts for _, texts in batch]
