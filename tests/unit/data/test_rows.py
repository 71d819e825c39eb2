import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.config.load_params import load_profile
from ropeway.config.sections import DatasetOptions
from ropeway.data.batches import Piece, collate, locate, plan_epoch, plan_window, validation_rows, window_generator
from ropeway.data.loss_mask import loss_mask, loss_masks
from ropeway.data.shards import FORMAT, Kind, Shards, SourceShards
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.stages.tokenize.encode import document_kinds
from tests.support.tiny_run import ROOT

BOS, EOS, PROMPTER, ASSISTANT, SYSTEM = 1, 2, 90, 91, 92
ROLE_IDS = dict(zip(OPEN_ASSISTANT.added_tokens, (PROMPTER, ASSISTANT), strict=False))
# BOS <system> s </s> <prompter> q q </s> <assistant> a a </s>
TALK = np.array([BOS, SYSTEM, 10, EOS, PROMPTER, 20, 21, EOS, ASSISTANT, 30, 31, EOS])


_, PUBLISHED = load_profile(ROOT / "params.yaml", "llama2_13b_orca_8k")
OPTIONS = [{"talk": DatasetOptions()}, {"text": DatasetOptions()}]


def profile(**changes):
    return PUBLISHED.model_copy(update={"datasets": OPTIONS, "max_length": 16, "global_batch_size": 4, **changes})


class Held(SourceShards):
    """A source held in memory."""

    def read(self, sequence):
        return self.folder[sequence]


def held(name, kind, sequences):
    lengths = np.array([len(tokens) for tokens, _ in sequences], np.int32)
    everything = np.arange(len(sequences))
    return Held(name, kind, sequences, (len(sequences),), lengths, everything, everything)


def talk_of(length, start=100):
    tokens = np.concatenate([TALK, np.arange(start, start + max(length - len(TALK), 0))])[:length]
    return tokens, OPEN_ASSISTANT.speakers(tokens, ids=ROLE_IDS)


def text_of(length, *, is_last=True):
    return np.concatenate([[BOS], np.arange(50, 49 + length)]), document_kinds(length, is_last=is_last)


def shards_of(talks=(), texts=()):
    sources = (held("talk", "conversation", list(talks)), held("text", "document", list(texts)))
    return Shards(sources, {"format": FORMAT, "special": {"bos": BOS, "eos": EOS, "pad": EOS}})


def mask_of(tokens, **changes):
    kinds = OPEN_ASSISTANT.speakers(tokens, ids=ROLE_IDS)
    return "".join("01"[bit] for bit in loss_mask(kinds, profile(**changes)).astype(int))


def test_the_published_mask_learns_all_but_the_prompters_turns():
    #                     B S s / P q q / A a a /
    assert mask_of(TALK) == "111100001110"


def test_answers_alone_are_learned_with_their_end_when_asked_for():
    """The mask covers what predicts the answer and its end; the end token predicts the next sequence, so is masked."""
    assert mask_of(TALK, what_counts="answers") == "000000001110"
    again = np.concatenate([TALK, [PROMPTER, 40, EOS, ASSISTANT, 50, EOS]])
    assert mask_of(again, what_counts="answers") == "000000001110000110"
    assert mask_of(again) == "111100001111000110"


def test_without_label_masking_everything_but_the_last_token_is_learned():
    assert mask_of(TALK, label_masking=False) == "1" * 11 + "0"


def test_turns_are_counted_not_read_as_in_the_original():
    swapped = np.where(TALK == PROMPTER, ASSISTANT, np.where(TALK == ASSISTANT, PROMPTER, TALK))
    assert mask_of(swapped) == mask_of(TALK)
    stray = np.insert(TALK, 6, ASSISTANT)  # a role token's string in a text moves everything after it
    assert mask_of(stray) == "1111001110000"


@given(st.lists(st.sampled_from([BOS, EOS, PROMPTER, ASSISTANT, SYSTEM, 10, 11]), min_size=1, max_size=40))
def test_the_published_mask_is_the_originals_formula_on_any_tokens(tokens):
    index, expected = -1, []
    for token in tokens:  # Source: Open-Assistant's dialogue collator
        index += token in (PROMPTER, ASSISTANT)
        expected.append(index % 2 == 1)
    expected[-1] = False
    assert mask_of(np.array(tokens)) == "".join("01"[bit] for bit in expected)


