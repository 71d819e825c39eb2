"""Units of work: each unit tokenizes some row groups of one source into one shard, independently of all others.

.work/tokenize-<profile>-<fingerprint>/<source>/00000/   one unit; it is complete if it has a manifest, written last
    <name>.npy                                           `ropeway.data.tokenized.COLUMNS` and SHARDS of its records;
                                                         record numbers start at 0 in each unit
    profile.json                                         counts of its records, see `ropeway.data.data_profile`
    manifest.json                                        sha256 of each file, counts, digests of first and last sequence

The fingerprint covers all that a unit depends on: raw bytes, tokenizer, recipe and code. So the next run can reuse the
units that an interrupted run completed.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Literal
from uuid import uuid4

import numpy as np
import tokenizers
from numpy.typing import NDArray
from typing_extensions import TypedDict

import ropeway
from ropeway.config.faults import check_json
from ropeway.config.sections import PersonalKind
from ropeway.config.tokenize_params import TokenizeParams
from ropeway.data.personal_data import count_personal_data, mask_record
from ropeway.data.raw_records import Record, RowGroup, iterate_groups, iterate_texts
from ropeway.data.record_identity import compared_texts, exact_keys, identity_texts
from ropeway.data.shards import sequence_digest, token_dtype
from ropeway.data.text_batches import BATCH_CHARACTERS, count_characters, iterate_batches
from ropeway.data.tokenized import COLUMNS, PROFILE, SHARDS, RecordCounts
from ropeway.models.chat_template import open_template
from ropeway.models.jinja_template import FILE as TEMPLATE_FILE
from ropeway.models.tokenizer import count_tokens, open_tokenizer, read_special
from ropeway.runtime.code_digests import stage_code_digest
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import (
    NAME,
    FileFacts,
    canonical_json,
    check_listed,
    digest_of,
    file_sha256,
    load_manifest,
    write_manifest,
)
from ropeway.stages.tokenize.encode import Encoded, Encoder
from ropeway.stages.tokenize.fingerprints import (
    hash_sequence_grams,
    minhash_signatures,
    sequence_texts,
)
from ropeway.stages.tokenize.profile_unit import profile_unit

# About 4 s on one core: an interrupted run loses little work, and 100 GB of text are about 6,000 shards.
UNIT_BYTES = 1 << 24
_UNITS = 32  # of a small source, if it has that many row groups, so that no worker waits long for another
_ENCODED_COLUMNS = ("lengths", "records", "keys", "record_keys")  # fields of `encode.Encoded`


@dataclass(frozen=True, slots=True)
class Recipe:
    """All params that determine how one source is tokenized; part of the fingerprint.

    Attributes:
        signature: (words per n-gram, permutations) of the MinHash; None if near-duplicate detection is off.
        contamination_ngram: Words per n-gram; None if contamination detection is off.
        personal_action: What is done with personal data of `personal_kinds`.
    """

    max_chunk_size: int | None
    special_tokens_in_text: Literal["parse", "escape", "reject"]
    history: Literal["refuse", "per_turn"] = "refuse"
    signature: tuple[int, int] | None = None
    contamination_ngram: int | None = None
    personal_action: Literal["off", "count", "mask", "refuse"] = "off"
    personal_kinds: tuple[PersonalKind, ...] = ()


@dataclass(frozen=True, slots=True)
class Unit:
    """One job: all that a worker needs, besides the files that it names.

    Attributes:
        groups: The row groups of `raw` to tokenize; empty for a source without records.
        raw: Folder of the source's parquet files.
        base: Folder of the tokenizer.
        folder: Output folder.
    """

    groups: tuple[RowGroup, ...]
    raw: Path
    base: Path
    recipe: Recipe
    folder: Path


def plan_recipes(params: TokenizeParams) -> dict[str, Recipe]:
    """Return the recipe of each source, in the order of params."""
    near, runs = params.duplicates, params.contamination
    signature = None if near is None else (near.ngram, near.permutations)
    contamination_ngram = None if runs is None else runs.ngram
    personal = params.personal_data
    return {
        name: Recipe(
            options.max_chunk_size,
            params.special_tokens_in_text,
            params.history,
            signature,
            contamination_ngram,
            personal.action if personal else "off",
            tuple(personal.kinds) if personal else (),
        )
        for name, options in params.datasets.items()
    }


def plan_units(groups: Sequence[RowGroup], *, unit_bytes: int) -> list[tuple[RowGroup, ...]]:
    """Group consecutive row groups into units of up to `unit_bytes` of text; a larger row group is one unit.

    Depends on the data alone, so shards are the same for any number of workers. A source without records is one unit.

    >>> [len(unit) for unit in plan_units([RowGroup("part-00000.parquet", n, 1, 5) for n in range(5)], unit_bytes=10)]
    [2, 2, 1]
    """
    units: list[tuple[RowGroup, ...]] = []
    waiting: list[RowGroup] = []
    for group in groups:
        if waiting and sum(one.text_bytes for one in waiting) + group.text_bytes > unit_bytes:
            units.append(tuple(waiting))
            waiting = []
        waiting.append(group)
    return [*units, tuple(waiting)] if waiting or not units else units


def choose_unit_bytes(groups: Sequence[RowGroup], *, at_most: int) -> int:
    """Return the size of a unit, in bytes of text; it depends on the data alone, like the plan.

    Small sources have smaller units: two workers on 20 MB in units of 16 MB would take as long as one on 16 MB.
    """
    return min(at_most, sum(group.text_bytes for group in groups) // _UNITS)


class UnitCounts(RecordCounts):
    """Record counts of a unit."""

    kept: int


class UnitFacts(TypedDict):
    """A unit's manifest; `ends` are the digests of its first and last sequence."""

    sequences: int
    tokens: int
    ends: list[str]
    records: UnitCounts
    files: dict[str, FileFacts]


