import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.data.batches import collate, plan_epoch
from ropeway.data.shards import Kind, Shards, open_shards, sequence_digest
from ropeway.data.tokenized import text_key
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.conversation import Conversation
from ropeway.models.tokenizer import open_tokenizer, read_special
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import file_sha256, load_manifest, write_manifest
from ropeway.stages.prepare.split import plan_split
from ropeway.stages.prepare.stage import check_readback
from ropeway.stages.tokenize.encode import Encoder, document_kinds
from tests.support.prepared_run import encode_each
from tests.support.raw_records import TALKS, TEXTS, TOKENIZER, profile, write_raw
from tests.support.tokenizing import tokenize_and_prepare

PROMPTER, ASSISTANT = OPEN_ASSISTANT.added_tokens[:2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workspace = write_raw(tmp_path_factory.mktemp("prepare"))
    tokenize_and_prepare(workspace, profile())
    return workspace, open_shards(workspace.data), json.loads(workspace.ledger.read_bytes())


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(TOKENIZER)


def encoder(tokenizer, max_chunk_size=None, way="parse"):
    return Encoder(tokenizer, read_special(TOKENIZER, tokenizer, OPEN_ASSISTANT), OPEN_ASSISTANT, max_chunk_size, way)


def test_every_conversation_is_stored_whole_as_one_string_of_tokens(run, tokenizer):
    _, shards, _ = run
    talk, _ = shards.sources
    assert len(talk.lengths) == len(TALKS)
    for number, record in enumerate(TALKS):
        tokens, _ = talk.read(number)
        assert tokens.tolist() == tokenizer.encode(OPEN_ASSISTANT.render(record, end="</s>")).ids
    assert talk.lengths.max() > profile().max_length  # never cut


def test_every_document_is_stored_chunk_by_chunk_and_only_its_last_token_ends_it(run, tokenizer):
    _, shards, _ = run
    _, text = shards.sources
    number = 0
    for document in TEXTS:
        chunks = [document[at : at + 60] for at in range(0, len(document), 60)]
        for at, chunk in enumerate(chunks):
            tokens, kinds = text.read(number)
            assert tokens.tolist() == tokenizer.encode(chunk).ids
            end = Kind.DOCUMENT_END if at == len(chunks) - 1 else Kind.DOCUMENT
            assert kinds.tolist() == [Kind.DOCUMENT] * (len(tokens) - 1) + [end]
            number += 1
    assert number == len(text.lengths)


def test_the_manifest_says_what_readers_need(run):
    workspace, shards, _ = run
    manifest = shards.manifest
    assert manifest["format"] == 1
    assert manifest["vocab_size"] == 2005
    assert manifest["tokenizer"] == file_sha256(TOKENIZER / "tokenizer.json")
    assert manifest["special"][PROMPTER] == 2000
    for facts, source in zip(manifest["sources"], shards.sources, strict=True):
        assert facts["sequences"] == len(source.lengths)
        assert facts["tokens"] == source.lengths.sum()
    parts = {name.split("/")[1] for name in load_manifest(workspace.data, remedy="")["files"]}
    assert parts == {"tokens-00000.npy", "kinds-00000.npy", "lengths.npy", "train.npy", "validation.npy"}


def test_no_sequence_trains_and_validates(run):
    _, shards, _ = run
    for source, limit in zip(shards.sources, (5, 4), strict=True):
        assert not set(source.train) & set(source.validation)
        assert len(source.validation) == limit


def test_preparing_twice_gives_the_same_bytes(run, tmp_path):
    workspace, _, _ = run
    again = write_raw(tmp_path)
    tokenize_and_prepare(again, profile())
    assert file_sha256(again.data / "manifest.json") == file_sha256(workspace.data / "manifest.json")
    assert again.ledger.read_bytes() == workspace.ledger.read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{}, {"layout": "packed"}, {"document_end": "eos", "what_counts": "answers"}],
    ids=["padded", "packed", "answers"],
)
def test_the_ledgers_epoch_is_what_training_reads(tmp_path, changes):
    workspace, options = write_raw(tmp_path), profile(**changes)
    tokenize_and_prepare(workspace, options)
    shards, ledger = open_shards(workspace.data), json.loads(workspace.ledger.read_bytes())
    plan = plan_epoch(shards, options, epoch=0)
    found = [Counter() for _ in shards.sources]
    for source, sequence in map(plan.drawn_sequence, range(len(plan.order))):
        found[source] += Counter(drawn=1, drawn_tokens=int(shards.sources[source].lengths[sequence]))
    for index in range(plan.rows):
        row = plan.row(index)
        batch = collate([row], shards, options)
        padding = int((batch.sources < 0).sum())
        found[row[0].source] += Counter(cells=padding, padding=padding)
        for number, counts in enumerate(found):
            here = batch.sources == number
            tokens = int(here.sum())
            counts += Counter(cells=tokens, row_tokens=tokens, supervised=int((batch.loss_mask & here).sum()))
        for piece in row:
            lost = int(shards.sources[piece.source].lengths[piece.sequence]) - (piece.end - piece.begin)
            if lost and not (shards.sources[piece.source].is_document and plan.packed):
                how = "windowed" if piece.begin else "cut"
                found[piece.source] += Counter({how: 1, f"{how}_tokens": lost})
    for account, counts in zip(ledger["sources"], found, strict=True):
        epoch = account["epochs"][0]
        assert {name: count for name, count in epoch.items() if count and name != "not_drawn"} == dict(counts)
    assert found[0]["cut" if plan.packed else "windowed"] > 0
    assert found[1]["cut"] > 0 or plan.packed
    assert ledger["epochs"] == [
        {
            "epoch": 0,
            "sequences": len(plan.order),
            "rows": plan.rows,
            "global_batch_size": 4,
            "steps": plan.steps,
            "left_over": plan.rows - 4 * plan.steps,
        }
    ]


