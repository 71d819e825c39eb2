"""Stage report_data: report.html shows each source's ledger and a few sequences token by token, to check masks.

It also writes data_profile.json: what later versions of the model are compared with, to see whether the data drifts.
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ropeway.config.params import Profile
from ropeway.data.batches import EpochPlan, Piece, plan_epoch
from ropeway.data.data_profile import build_data_profile
from ropeway.data.shards import Shards, SourceShards, open_shards
from ropeway.data.tokenized import PROFILE
from ropeway.models.tokenizer import open_tokenizer
from ropeway.reporting.ledger_steps import list_steps, split_tokens
from ropeway.reporting.pictures import draw_lengths
from ropeway.reporting.render import render
from ropeway.reporting.token_view import (
    DisplayToken,
    Reading,
    Vocabulary,
    find_part,
    next_token,
    read_piece,
    read_whole,
)
from ropeway.reporting.turns import ConversationFinder, show_turn
from ropeway.runtime.manifest import Json, canonical_json, describe_files, load_manifest, write_atomic
from ropeway.runtime.workspace import Workspace

_OPEN_SOURCES = 5  # with more, sections start collapsed
_SHOWN_TOKENS = 900  # per sample; `ropeway inspect` prints all
_SHOWN_CHARACTERS = 1_200  # of a value in a conversation; `ropeway inspect --json` has all
_MIN_TOKENS = 24  # per piece of a packed row
_TAIL_SHARE = 4  # 1/4 of the shown tokens of a shortened sequence are its last ones


@dataclass(frozen=True)
class Page:
    """Inputs of the page.

    Attributes:
        raw: Source name -> its entry in the raw manifest.
        conversations: Finds the conversations of sequences; None: they are not shown.
    """

    profile: Profile
    name: str
    shards: Shards
    ledger: Json
    raw: Json
    vocabulary: Vocabulary
    conversations: ConversationFinder | None = None


@dataclass(frozen=True)
class Sample:
    """One sequence, or the pieces of one packed row, with a title and a description."""

    title: str
    words: str
    readings: tuple[Reading, ...]


def run(workspace: Workspace, profile: Profile) -> None:
    """Write report.html and data_profile.json, deterministically; raise DataError when a file was changed."""
    raw = load_manifest(workspace.raw, remedy="Run `dvc repro fetch`", verify=False)["sources"]
    shards = open_shards(workspace.data)
    plan = plan_epoch(shards, profile, epoch=0)
    page = Page(
        profile=profile,
        name=workspace.profile,
        shards=shards,
        ledger=json.loads(workspace.ledger.read_bytes()),
        raw=raw,
        vocabulary=Vocabulary(open_tokenizer(workspace.base)),
        conversations=ConversationFinder(workspace, profile),
    )
    overlong = find_overlong(plan)
    samples = (choose_samples(number, shards, profile, overlong.get(number)) for number in range(len(shards.sources)))
    write_atomic(workspace.report, render_report(page, samples, choose_rows(plan)).encode())
    tokenized = json.loads((workspace.tokens / PROFILE).read_bytes())
    index = describe_files(workspace.run, [workspace.record_index.name])[workspace.record_index.name]
    write_atomic(workspace.data_profile, canonical_json(build_data_profile(tokenized, page.ledger, record_index=index)))
    print(f"data report: {workspace.report}; data profile: {workspace.data_profile}")


def choose_samples(number: int, shards: Shards, profile: Profile, overlong: Piece | None) -> Iterator[Sample]:
    """Yield a source's samples: the first sequence, a random one, the longest, and one longer than `max_length`."""
    source = shards.sources[number]
    if not len(source.lengths):
        return
    drawn = random.Random(f"{profile.rng_seed}/report/{source.name}")
    chosen: dict[int, list[str]] = {}
    for why, sequence in (
        ("first", 0),
        ("random", drawn.randrange(len(source.lengths))),
        ("longest", int(np.argmax(source.lengths))),
    ):
        chosen.setdefault(sequence, []).append(why)
    for sequence, reasons in chosen.items():
        reading = read_whole(number, sequence, shards, profile)
        cut = f"; max_length is {profile.max_length:,} tokens" if reading.length > profile.max_length else ""
        yield Sample(", ".join(reasons).capitalize(), f"{_describe(source, reading)}{cut}", (reading,))
    if overlong:
        reading = read_piece(overlong, shards, profile)
        read = f" in the row of epoch 0, which holds tokens {overlong.begin:,} to {overlong.end - 1:,}"
        yield Sample("Longer than max_length", f"{_describe(source, reading)}{read}", (reading,))


