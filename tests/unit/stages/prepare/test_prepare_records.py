"""records.index of a run: what became of each record, compared with what the split and the ledger say."""

import json

import numpy as np
import pytest

from ropeway.config.sections import DatasetOptions
from ropeway.data.batches import plan_epoch
from ropeway.data.record_identity import record_digest
from ropeway.data.record_index import RecordIndex, RecordOutcome
from ropeway.data.shards import open_shards
from ropeway.models.conversation import Conversation
from tests.support.raw_records import TALKS, TEXTS, profile, write_raw
from tests.support.tokenizing import tokenize_and_prepare

SPECIAL = Conversation(("What is </s>?", "An end token."))
EMPTY = " "


def open_index(workspace):
    data = workspace.record_index.read_bytes()
    return RecordIndex.open(lambda start, count: data[start : start + count], len(data), "records.index")


def find(workspace, *records):
    return open_index(workspace).find([record_digest(one) for one in records])


@pytest.fixture(scope="module", params=["padded", "packed"])
def run(request, tmp_path_factory):
    talks = [*TALKS, SPECIAL, TALKS[3]]
    texts = [*TEXTS, TEXTS[1], EMPTY]
    workspace = write_raw(tmp_path_factory.mktemp("records"), talks, texts)
    options = [{"talk": DatasetOptions(max_val_set=2, fraction=0.5)}, {"text": DatasetOptions(max_val_set=4)}]
    repeats = profile().duplicates.model_copy(update={"exact": "remove", "near": "off"})
    chosen = profile(
        datasets=options,
        layout=request.param,
        document_end="masked",
        what_counts="published",
        max_length=64,
        special_tokens_in_text="reject",
        max_refused_fraction=0.5,
        duplicates=repeats,
        val_split=0.2,
        num_train_epochs=1,
    )
    tokenize_and_prepare(workspace, chosen)
    return workspace, chosen


def test_each_record_has_the_outcome_that_rows_and_split_give_it(run):
    workspace, chosen = run
    shards = open_shards(workspace.data)
    plan = plan_epoch(shards, chosen, epoch=0)
    read = {
        (piece.source, piece.sequence)
        for row in range(plan.steps * chosen.global_batch_size)
        for piece in plan.row(row)
    }
    for number, records in enumerate((TALKS, TEXTS)):
        source = shards.sources[number]
        found = find(workspace, *records)
        for sequence, outcome in enumerate(found):  # one sequence each, in this order
            if (number, sequence) in read:
                assert outcome.role == "trained"
            elif sequence in source.validation:
                assert outcome.role == "validation"
            elif sequence in source.train:
                assert outcome.reason == "in training, but no step of any epoch reads it"
            else:
                assert outcome.reason == "validation beyond max_val_set"
            assert outcome.source == source.name
    ledger = json.loads(workspace.ledger.read_bytes())["sources"][0]
    roles = [one.role for one in find(workspace, *TALKS)]
    assert roles.count("validation") == ledger["sequences"]["validation"] == 2
    assert 0 < roles.count("trained") <= ledger["epochs"][0]["drawn"]


def test_a_refused_record_has_its_reason_and_an_empty_or_unknown_one_no_entry(run):
    workspace, _ = run
    assert find(workspace, SPECIAL) == [RecordOutcome("talk", "dropped", "refused: special token in text")]
    assert find(workspace, EMPTY, "never seen") == [None, None]


def test_a_duplicate_has_the_outcome_of_the_record_that_is_kept(run):
    workspace, _ = run
    ledger = json.loads(workspace.ledger.read_bytes())["sources"]
    assert [one["findings"]["exact"]["records"] for one in ledger] == [1, 1]
    assert open_index(workspace).count == len(TALKS) + len(set(TEXTS)) + 1
    assert {one.reason for one in find(workspace, TALKS[3], TEXTS[1])} != {"exact duplicate"}


def test_removed_near_duplicates_and_contaminated_records_are_dropped_with_their_reason(tmp_path):
    words = [f"word{n}" for n in range(400)]
    long, similar = " ".join(words), " ".join([*words, "more"])
    quoting = [" ".join([f"own{n}", *words[5 * n : 5 * n + 20], f"own{n} end"]) for n in range(30)]
    workspace = write_raw(tmp_path, texts=[long, similar, *quoting, *TEXTS])
    repeats = profile().duplicates.model_copy(update={"exact": "remove", "near": "remove"})
    contamination = profile().contamination.model_copy(update={"action": "remove"})
    options = [{"talk": DatasetOptions()}, {"text": DatasetOptions()}]
    tokenize_and_prepare(
        workspace,
        profile(duplicates=repeats, contamination=contamination, datasets=options, val_split=0.3, max_length=4096),
    )
    assert find(workspace, similar) == [RecordOutcome("text", "dropped", "near duplicate")]
    counted = json.loads(workspace.ledger.read_bytes())["sources"][1]["findings"]
    reasons = [one.reason for one in find(workspace, *quoting, long, *TEXTS)]
    assert reasons.count("contaminated") == counted["contaminated"]["records"] > 0


def test_the_index_is_the_same_from_one_unit_and_from_many(tmp_path, monkeypatch):
    one = write_raw(tmp_path / "one", [*TALKS, SPECIAL])
    tokenize_and_prepare(one, profile(special_tokens_in_text="reject", max_refused_fraction=0.5))
    monkeypatch.setattr("ropeway.data.raw_records._ROW_GROUP_CHARACTERS", 200)
    many = write_raw(tmp_path / "many", [*TALKS, SPECIAL])
    tokenize_and_prepare(many, profile(special_tokens_in_text="reject", max_refused_fraction=0.5))
    assert one.record_index.read_bytes() == many.record_index.read_bytes()
    assert np.array_equal(*(np.load(each.tokens / "talk" / "refused_exact.npy") for each in (one, many)))