def test_the_ledger_accounts_for_every_epoch(tmp_path):
    workspace = write_raw(tmp_path)
    tokenize_and_prepare(workspace, profile(num_train_epochs=3))
    ledger = json.loads(workspace.ledger.read_bytes())
    assert [epoch["epoch"] for epoch in ledger["epochs"]] == [0, 1, 2]
    tokens = [epoch["row_tokens"] for epoch in ledger["sources"][0]["epochs"]]
    assert len(tokens) == 3


def test_a_conversation_without_turns_is_refused_and_counted(tmp_path):
    workspace = write_raw(tmp_path, [Conversation((), "alone"), *TALKS], refused={"not JSON": 2})
    tokenize_and_prepare(workspace, profile(max_refused_fraction=0.1))
    records = json.loads(workspace.ledger.read_bytes())["sources"][0]["records"]
    assert records["read"] == 43
    assert records["kept"] == 40
    assert records["refused_by_fetch"] == {"not JSON": 2}
    assert records["refused_by_tokenize"] == {"conversation without turns": 1}


def test_too_many_refused_records_end_the_stage_and_leave_no_table(tmp_path):
    workspace = write_raw(tmp_path, [Conversation((), "alone"), *TALKS])
    with pytest.raises(DataError, match=r"source talk: 1 of 41 records refused .*more than max_refused_fraction 0.01"):
        tokenize_and_prepare(workspace, profile())
    assert not workspace.data.exists()


def test_an_empty_document_is_no_chunk_and_is_counted(tmp_path):
    workspace = write_raw(tmp_path, texts=["", *TEXTS])
    tokenize_and_prepare(workspace, profile())
    account = json.loads(workspace.ledger.read_bytes())["sources"][1]
    assert account["records"]["kept"] == 31
    assert account["records"]["without_tokens"] == 1


