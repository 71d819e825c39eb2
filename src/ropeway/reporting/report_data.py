"""Stage report_data: report.html, what became of each source, and a few sequences token by token, to check masks."""

import json
import random
from collections.abc import Iterator

import numpy as np

from ropeway.config.params import Profile
from ropeway.data.batches import EpochPlan, Piece, plan_epoch
from ropeway.data.shards import Shards, SourceShards, open_shards
from ropeway.models.tokenizer import open_tokenizer
from ropeway.reporting.data_page import Page, Sample, draw_page
from ropeway.reporting.token_view import Reading, Vocabulary, find_part, read_piece, read_whole
from ropeway.runtime.manifest import load_manifest, write_atomic
from ropeway.runtime.workspace import Workspace


def run(workspace: Workspace, profile: Profile) -> None:
    """Write `report.html` of a closed data folder; equal data and params give equal bytes.

    Args:
        workspace: Where `data/` lies and the report goes.
        profile: As prepare reads it.

    Raises:
        DataError: Raw records, data or ledger are missing or were changed.
    """
    raw = load_manifest(workspace.raw, remedy="Run `dvc checkout`, or `dvc repro fetch`", verify=False)["sources"]
    shards = open_shards(workspace.data)
    plan = plan_epoch(shards, profile, epoch=0)
    page = Page(
        profile=profile,
        name=workspace.profile,
        shards=shards,
        ledger=json.loads(workspace.ledger.read_bytes()),
        raw=raw,
        vocabulary=Vocabulary(open_tokenizer(workspace.base)),
    )
    overlong = find_overlong(plan)
    samples = (choose_samples(number, shards, profile, overlong.get(number)) for number in range(len(shards.sources)))
    write_atomic(workspace.report, draw_page(page, samples, choose_rows(plan)).encode())
    print(f"the data is shown in {workspace.report}")


def choose_samples(number: int, shards: Shards, profile: Profile, overlong: Piece | None) -> Iterator[Sample]:
    """Yield the sequences of a source that are shown: the first, the longest, one by the seed, an over-long one."""
    source = shards.sources[number]
    if not len(source.lengths):
        return
    drawn = random.Random(f"{profile.rng_seed}/report/{source.name}")  # noqa: S311 - sampling, not secrets
    chosen: dict[int, list[str]] = {}
    for why, sequence in (
        ("first", 0),
        ("drawn by the seed", drawn.randrange(len(source.lengths))),
        ("longest", int(np.argmax(source.lengths))),
    ):
        chosen.setdefault(sequence, []).append(why)
    for sequence, reasons in chosen.items():
        reading = read_whole(number, sequence, shards, profile)
        cut = f", stored whole; a row holds {profile.max_length:,}" if reading.length > profile.max_length else ""
        yield Sample(", ".join(reasons).capitalize(), f"{_describe(source, reading)}{cut}", (reading,))
    if overlong:
        reading = read_piece(overlong, shards, profile)
        read = f", of which epoch 0 reads tokens {overlong.begin:,} to {overlong.end - 1:,} in this row"
        yield Sample("Over-long, as it is read", f"{_describe(source, reading)}{read}", (reading,))


def choose_rows(plan: EpochPlan) -> Iterator[Sample]:
    """Yield the packed rows that are shown: the epoch's first, and the one of most pieces."""
    if not plan.packed:
        return
    fullest = max(range(len(plan.packed)), key=lambda index: len(plan.packed[index]) if plan.packed else 0)
    for title, index in {"First row": 0, "Row of most pieces": fullest}.items():
        readings = tuple(read_piece(piece, plan.shards, plan.profile) for piece in plan.packed[index])
        tokens, learned = sum(len(one.tokens) for one in readings), sum(one.supervised for one in readings)
        pieces = "1 piece" if len(readings) == 1 else f"{len(readings):,} pieces"
        words = f"row {index:,} of epoch 0: {pieces}, {tokens:,} tokens, {learned:,} supervised"
        yield Sample(title, words, readings)


def find_overlong(plan: EpochPlan) -> dict[int, Piece]:
    """Return per source the first piece that an epoch reads of a sequence longer than a row."""
    sources, longest = plan.shards.sources, plan.profile.max_length
    found: dict[int, Piece] = {}
    if plan.packed is not None:
        for row in plan.packed:
            for piece in row:
                if piece.source not in found and sources[piece.source].lengths[piece.sequence] > longest:
                    found[piece.source] = piece
        return found
    drawn, sequences = plan.drawn_all()
    for number, source in enumerate(sources):
        places = np.flatnonzero(drawn == number)
        over = places[source.lengths[sequences[places]] > longest]
        if len(over):
            (found[number],) = plan.row(int(over[0]))
    return found


def _describe(source: SourceShards, reading: Reading) -> str:
    sequence = reading.piece.sequence
    part = find_part(sequence, source) or "neither train nor validation"
    return (
        f"sequence {sequence:,} ({part}): {reading.length:,} tokens, {reading.supervised:,} of the "
        f"{len(reading.tokens):,} shown here supervised"
    )
