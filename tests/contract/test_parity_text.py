"""Strings and tokens: formatting, tokenization, encoding of conversations, chunks of documents."""

import hashlib

import pytest

from ropeway.data.batches import collate
from ropeway.data.loss_mask import loss_mask
from ropeway.data.mixture import plan_chunks
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.tokenizer import (
    count_tokens,
    open_tokenizer,
    prepare_tokenizer,
    read_special,
    read_special_names,
    write_tokenizer,
)
from tests.support.vectors import FOLDER, TOKENIZER, Bench, bits, cases, conversation, published, same, seeded, vectors


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize(("name", "case"), cases("formatting"))
def test_a_record_renders_to_the_originals_strings(name, case):
    end = vectors("formatting")["eos_token"]
    talk = conversation(case["record"])
    same("formatting", OPEN_ASSISTANT.render_turns(talk, end=end), case["fragments"], name)
    same("formatting", OPEN_ASSISTANT.render(talk, end=end), case["text"], name)
    same("formatting", talk.system, case["system_message"], name)


def test_special_tokens_have_the_ids_that_the_tokenizer_gives_them(bench):
    expected = vectors("tokenization")["specials"]
    for token in OPEN_ASSISTANT.added_tokens:
        same("tokenization", bench.special[token], expected[token], token)
    same("tokenization", bench.special["bos"], expected["<s>"])
    for name in ("eos", "pad"):
        same("tokenization", bench.special[name], expected[vectors("tokenization")[f"{name}_token"]], name)
    same("tokenization", count_tokens(bench.tokenizer), vectors("tokenization")["len"])


@pytest.mark.parametrize(("name", "case"), cases("tokenization"))
def test_a_text_has_the_originals_token_ids(bench, name, case):
    same("tokenization", bench.tokenizer.encode(case["text"]).ids, case["input_ids"], name)


def test_a_text_longer_than_the_tokenizers_limit_is_not_cut(bench):
    assert len(bench.tokenizer.encode("lamp " * 9000).ids) > 9000


@pytest.mark.parametrize(("name", "case"), cases("encoding"))
def test_a_conversation_is_encoded_windowed_and_masked_like_the_original(bench, name, case):
    check_encoded(bench, "encoding", bench.talk(case["id"]), case, name)


@pytest.mark.parametrize(("name", "case"), [case for case in cases("lm") if "index_map" in case[1]])
def test_documents_are_chunked_in_code_points_like_the_originals(name, case):
    plans = [plan_chunks(len(text), case["max_chunk_size"]) for text in case["documents"]]
    spans = [[document, *span] for document, plan in enumerate(plans) for span in plan]
    same("lm", spans, case["index_map"], name)
    chunks = [case["documents"][document][begin:end] for document, begin, end in spans]
    hashes = [hashlib.sha256(chunk.encode()).hexdigest() for chunk in chunks]
    same("lm", hashes, case["chunk_sha256_utf8"], name)


@pytest.mark.parametrize(("name", "case"), cases("lm"))
def test_chunks_are_encoded_and_masked_like_the_originals(bench, name, case):
    spans = case.get("index_map") or [[number, 0, None] for number in range(len(case["documents"]))]
    for encoded in case["encoded"]:
        document, begin, end = spans[int(encoded["id"].split("[")[1].rstrip("]"))]
        check_encoded(bench, "lm", bench.text(case["documents"][document][begin:end]), encoded, name)


def check_encoded(bench, file, sequence, case, name):
    """One sequence by itself, and as a batch of one through the training collator."""
    generator = seeded(case)
    profile = published(max_length=case["max_length"], label_masking=case["label_masking"])
    shards, rows = bench.rows(
        [sequence],
        max_length=case["max_length"],
        probability=case["random_offset_probability"],
        generator=generator,
    )
    same(file, generator.random(), case["random_after"], name)
    ((piece,),) = rows
    tokens, kinds, is_document = sequence
    cut = slice(piece.begin, piece.end)
    same(file, tokens[cut], case["input_ids"], name)
    same(file, [1] * (piece.end - piece.begin), case["attention_mask"], name)
    same(file, bits(loss_mask(kinds[cut], profile)), case["label_mask"], name)
    if "batch_of_one" in case:
        batch, expected = collate(rows, shards, profile), case["batch_of_one"]
        same(file, batch.input_ids[0], expected["input_ids"], name)
        same(file, bits(batch.sources[0] >= 0), expected["attention_mask"], name)
        same(file, bits(batch.loss_mask[0]), expected["label_mask"], name)
        same(file, batch.targets[0], expected["targets"], name)
    assert is_document == (file == "lm")


def test_transformers_fast_tokenizer_gives_the_same_ids_as_the_tokenizers_library(bench):
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    for _, case in cases("tokenization") + cases("formatting"):
        same("tokenization", bench.tokenizer.encode(case["text"]).ids, fast(case["text"]).input_ids, case.get("id"))


def test_role_tokens_added_to_the_base_tokenizer_make_the_original_one(tmp_path, bench):
    base = FOLDER / "tokenizer_base"
    tokenizer, names = open_tokenizer(base), read_special_names(base)
    prepare_tokenizer(tokenizer, names, OPEN_ASSISTANT)
    write_tokenizer(tmp_path, tokenizer, names, OPEN_ASSISTANT, max_length=8192)
    same("tokenization", read_special(tmp_path, open_tokenizer(tmp_path), OPEN_ASSISTANT), bench.special)
    for _, case in cases("formatting"):
        same("tokenization", tokenizer.encode(case["text"]).ids, bench.tokenizer.encode(case["text"]).ids, case["id"])