@given(st.integers(1, 60), st.integers(0, 59), st.integers(1, 20))
def test_answers_are_a_part_of_what_is_published(length, begin, width):
    kinds = talk_of(length)[1][begin : begin + width]
    if not len(kinds):
        return
    published, answers = (loss_mask(kinds, profile(what_counts=what)) for what in ("published", "answers"))
    assert not (answers & ~published).any()
    assert not published[-1]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=8),
    st.sampled_from(["masked", "eos", "published"]),
    st.sampled_from(["published", "answers"]),
    st.booleans(),
)
def test_masks_of_many_sequences_are_those_of_each(sequences, document_end, what_counts, label_masking):
    options = profile(document_end=document_end, what_counts=what_counts, label_masking=label_masking)
    parts = [talk_of(n)[1] if is_talk else document_kinds(n, is_last=n % 2 == 0) for is_talk, n in sequences]
    kinds = np.concatenate([np.empty(0, np.uint8), *parts])
    together = loss_masks(kinds, np.array([len(part) for part in parts], dtype=np.int64), options)
    alone = [bit for part in parts for bit in loss_mask(part, options)]
    assert together.tolist() == alone


@pytest.mark.parametrize(
    ("document_end", "target", "counts"), [("masked", EOS, False), ("eos", EOS, True), ("published", EOS, True)]
)
def test_a_documents_last_token_counts_as_params_say(document_end, target, counts):
    batch = collate([(Piece(1, 0, 0, 5),)], shards_of(texts=[text_of(5)]), profile(document_end=document_end))
    assert batch.targets[0, 4] == target
    assert batch.loss_mask[0].tolist() == [True] * 4 + [counts] + [False] * 11


@pytest.mark.parametrize(
    ("document_end", "target", "counts"), [("masked", BOS, 0), ("eos", EOS, 1), ("published", BOS, 1)]
)
def test_a_full_rows_last_target_wraps_only_as_published(document_end, target, counts):
    batch = collate([(Piece(1, 0, 0, 16),)], shards_of(texts=[text_of(16)]), profile(document_end=document_end))
    assert batch.targets[0, 15] == target
    assert batch.loss_mask[0].sum() == 15 + counts


def test_a_chunk_in_the_middle_of_a_document_does_not_end_it():
    batch = collate([(Piece(1, 0, 0, 5),)], shards_of(texts=[text_of(5, is_last=False)]), profile(document_end="eos"))
    assert batch.loss_mask[0].tolist() == [True] * 4 + [False] * 12