def fingerprint(raw_files: Mapping[str, object], base: Path, recipes: Mapping[str, Recipe]) -> str:
    """Return 16 hex digits that change with everything that a unit's bytes depend on."""
    return digest_of(
        {
            "raw": raw_files,
            "tokenizer": _tokenizer_digests(base),
            "tokenizers": tokenizers.__version__,
            "recipes": {name: asdict(recipe) for name, recipe in recipes.items()},
            "code": code_digest(),
            "unit_bytes": UNIT_BYTES,
        }
    )[:16]


def _tokenizer_digests(base: Path) -> tuple[str, ...]:
    names = ("tokenizer.json", "tokenizer_config.json", TEMPLATE_FILE)
    return tuple(file_sha256(base / name) for name in names)


def code_digest() -> str:
    """Return the digest of this stage's code, computed as stage identity does."""
    return stage_code_digest(Path(ropeway.__file__).parent, "tokenize")


def read_unit(folder: Path, *, remedy: str, verify: bool = True) -> UnitFacts:
    """Return a unit's manifest; `verify` hashes its files.

    Raises:
        DataError: The unit is incomplete, a file has changed, or the manifest lacks a key or a file.
    """
    facts = check_json(
        load_manifest(folder, remedy=remedy, verify=verify), UnitFacts, where=folder / NAME, remedy=remedy
    )
    check_listed(folder, [PROFILE, *(f"{name}.npy" for name in (*COLUMNS, *SHARDS))], facts["files"], remedy=remedy)
    return facts


def load_unit(folder: Path) -> UnitFacts | None:
    """Return a unit's manifest after verifying its files; None if it is missing or damaged, and then removed."""
    if not folder.exists():
        return None
    try:
        return read_unit(folder, remedy="This unit is tokenized again")
    except DataError as error:
        print(f"tokenize: {error}", flush=True)
        shutil.rmtree(folder)
        return None


def tokenize_unit(unit: Unit) -> Path:
    """Make one unit and return its folder. A worker runs this. The folder appears only when the unit is complete."""
    encoder = _open_encoder(unit.base, _tokenizer_digests(unit.base), unit.recipe).copy_without_counts()
    records = list(iterate_groups(unit.raw, unit.groups))
    kinds, action = unit.recipe.personal_kinds, unit.recipe.personal_action
    found, affected = count_personal_data(records, kinds)
    encoded = [mask_record(record, kinds) for record in records] if action == "mask" and affected else records
    parts = list(encoder.encode_batches(encoded))
    kept, used = (
        [record for at, record in enumerate(some) if at not in encoder.refused_at] for some in (records, encoded)
    )
    with write_unit(unit.folder) as partial:
        facts = _write_columns(partial, parts, token_dtype(count_tokens(encoder.tokenizer)))
        sequences = np.bincount(
            np.concatenate([part.records for part in parts] or [np.empty(0, np.int64)]), minlength=len(kept)
        )
        exact = _write_fingerprints(partial, kept, used, sequences.tolist(), unit.recipe)
        _write_refused(partial, records, encoder)
        profile = profile_unit(used, parts, exact)
        (partial / PROFILE).write_bytes(canonical_json(profile.to_json()))
        write_manifest(partial, {**facts, "records": _counts(encoder, found, affected)})
    return unit.folder


