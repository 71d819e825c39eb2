"""The pass that looks for duplicates: the texts of every unit hashed and signed by workers, then grouped here.

.work/prepare-<profile>-<fingerprint>/duplicates-<digest>/<source>/00000/   one unit, whole since its manifest came last
    exact.npy        uint64 `(n, 2)`, 16 bytes a kept record
    signatures.npy   uint32 `(n, permutations)`, 4 bytes each a kept record: 512 at 128 permutations
.work/prepare-<profile>-<fingerprint>/duplicates-<digest>/
    signatures, band-00, band-01, …   of all sources: as many bytes again, and 8 a band and record (144 at 18 bands)

It is a pass of its own over raw text, not a part of encoding, so that other thresholds cost no encoding.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ropeway.config.params import Duplicates
from ropeway.runtime.manifest import digest_of, write_manifest
from ropeway.stages.prepare import encode_workers as workers
from ropeway.stages.prepare.chunks import BATCH_CHARACTERS, count_characters, in_batches
from ropeway.stages.prepare.duplicates import (
    band_keys,
    compared_texts,
    exact_keys,
    find_exact,
    find_near,
    has_grams,
    sign,
)
from ropeway.stages.prepare.units import Unit, kept_records, load_unit, whole_unit
from ropeway.stages.prepare.write import Units

# Times cheaper than encoding as many bytes of text, to see whether a worker is worth its start: 17.6 s of CPU against
# 2.6 and 3.5 s for the two passes (docs/decisions/0005).
_CHEAPER = 6


@dataclass(frozen=True, slots=True)
class Repeats:
    """Which kept records of one source repeat an earlier one, here or in a source before it, `(R,)` each."""

    exact: NDArray[np.bool_]
    near: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Signing:
    """One unit's work: what is read is `unit`, what is written `folder`."""

    unit: Unit
    folder: Path
    options: Duplicates


def find_repeats(
    planned: Mapping[str, Sequence[Unit]], made: Mapping[str, Units], options: Duplicates, *, work: Path
) -> dict[str, Repeats]:
    """Return each source's repeated records.

    Raises:
        TemporaryError: A worker died; what is whole stays.
    """
    asked = [options.near == "off", options.ngram, options.permutations]
    work = work / f"duplicates-{digest_of(asked)[:16]}"
    jobs = [Signing(unit, work / name / unit.folder.name, options) for name, units in planned.items() for unit in units]
    missing = [job for job in jobs if load_unit(job.folder) is None]
    text_bytes = count_text_bytes([job.unit for job in missing])
    for _ in workers.make(sign_unit, missing, text_bytes=text_bytes, work=work):
        pass
    exact = find_exact(np.concatenate([np.load(job.folder / "exact.npy", allow_pickle=False) for job in jobs]))
    near = np.zeros_like(exact)
    if options.near != "off" and len(exact):
        near = _find_near([job.folder / "signatures.npy" for job in jobs], ~exact, options, work=work)
    borders = np.cumsum([units.count("kept") for units in made.values()])[:-1]
    parts = zip(np.split(exact, borders), np.split(near, borders), strict=True)
    return {name: Repeats(*part) for name, part in zip(made, parts, strict=True)}


def count_text_bytes(units: Iterable[Unit]) -> int:
    """Return how much text a pass over these units is worth, counted as text to encode."""
    return sum(group.text_bytes for unit in units for group in unit.groups) // _CHEAPER


def sign_unit(job: Signing) -> Path:
    """Write one unit's keys and signatures; what a worker runs."""
    options, permutations = job.options, job.options.permutations
    keys, signatures = [np.empty((0, 2), np.uint64)], [np.empty((0, permutations), np.uint32)]
    compared = map(compared_texts, kept_records(job.unit))
    for texts in in_batches(compared, count_characters, BATCH_CHARACTERS):
        keys.append(exact_keys(texts))
        if options.near != "off":
            signatures.append(sign(texts, ngram=options.ngram, permutations=permutations))
    with whole_unit(job.folder) as folder:
        np.save(folder / "exact.npy", np.concatenate(keys), allow_pickle=False)
        np.save(folder / "signatures.npy", np.concatenate(signatures), allow_pickle=False)
        write_manifest(folder, {})
    return job.folder


def _find_near(
    files: Sequence[Path], candidates: NDArray[np.bool_], options: Duplicates, *, work: Path
) -> NDArray[np.bool_]:
    """Lay the signatures of all units one after another, and each band of them, and group them."""
    shape = (len(candidates), options.permutations)
    signed = [np.empty(0, np.bool_)]
    bands: list[Path] = []
    with (work / "signatures").open("wb") as everything:
        for path in files:
            signatures = np.load(path, allow_pickle=False)
            signatures.tofile(everything)
            signed.append(has_grams(signatures))
            keys = band_keys(signatures, options.threshold)
            bands = [work / f"band-{number:02d}" for number in range(len(keys))]
            for band, own in zip(bands, keys, strict=True):
                with band.open("ab" if len(signed) > 2 else "wb") as file:  # noqa: PLR2004 - 2: the first unit
                    own.tofile(file)
    mapped = np.memmap(work / "signatures", np.uint32, "r", shape=shape)
    columns = (np.fromfile(band, np.uint64) for band in bands)
    return find_near(mapped, columns, candidates & np.concatenate(signed), threshold=options.threshold)
