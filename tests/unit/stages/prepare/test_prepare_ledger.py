"""The ledger's epochs, counted in columns, against the walk that collates every row as training does."""

from collections import Counter
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.config.sections import DatasetOptions
from ropeway.data.batches import collate, plan_epoch
from ropeway.data.ledger import FindingCounts, Findings, RecordTotals, SourceEpoch, check_ledger
from ropeway.data.shards import FORMAT, open_shards, write_shard
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.runtime.manifest import write_manifest
from ropeway.stages.prepare.ledger_builder import build_ledger, plan_epochs
from ropeway.stages.prepare.split import Split
from ropeway.stages.tokenize.encode import document_kinds
from tests.support.raw_records import profile

NO_RECORDS = RecordTotals(0, {}, {}, 0, 0, {}, 0)
OFF = FindingCounts("off", 0, 0, 0)
NO_FINDINGS = Findings(OFF, OFF, OFF, 0)
PROMPTER, ASSISTANT = 3, 4
ROLE_IDS = dict(zip(OPEN_ASSISTANT.added_tokens, (PROMPTER, ASSISTANT), strict=False))


def walk(plan):
    """What is read of each source in an epoch, counted row by row: the reference."""
    sources = plan.shards.sources
    counts, seen = [Counter() for _ in sources], set()
    for index in range(len(plan.order)):
        source, sequence = plan.drawn_sequence(index)
        tokens = int(sources[source].lengths[sequence])
        counts[source] += Counter(drawn=1, drawn_tokens=tokens)
        if (source, sequence) in seen:
            counts[source] += Counter(repeated=1, repeated_tokens=tokens)
        seen.add((source, sequence))
    for index in range(plan.rows):
        row = plan.row(index)
        batch = collate([row], plan.shards, plan.profile)
        padding = int((batch.sources < 0).sum())
        counts[row[0].source] += Counter(cells=padding, padding=padding)
        for source in {piece.source for piece in row}:
            here = batch.sources == source
            tokens = int(here.sum())
            counts[source] += Counter(cells=tokens, row_tokens=tokens, supervised=int((batch.loss_mask & here).sum()))
        for piece in row:
            counts[piece.source] += lost(piece, plan)
    different = Counter(source for source, _ in seen)
    names = [field.name for field in fields(SourceEpoch) if field.name not in ("epoch", "not_drawn")]
    return [
        {"epoch": plan.epoch, "not_drawn": len(source.train) - different[at], **{name: count[name] for name in names}}
        for at, (source, count) in enumerate(zip(sources, counts, strict=True))
    ]


def lost(piece, plan):
    source = plan.shards.sources[piece.source]
    tokens = int(source.lengths[piece.sequence]) - (piece.end - piece.begin)
    if not tokens or (source.is_document and plan.packed is not None):
        return Counter()
    how = "windowed" if piece.begin else "cut"
    return Counter({how: 1, f"{how}_tokens": tokens})


def write(folder, sources):
    """Shards of these sources: name -> kind, shards of sequences of (tokens, kinds)."""
    facts = []
    for name, (kind, shards) in sources.items():
        here = folder / name
        here.mkdir(parents=True)
        lengths = [length for n, part in enumerate(shards) for length in write_shard(here, n, part, vocab_size=9)]
        np.save(here / "lengths.npy", np.array(lengths, np.int32))
        order = np.random.RandomState(1).permutation(len(lengths))
        np.save(here / "train.npy", order[len(order) // 4 :].astype(np.int64))
        np.save(here / "validation.npy", order[: len(order) // 4].astype(np.int64))
        facts.append({"name": name, "kind": kind, "shard_sequences": [len(part) for part in shards]})
    write_manifest(folder, {"format": FORMAT, "special": {"bos": 1, "eos": 2, "pad": 2}, "sources": facts})
    return open_shards(folder)


talk = st.lists(st.sampled_from([5, 6, PROMPTER, ASSISTANT]), min_size=1, max_size=40).map(
    lambda ids: (np.array([1, *ids]), OPEN_ASSISTANT.speakers(np.array([1, *ids]), ids=ROLE_IDS))
)
chunk = st.tuples(st.integers(1, 40), st.booleans()).map(
    lambda pair: (np.full(pair[0], 7), document_kinds(pair[0], is_last=pair[1]))
)


def shards_of(sequences):
    return st.lists(st.lists(sequences, max_size=6), min_size=1, max_size=3)


@settings(max_examples=30)
@given(
    talks=shards_of(talk),
    texts=shards_of(chunk),
    what_counts=st.sampled_from(["published", "answers"]),
    document_end=st.sampled_from(["masked", "eos", "published"]),
    label_masking=st.booleans(),
    fraction=st.sampled_from([0.3, 1.0, 2.0, 2.6]),
    probability=st.sampled_from([0.0, 0.6, 1.0]),
)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_account_is_what_a_walk_over_all_rows_counts(tmp_path_factory, layout, talks, texts, fraction, **changes):
    if layout == "packed":  # knows no published end
        changes["document_end"] = changes["document_end"].replace("published", "masked")
    options = [{"talk": DatasetOptions(fraction=fraction)}, {"text": DatasetOptions()}]
    changes["random_offset_probability"] = changes.pop("probability")
    chosen = profile(layout=layout, max_length=20, num_train_epochs=2, datasets=options, **changes)
    folder = tmp_path_factory.mktemp("account") / "data"
    shards = write(folder, {"talk": ("conversation", talks), "text": ("document", texts)})
    splits = {s.name: Split(s.train, s.validation, np.empty(0, np.int64)) for s in shards.sources}
    sizes = {s.name: len(s.lengths) for s in shards.sources}
    records = {name: replace(NO_RECORDS, read=size, kept=size) for name, size in sizes.items()}
    ledger = build_ledger(plan_epochs(shards, chosen), records, splits, dict.fromkeys(splits, NO_FINDINGS), chosen)
    if all(any(epoch.supervised for epoch in account.epochs) for account in ledger.sources):
        check_ledger(ledger)
    for epoch in range(2):
        expected = walk(plan_epoch(shards, chosen, epoch=epoch))
        assert [asdict(account.epochs[epoch]) for account in ledger.sources] == expected