def test_a_special_tokens_string_in_a_text_is_parsed_and_the_record_counted(tmp_path, capsys):
    odd = Conversation(("Which token ends a turn?", "It is </s>, see?"))
    workspace = write_raw(tmp_path, [odd, *TALKS], [*TEXTS, "plain <|prompter|> text"])
    tokenize_and_prepare(workspace, profile())
    ledger = json.loads(workspace.ledger.read_bytes())
    assert [account["records"]["with_special_tokens"] for account in ledger["sources"]] == [1, 1]
    assert "1 records have a special token's string" in capsys.readouterr().out
    special = open_shards(workspace.data).special
    assert open_shards(workspace.data).sources[0].read(0)[0].tolist().count(special["eos"]) == 3


@pytest.mark.parametrize(("way", "kept", "ends"), [("parse", 41, 4), ("escape", 41, 2), ("reject", 40, 2)])
def test_special_tokens_in_text_are_counted_whatever_becomes_of_them(tmp_path, capsys, way, kept, ends):
    odd = Conversation(("Which token ends a turn?", "It is </s>, see? </s><|assistant|>"))
    workspace = write_raw(tmp_path, [odd, *TALKS], [*TEXTS, "plain <|prompter|> text"])
    tokenize_and_prepare(workspace, profile(special_tokens_in_text=way, max_refused_fraction=0.1))
    talk, text = (account["records"] for account in json.loads(workspace.ledger.read_bytes())["sources"])
    assert talk["with_special_tokens"] == text["with_special_tokens"] == 1
    assert talk["special_token_hits"] == {"</s>": 2, "<|assistant|>": 1}
    assert text["special_token_hits"] == {"<|prompter|>": 1}
    assert talk["kept"] == kept
    assert talk["refused_by_tokenize"] == ({"special token in text": 1} if way == "reject" else {})
    assert f"(special_tokens_in_text: {way})" in capsys.readouterr().out
    shards = open_shards(workspace.data)
    assert shards.sources[0].read(0)[0].tolist().count(shards.special["eos"]) == ends
    last, _ = shards.sources[1].read(len(shards.sources[1].lengths) - 1)
    assert (shards.special[PROMPTER] in last.tolist()) == (way == "parse")


def test_rejecting_too_many_records_ends_the_stage(tmp_path):
    workspace = write_raw(tmp_path, [Conversation(("a", "</s>")), *TALKS])
    with pytest.raises(DataError, match=r"source talk: 1 of 41 records refused .*special token in text"):
        tokenize_and_prepare(workspace, profile(special_tokens_in_text="reject"))
    assert not workspace.data.exists()


def test_refusals_of_fetch_and_prepare_for_the_same_reason_add_up(tmp_path):
    workspace = write_raw(tmp_path, [Conversation((), "alone"), *TALKS], refused={"conversation without turns": 2})
    with pytest.raises(DataError, match="source talk: 3 of 43 records refused"):
        tokenize_and_prepare(workspace, profile())


@pytest.mark.parametrize("split", ["permutation", "by_hash"])
def test_no_document_has_chunks_on_both_sides_and_the_ledger_comes_out_even(tmp_path, split):
    workspace = write_raw(tmp_path, texts=[f"{text}{n}" for n, text in enumerate(TEXTS * 3)])
    tokenize_and_prepare(workspace, profile(split=split, split_by="document"))
    _, text = open_shards(workspace.data).sources
    tokenizer = open_tokenizer(TOKENIZER)
    sequences = encode_each(encoder(tokenizer, 60), [f"{text}{n}" for n, text in enumerate(TEXTS * 3)])
    record = [sequence.record for sequence in sequences]
    train = {record[n] for n in text.train}
    assert len(text.validation)
    assert not train & {record[n] for n in text.validation}
    assert Counter(record[n] for n in text.train) == {n: record.count(n) for n in train}
    parts = json.loads(workspace.ledger.read_bytes())["sources"][1]["sequences"]
    assert parts["train"] + parts["validation"] + parts["unused"] == parts["all"] == len(record)


def test_a_source_that_teaches_nothing_is_refused(tmp_path):
    talks = [Conversation((f"Is lamp {n} lit?",)) for n in range(40)]  # nobody answers
    workspace = write_raw(tmp_path, talks)
    with pytest.raises(DataError, match="source talk: 0 supervised tokens in 32 rows"):
        tokenize_and_prepare(workspace, profile(what_counts="answers"))
    assert not workspace.data.exists()