def test_a_cut_document_does_not_end_where_it_is_cut():
    batch = collate([(Piece(1, 0, 0, 5),)], shards_of(texts=[text_of(9)]), profile(document_end="eos"))
    assert batch.loss_mask[0].tolist() == [True] * 4 + [False] * 12


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), min_size=1, max_size=4), st.sampled_from([None, 16]))
def test_a_batch_holds_its_rows_and_padding_on_the_right_and_nothing_else(wanted, multiple):
    talks = [talk_of(length) for is_text, length in wanted if not is_text]
    texts = [text_of(length) for is_text, length in wanted if is_text]
    shards, seen, rows = shards_of(talks, texts), [0, 0], []
    for is_text, length in wanted:
        rows.append((Piece(int(is_text), seen[is_text], 0, length),))
        seen[is_text] += 1
    batch = collate(rows, shards, profile(), pad_to_multiple_of=multiple)
    longest = max(length for _, length in wanted)
    width = longest if multiple is None else -(-longest // 16) * 16
    assert batch.input_ids.shape == (len(rows), width)
    for number, ((piece,), (is_text, length)) in enumerate(zip(rows, wanted, strict=True)):
        tokens, kinds = shards.sources[int(is_text)].read(piece.sequence)
        assert batch.input_ids[number].tolist() == [*tokens, *[EOS] * (width - length)]
        assert batch.sources[number].tolist() == [int(is_text)] * length + [-1] * (width - length)
        assert batch.targets[number].tolist() == [*batch.input_ids[number, 1:], batch.input_ids[number, 0]]
        assert batch.position_ids[number].tolist() == list(range(width))
        assert batch.loss_mask[number].tolist() == [*loss_mask(kinds, profile()), *[False] * (width - length)]


def test_pieces_of_one_row_start_their_positions_again_and_do_not_teach_each_other():
    shards = shards_of([talk_of(12)], [text_of(4)])
    batch = collate([(Piece(1, 0, 0, 4), Piece(0, 0, 0, 12))], shards, profile())
    assert batch.position_ids[0].tolist() == [*range(4), *range(12)]
    assert batch.sources[0].tolist() == [1] * 4 + [0] * 12
    assert batch.loss_mask[0].tolist() == [True] * 3 + [False] + loss_mask(talk_of(12)[1], profile()).tolist()


@given(st.integers(1, 60), st.integers(1, 30), st.floats(0, 1), st.booleans(), st.integers(0, 99))
def test_a_window_lies_inside_and_is_as_long_as_it_can_be(length, max_length, probability, is_document, seed):
    options = {"max_length": max_length, "probability": probability, "is_document": is_document}
    begin, end = plan_window(length, generator=random.Random(seed), **options)
    assert 0 <= begin < end <= length
    assert end - begin == min(length, max_length)
    if is_document or probability == 0:
        assert begin == 0


@pytest.mark.parametrize(
    ("length", "is_document", "draws"), [(9, False, 1), (9, True, 1), (30, True, 1), (30, False, 2)]
)
def test_a_number_is_drawn_for_every_sequence_and_a_second_for_a_window(length, is_document, draws):
    ours, followed = random.Random(4), random.Random(4)
    plan_window(length, max_length=16, probability=1.0, generator=ours, is_document=is_document)
    followed.random()
    if draws == 2:
        followed.randint(0, length - 16)
    assert ours.random() == followed.random()


def test_every_offset_of_an_over_long_conversation_is_drawn():
    found = {
        plan_window(20, max_length=16, probability=1.0, generator=random.Random(seed), is_document=False)
        for seed in range(200)
    }
    assert found == {(begin, begin + 16) for begin in range(5)}


def test_a_window_keeps_who_said_what_in_the_whole_conversation():
    shards = shards_of([talk_of(12)])
    batch = collate([(Piece(0, 0, 5, 12),)], shards, profile(max_length=7), pad_to_multiple_of=None)
    #                                        q      q      /      A     a     a     /
    assert batch.loss_mask[0].tolist() == [False, False, False, True, True, True, False]


def test_a_window_depends_on_its_sequence_and_epoch_and_on_nothing_before_it():
    draws = {(epoch, n): window_generator(7, epoch, "talk", n).random() for epoch in range(2) for n in range(9)}
    assert len(set(draws.values())) == 18
    assert window_generator(7, 1, "talk", 3).random() == draws[1, 3]
    assert window_generator(8, 1, "talk", 3).random() != draws[1, 3]
    assert window_generator(7, 1, "text", 3).random() != draws[1, 3]
    assert window_generator(7, 1, "talk", 3, 0).random() == draws[1, 3]
    assert window_generator(7, 1, "talk", 3, 1).random() not in draws.values()


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_repeats_of_an_over_long_conversation_have_windows_of_their_own(layout):
    talk = [np.tile(part, 9) for part in talk_of(12)]
    shards = shards_of([talk] * 10)
    options = [{"talk": DatasetOptions(fraction=3.0)}, OPTIONS[1]]
    chosen = profile(layout=layout, datasets=options, random_offset_probability=1.0, document_end="masked")
    plan, again = (plan_epoch(shards, chosen, epoch=0) for _ in range(2))
    begins = {}
    for row in map(plan.row, range(plan.rows)):
        for piece in row:
            begins.setdefault(piece.sequence, []).append(piece.begin)
    assert {sequence: len(found) for sequence, found in begins.items()} == dict.fromkeys(range(10), 3)
    assert sum(len(set(found)) for found in begins.values()) > 20
    assert [again.row(at) for at in reversed(range(plan.rows))] == [plan.row(at) for at in reversed(range(plan.rows))]


def test_rows_of_a_plan_are_the_same_in_any_order_and_on_a_second_asking():
    shards = shards_of([talk_of(length) for length in range(8, 40)], [text_of(length) for length in range(3, 30)])
    plan = plan_epoch(shards, profile(random_offset_probability=1.0), epoch=1)
    forward = [plan.row(index) for index in range(plan.rows)]
    backward = [plan.row(index) for index in reversed(range(plan.rows))]
    assert forward == backward[::-1]
    assert plan.rows == 59
    assert plan.steps == 14
    assert plan.digest == plan_epoch(shards, profile(), epoch=1).digest
    assert plan.digest != plan_epoch(shards, profile(), epoch=2).digest


def test_validation_rows_are_cut_and_never_windowed():
    shards = shards_of([talk_of(40)], [text_of(5)])
    rows = dict(validation_rows(shards, profile(random_offset_probability=1.0)))
    assert rows == {"talk": [(Piece(0, 0, 0, 16),)], "text": [(Piece(1, 0, 0, 5),)]}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.data())
def test_an_index_is_found_in_its_source(sizes, data):
    total = sum(sizes)
    if total == 0:
        return
    index = data.draw(st.integers(0, total - 1))
    source, position = locate(sizes, index)
    assert sum(sizes[:source]) + position == index
    assert position < sizes[source]
    with pytest.raises(IndexError):
        locate(sizes, total)


def test_kinds_keep_their_numbers_in_data_on_disk():
    assert [kind.value for kind in Kind] == [0, 1, 2, 3, 4, 5, 6]
