import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ropeway.data.batches import collate, plan_epoch
from ropeway.data.shards import open_shards
from ropeway.models.tokenizer import open_tokenizer
from ropeway.reporting.token_view import TextKind, Vocabulary, next_token, read_piece, read_whole, split_visible
from tests.support.prepared_run import make_prepared, reckon_supervised
from tests.support.tiny_run import PARITY


@pytest.fixture(scope="module")
def llama():
    return open_tokenizer(PARITY / "tokenizer")


def test_a_llama_tokens_blank_is_a_blank_and_a_special_token_is_marked(llama):
    shown = list(Vocabulary(llama).show(llama.encode("so it is</s>").ids))
    assert "".join(one.text for one in shown) == "<s> so it is</s>"
    assert [one.text for one in shown if one.is_special] == ["<s>", "</s>"]


def test_bytes_show_as_hex_and_the_last_one_names_the_character(llama):
    ids = llama.encode("a😀😀").ids
    shown = [one for one in Vocabulary(llama).show(ids) if one.is_bytes]
    assert [(one.text, one.completes) for one in shown] == [("F0", ""), ("9F", ""), ("98", ""), ("80", "😀")] * 2


def test_lone_bytes_complete_nothing_and_do_not_spoil_what_follows(llama):
    lone, start = (llama.token_to_id(f"<0x{byte:02X}>") for byte in (0x80, 0xF0))
    word = llama.encode("so").ids[1:]
    shown = list(Vocabulary(llama).show([lone, start, *word, *llama.encode("😀").ids[-4:]]))
    assert [one.text for one in shown[:2]] == ["80", "F0"]
    assert {one.completes for one in shown[:-1]} == {""}
    assert shown[-1].completes == "😀"


def test_a_byte_level_vocabulary_is_read_through_its_alphabet():
    vocab = {"Ġso": 0, "Ċ": 1, "ðŁĺ": 2, "Ģ": 3, "Ã©": 4}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    shown = list(Vocabulary(tokenizer).show(range(5)))
    assert [one.text for one in shown] == [" so", "\n", "F0 9F 98", "80", "é"]
    assert shown[3].completes == "😀"


def test_nothing_that_turns_text_around_or_commands_a_terminal_stays_itself():
    parts = split_visible("a\u202eb\x1b[2J\u200b\x00\u00a0 \n\té")
    assert [part for sort, part in parts if sort is TextKind.CODE] == ["U+202E", "U+001B", "U+200B", "U+0000", "U+00A0"]
    assert [part for _, part in parts][-4:] == ["·", "⏎", "⇥", "é"]


@pytest.mark.parametrize("what_counts", ["published", "answers"])
def test_a_whole_sequence_is_learned_where_a_reckoning_from_roles_says_so(tmp_path, what_counts):
    workspace, profile = make_prepared(tmp_path, what_counts=what_counts)
    shards = open_shards(workspace.data)
    for number, source in enumerate(shards.sources):
        for sequence in range(len(source.lengths)):
            reading = read_whole(number, sequence, shards, profile)
            expected = reckon_supervised(reading.tokens.tolist(), what_counts=what_counts, document=source.is_document)
            assert reading.supervised_mask.tolist() == expected


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("document_end", ["masked", "eos"])
def test_what_is_shown_as_learned_is_what_training_counts(tmp_path, layout, document_end):
    workspace, profile = make_prepared(tmp_path, layout=layout, document_end=document_end)
    shards = open_shards(workspace.data)
    vocabulary = Vocabulary(open_tokenizer(workspace.base))
    plan = plan_epoch(shards, profile, epoch=0)
    behind = 0
    for index in range(plan.rows):
        row = plan.row(index)
        batch = collate([row], shards, profile)
        at = 0
        for piece in row:
            reading = read_piece(piece, shards, profile)
            end = at + len(reading.tokens)
            assert np.array_equal(batch.input_ids[0, at:end], reading.tokens)
            assert np.array_equal(batch.loss_mask[0, at : end - 1], reading.supervised_mask[1:])
            assert not reading.supervised_mask[0]
            assert reading.next_is_supervised == batch.loss_mask[0, end - 1]
            shown = next_token(reading, shards, profile, vocabulary)
            assert shown == ("</s>" if reading.next_is_supervised else None)
            assert reading.supervised == batch.loss_mask[0, at:end].sum()
            behind += reading.next_is_supervised
            at = end
    assert (behind > 0) == (document_end == "eos")