def test_changed_raw_bytes_are_found(tmp_path):
    workspace = write_raw(tmp_path)
    part = workspace.raw / "talk" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"part-00000.parquet: sha256 is .*Run `dvc repro fetch`"):
        tokenize_and_prepare(workspace, profile())


def test_a_found_number_other_than_the_expected_one_is_reported(tmp_path, capsys):
    tokenize_and_prepare(write_raw(tmp_path), profile())
    assert "talk: expected_rows is 236,053, found 40 sequences" in capsys.readouterr().out


def test_kinds_follow_role_tokens_and_what_stands_before_them_is_nobodys(tokenizer):
    special = read_special(TOKENIZER, tokenizer, OPEN_ASSISTANT)
    tokens = np.array(tokenizer.encode("<|system|>S</s><|prompter|>q</s><|assistant|>a</s>").ids)
    kinds = OPEN_ASSISTANT.speakers(tokens, ids=special)
    prompter, assistant = (tokens.tolist().index(special[role]) for role in (PROMPTER, ASSISTANT))
    assert set(kinds[:prompter]) == {Kind.SYSTEM}
    assert set(kinds[prompter:assistant]) == {Kind.PROMPTER}
    assert set(kinds[assistant:]) == {Kind.ASSISTANT}


@given(st.integers(0, 9), st.booleans())
def test_a_chunk_has_one_end_at_most(length, is_last):
    kinds = document_kinds(length, is_last=is_last)
    assert (kinds == Kind.DOCUMENT_END).sum() == int(is_last and length > 0)