def choose_rows(plan: EpochPlan) -> Iterator[Sample]:
    """Yield two packed rows of the epoch: the first one and the one with the most pieces."""
    if not plan.packed:
        return
    fullest = max(range(len(plan.packed)), key=lambda index: len(plan.packed[index]) if plan.packed else 0)
    for title, index in {"First row": 0, "Row with the most pieces": fullest}.items():
        readings = tuple(read_piece(piece, plan.shards, plan.profile) for piece in plan.packed[index])
        tokens, supervised = sum(len(one.tokens) for one in readings), sum(one.supervised for one in readings)
        pieces = "1 piece" if len(readings) == 1 else f"{len(readings):,} pieces"
        words = f"row {index:,} of epoch 0: {pieces}, {tokens:,} tokens, {supervised:,} supervised"
        yield Sample(title, words, readings)


def find_overlong(plan: EpochPlan) -> dict[int, Piece]:
    """Return per source the first piece in the epoch that comes from a sequence longer than `max_length`."""
    sources, longest = plan.shards.sources, plan.profile.max_length
    found: dict[int, Piece] = {}
    if plan.packed is not None:
        for row in plan.packed:
            for piece in row:
                if piece.source not in found and sources[piece.source].lengths[piece.sequence] > longest:
                    found[piece.source] = piece
        return found
    drawn, sequences = plan.drawn_sequences()
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
        f"sequence {sequence:,} ({part}): {reading.length:,} tokens, {reading.supervised:,} of {len(reading.tokens):,} "
        "supervised"
    )


def render_report(page: Page, samples: Iterable[Iterable[Sample]], rows: Iterable[Sample]) -> str:
    """Return the HTML page; `samples` are consumed one source after another."""
    chosen = iter(samples)
    sources = [
        _plan_source(page, account, source, (_show(page, sample) for sample in next(chosen, ())))
        for account, source in zip(page.ledger["sources"], page.shards.sources, strict=True)
    ]
    return render(
        "data.html.jinja",
        title=f"{page.name}: data report",
        profile=page.profile,
        epochs=page.ledger["epochs"],
        part_names=list(split_tokens(page.ledger["sources"][0])),
        open_sources=_OPEN_SOURCES,
        rows=[_show(page, sample) for sample in rows],
        sources=sources,
    )


def _plan_source(
    page: Page, account: Json, source: SourceShards, samples: Iterator[Mapping[str, object]]
) -> Mapping[str, object]:
    """Return a source's template values; `samples` is lazy because a sequence may be large."""
    return {
        "account": account,
        "refused": sum(sum(account["records"][f"refused_by_{stage}"].values()) for stage in ("fetch", "tokenize")),
        "first_refused": page.raw[account["name"]].get("first_refused", []),
        "first_skipped": page.raw[account["name"]].get("first_skipped", []),
        "sequences": len(source.lengths),
        "over": int((source.lengths > page.profile.max_length).sum()),
        "parts": split_tokens(account),
        "steps": list_steps(account),
        "lengths": draw_lengths(source.lengths, page.profile.max_length),
        "samples": samples,
    }


def _show(page: Page, sample: Sample) -> Mapping[str, object]:
    """Return a sample's template values, with decoded tokens."""
    limit = max(_SHOWN_TOKENS // max(len(sample.readings), 1), _MIN_TOKENS)
    excerpts = [_cut(page, reading, limit) for reading in sample.readings]
    first, is_row = sample.readings[0], len(excerpts) > 1
    is_whole = not is_row and len(first.tokens) == first.length  # of a cut sequence some turns would not be trained on
    turns = (
        None if not is_whole or not page.conversations else page.conversations.find(first.source, first.piece.sequence)
    )
    return {
        "title": sample.title,
        "words": sample.words,
        "excerpts": excerpts,
        "is_row": is_row,
        "turns": turns,
        "tools": list(turns.list_tools(_SHOWN_CHARACTERS)) if turns else [],
        "shown_turns": [show_turn(turn, _SHOWN_CHARACTERS) for turn in turns.turns] if turns else [],
    }


def _cut(page: Page, reading: Reading, limit: int) -> Mapping[str, object]:
    """Return a reading's decoded tokens with their mask; of a long one the first and last tokens."""
    count = len(reading.tokens)
    tail = limit // _TAIL_SHARE if count > limit else 0
    head = limit - tail if tail else count

    def shown(part: slice) -> list[tuple[DisplayToken, bool]]:
        tokens = page.vocabulary.show(reading.tokens[part].tolist())
        return list(zip(tokens, reading.supervised_mask[part].tolist(), strict=True))

    return {
        "reading": reading,
        "head": shown(slice(0, head)),
        "left_out": count - head - tail,
        "tail": shown(slice(count - tail, count)),
        "taught_next": next_token(reading, page.shards, page.profile, page.vocabulary),
    }