@contextmanager
def write_unit(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, then rename it to `folder`, unless another worker has written the same unit already."""
    partial = folder.with_name(
        f".{folder.name}.{uuid4().hex}.partial"
    )  # a worker that was given up may still be writing
    partial.mkdir(parents=True)
    try:
        yield partial
        with suppress(FileExistsError):
            _rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@lru_cache(maxsize=8)
def _open_encoder(base: Path, digests: tuple[str, ...], recipe: Recipe) -> Encoder:  # noqa: ARG001 - part of the cache key
    tokenizer, template = open_tokenizer(base), open_template(base)
    special = read_special(base, tokenizer, template)
    return Encoder(
        tokenizer,
        special,
        template,
        recipe.max_chunk_size,
        recipe.special_tokens_in_text,
        recipe.history,
        recipe.personal_kinds if recipe.personal_action == "refuse" else (),
    )


def _write_fingerprints(
    folder: Path, records: Sequence[Record], used: Sequence[Record], sequences: Sequence[int], recipe: Recipe
) -> NDArray[np.uint64]:
    """Write the fingerprints of these records; signatures and n-grams are empty columns if they are not needed.

    Exact keys are of the records as they were read, the rest of the texts that are tokenized (`used`): masked or not.

    Returns:
        `(R, 2)` exact keys.

    `sequences` is the number of sequences of each record: n-grams are kept per sequence.
    """
    exact: list[NDArray[np.uint64]] = [
        np.empty((0, 2), np.uint64),
        *(
            exact_keys([*map(identity_texts, batch)])
            for batch in iterate_batches(records, lambda one: count_characters(iterate_texts(one)), BATCH_CHARACTERS)
        ),
    ]
    signatures = [np.empty((0, recipe.signature[1] if recipe.signature else 0), np.uint32)]
    grams, counts = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
    if recipe.signature:
        ngram, permutations = recipe.signature
        for batch in iterate_batches(used, lambda one: count_characters(iterate_texts(one)), BATCH_CHARACTERS):
            texts = [*map(compared_texts, batch)]
            signatures.append(minhash_signatures(texts, ngram=ngram, permutations=permutations))
    texts_of_sequences = chain.from_iterable(
        sequence_texts(record, recipe.max_chunk_size, count) for record, count in zip(used, sequences, strict=True)
    )
    for parts in iterate_batches(
        texts_of_sequences if recipe.contamination_ngram else (), count_characters, BATCH_CHARACTERS
    ):
        found, each = hash_sequence_grams(parts, recipe.contamination_ngram or 0)
        grams.append(found)
        counts.append(each)
    all_exact = np.concatenate(exact)
    np.save(folder / "exact.npy", all_exact, allow_pickle=False)
    np.save(folder / "signatures.npy", np.concatenate(signatures), allow_pickle=False)
    np.save(folder / "grams.npy", np.concatenate(grams), allow_pickle=False)
    np.save(folder / "gram_counts.npy", np.concatenate(counts), allow_pickle=False)
    return all_exact


def _write_refused(folder: Path, records: Sequence[Record], encoder: Encoder) -> None:
    """Write the keys of the refused records, and the reason of each as its position among the sorted reasons."""
    reasons = sorted(encoder.refused)
    keys = exact_keys([identity_texts(records[at]) for at in encoder.refused_at])
    numbers = [reasons.index(reason) for reason in encoder.refused_at.values()]
    np.save(folder / "refused_exact.npy", keys, allow_pickle=False)
    np.save(folder / "refused_reasons.npy", np.asarray(numbers, np.uint16), allow_pickle=False)


def _write_columns(folder: Path, parts: Sequence[Encoded], dtype: type[np.uint16 | np.uint32]) -> dict[str, object]:
    """Write a unit's arrays; return its counts and the digests of its first and last sequence."""
    empty = Encoded(*(np.empty(0, kind) for kind in ("u4", "u1", "i4", "i8", "u8", "u8")))
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts] or [getattr(empty, name)])
        for name in ("tokens", "kinds", *_ENCODED_COLUMNS)
    }
    tokens, kinds, lengths = (columns[name] for name in ("tokens", "kinds", "lengths"))
    for name, column in (columns | {"tokens": tokens.astype(dtype)}).items():
        np.save(folder / f"{name}.npy", column, allow_pickle=False)
    ends = []
    if len(lengths):
        last = len(tokens) - int(lengths[-1])
        ends = [sequence_digest(tokens[span], kinds[span]) for span in (slice(int(lengths[0])), slice(last, None))]
    return {"sequences": len(lengths), "tokens": len(tokens), "ends": ends}


def _counts(encoder: Encoder, personal_data: Mapping[str, int], with_personal_data: int) -> UnitCounts:
    return {
        "kept": encoder.kept,
        "without_tokens": encoder.without_tokens,
        "with_special_tokens": encoder.with_special_tokens,
        "refused": dict(encoder.refused),
        "special_token_hits": dict(encoder.special_token_hits),
        "personal_data": dict(sorted(personal_data.items())),
        "with_personal_data": with_personal_data,
    }


def _rename(partial: Path, folder: Path) -> None:
    """Rename a folder; raise FileExistsError if the target exists.

    A rename never replaces a folder that is not empty. Source: rename(2), ENOTEMPTY or EEXIST.
    """
    try:
        partial.rename(folder)
    except OSError:
        if folder.is_dir():
            raise FileExistsError(folder) from None
        raise