@settings(max_examples=20)
@given(records=st.lists(st.text(max_size=80), max_size=30), size=st.integers(1, 50))
def test_batching_the_tokenizer_changes_no_sequence(tokenizer, records, size):
    together = encode_each(encoder(tokenizer, size), records)
    apart = [sequence for record in records for sequence in encode_each(encoder(tokenizer, size), [record])]
    assert [s.tokens.tolist() for s in together] == [s.tokens.tolist() for s in apart]
    assert [s.kinds.tolist() for s in together] == [s.kinds.tolist() for s in apart]
    expected = [number for number, text in enumerate(records) for _ in range(-(-len(text) // size))]
    assert [s.record for s in together] == expected


def test_small_batches_give_the_same_sequences(tokenizer, monkeypatch):
    whole = [s.tokens.tolist() for s in encode_each(encoder(tokenizer), TALKS)]
    monkeypatch.setattr("ropeway.stages.tokenize.encode.BATCH_CHARACTERS", 50)
    assert [s.tokens.tolist() for s in encode_each(encoder(tokenizer), TALKS)] == whole


def split_of(texts, *, per=1, limit=None, **changes):
    """Split of `per` sequences a record, keyed by text."""
    options = {"split": "by_hash", "split_by": "chunk", **changes}
    records = np.repeat(np.arange(len(texts)), per)
    by_document = options["split_by"] == "document"
    keys = [text_key(text if by_document else f"{text}/{at}") for text in texts for at in range(per)]
    return plan_split(
        records if by_document else np.arange(len(records)),
        np.array(keys, np.uint64),
        profile(**options),
        max_val_set=limit,
        generator=np.random.RandomState(1),
    )


def test_a_split_by_hash_is_not_moved_by_new_records():
    old = [f"record {n}" for n in range(500)]
    new = [text for n in range(500) for text in ([f"new {n}"] if n % 7 == 0 else []) + [f"record {n}"]]
    before, after = split_of(old), split_of(new)
    kept = {old[n] for n in before.validation}
    assert kept == {new[n] for n in after.validation if new[n].startswith("record")}
    assert 0.15 < len(before.validation) / 500 < 0.25


def test_a_split_by_hash_depends_on_the_splits_seed_and_not_on_the_runs(monkeypatch):
    texts = [f"record {n}" for n in range(500)]
    before = split_of(texts).validation.tolist()
    assert split_of(texts, rng_seed=12).validation.tolist() == before
    monkeypatch.setattr("ropeway.data.tokenized.SPLIT_SEED", 667)
    assert split_of(texts).validation.tolist() != before


def test_a_new_record_takes_one_place_at_most_in_a_limited_validation_set():
    old = [f"record {n}" for n in range(500)]
    before = {old[n] for n in split_of(old, limit=20).validation}
    for number in range(40):
        new = [f"new {number}", *old]
        after = split_of(new, limit=20)
        assert len(before - {new[n] for n in after.validation}) <= 1
        assert len(after.train) + len(after.validation) + len(after.unused) == 501


@settings(max_examples=30)
@given(texts=st.lists(st.text(max_size=40), max_size=40), share=st.floats(0, 0.9), limit=st.integers(0, 9) | st.none())
@pytest.mark.parametrize("split", ["permutation", "by_hash"])
@pytest.mark.parametrize("split_by", ["chunk", "document"])
def test_every_split_puts_each_sequence_in_one_part(split, split_by, texts, share, limit):
    found = split_of(texts, per=2, limit=limit, split=split, split_by=split_by, val_split=share)
    assert sorted([*found.train, *found.validation, *found.unused]) == list(range(2 * len(texts)))


@pytest.mark.parametrize("split", ["permutation", "by_hash"])
def test_a_split_by_document_keeps_a_documents_chunks_together(split):
    texts = [f"document {n}" for n in range(60)]
    found = split_of(texts, per=3, split=split, split_by="document")
    for part in (found.train, found.validation):
        assert all(count == 3 for count in Counter(int(n) // 3 for n in part).values())
    assert sorted([*found.train, *found.validation]) == list(range(180))
    apart = split_of(texts, per=3, split=split, split_by="chunk")
    assert any(count < 3 for count in Counter(int(n) // 3 for n in apart.train).values())


def test_shards_are_cut_at_their_size_and_read_back(tmp_path, run, monkeypatch):
    monkeypatch.setattr("ropeway.data.raw_records._ROW_GROUP_CHARACTERS", 200)
    monkeypatch.setattr("ropeway.stages.tokenize.stage.UNIT_BYTES", 900)
    workspace = write_raw(tmp_path)
    tokenize_and_prepare(workspace, profile())
    talk, text = open_shards(workspace.data).sources
    assert min(len(talk.shard_sequences), len(text.shard_sequences)) > 2
    _, whole, ledger = run
    for source, expected in zip((talk, text), whole.sources, strict=True):
        for number in range(len(expected.lengths)):
            found = [column.tolist() for column in source.read(number)]
            assert found == [column.tolist() for column in expected.read(number)]
        assert source.train.tolist() == expected.train.tolist()
        assert source.validation.tolist() == expected.validation.tolist()
    assert json.loads(workspace.ledger.read_bytes()) == ledger


def test_a_shard_that_reads_back_otherwise_is_found(run):
    _, shards, _ = run
    talk = Shards(shards.sources[:1], {})
    ends = [sequence_digest(*shards.sources[0].read(number)) for number in (0, len(TALKS) - 1)]
    check_readback(talk, {"talk": [ends]})
    with pytest.raises(DataError, match="sequence 0 reads back as"):
        check_readback(talk, {"talk": [ends[::-1]]})


def test_a_shard_of_another_size_is_found(tmp_path):
    workspace = write_raw(tmp_path)
    tokenize_and_prepare(workspace, profile())
    path = workspace.data / "text" / "kinds-00000.npy"
    np.save(path, np.load(path)[:-1])
    with pytest.raises(DataError, match=r"kinds-00000.npy has [\d,]+ entries, expected [\d,]+ for"):
        check_readback(open_shards_unchecked(workspace.data), {"talk": [[]], "text": [[]]})


def open_shards_unchecked(folder):
    manifest = json.loads((folder / "manifest.json").read_bytes())
    write_manifest(folder, {key: value for key, value in manifest.items() if key != "files"})
    return open_shards(folder)
