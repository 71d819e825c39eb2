"""Packed rows: full, nothing lost, nothing read across a border, the same plan for the same lengths."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ropeway.config.load_params import load_profile
from ropeway.data.batches import collate, plan_epoch
from ropeway.data.packing import plan_packing, split_document, turn_starts, window_at_turns
from ropeway.data.shards import Kind, open_shards
from ropeway.models.supervised_loss import SupervisedLoss
from ropeway.runtime.errors import DataError
from tests.support.tiny_run import PACKED_BLOCK, make_run


@pytest.fixture(scope="module")
def tiny_packed(tmp_path_factory):
    """Return (model, shards, profile, plan): the tiny run, packed."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("packed")
    workspace, _ = make_run(root, block=PACKED_BLOCK)
    _, profile = load_profile(root / "params.yaml")
    shards = open_shards(workspace.data)
    model = SupervisedLoss(AutoModelForCausalLM.from_pretrained(workspace.base).eval())
    return model, shards, profile, plan_epoch(shards, profile, epoch=0)


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_piece_lands_in_exactly_one_row_that_can_hold_it(lengths):
    rows = plan_packing(lengths, capacity=64)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 64 for row in rows)
    assert plan_packing(lengths, capacity=64) == rows


@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_no_row_could_have_taken_the_longest_piece_of_a_later_one(lengths):
    """Best fit never opens a row while another has room for the piece."""
    rows = plan_packing(lengths, capacity=64)
    for earlier, later in ((a, b) for number, a in enumerate(rows) for b in rows[number + 1 :]):
        before = sum(lengths[index] for index in earlier if lengths[index] >= lengths[later[0]] and index != later[0])
        assert before + lengths[later[0]] > 64


def test_lengths_spread_like_chats_and_novels_fill_their_rows_at_8192():
    generator = np.random.default_rng(0)
    chats, novels = generator.lognormal(6.8, 0.9, 4000), generator.lognormal(7.5, 1.1, 5000)
    lengths = np.minimum(np.concatenate([chats, novels]).astype(int) + 1, 8192)
    rows = plan_packing(lengths.tolist(), capacity=8192)
    assert lengths.sum() / (len(rows) * 8192) >= 0.995


@pytest.mark.parametrize("length", [0, 9])
def test_a_piece_that_fits_no_row_is_named(length):
    with pytest.raises(DataError, match=f"piece 1 has {length} tokens, expected 1 to 8"):
        plan_packing([3, length], capacity=8)


@given(st.integers(1, 500), st.integers(1, 64))
def test_a_split_document_is_whole(length, capacity):
    spans = split_document(length, capacity=capacity)
    assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == length
    assert all(0 < end - begin <= capacity for begin, end in spans)


@given(st.lists(st.integers(1, 30), min_size=2, max_size=12), st.floats(0, 1, exclude_max=True), st.integers(5, 40))
def test_a_window_begins_and_ends_at_turns_and_fits(turns, draw, capacity):
    borders = [0, *np.cumsum(turns).tolist()]
    length = borders.pop()
    if length <= capacity:
        return
    begin, end = window_at_turns(borders, length, capacity=capacity, draw=draw)
    assert begin in borders
    assert 0 < end - begin <= capacity
    # It ends at a turn unless the one exchange is longer than a row.
    assert end in (*borders, length) or min(x for x in (*borders, length) if x > begin) > begin + capacity


def test_borders_are_where_the_prompter_begins():
    before, prompter, assistant = Kind.SYSTEM, Kind.PROMPTER, Kind.ASSISTANT
    kinds = np.array([before, before, prompter, prompter, assistant, prompter, assistant, assistant], dtype=np.uint8)
    assert turn_starts(kinds) == [0, 5]


def test_packed_losses_equal_those_of_each_sequence_alone(tiny_packed):
    model, shards, profile, plan = tiny_packed
    row = max(plan.packed, key=len)
    assert len(row) >= 3

    def losses(rows):
        batch = collate(rows, shards, profile)
        parts = ("input_ids", "position_ids", "targets", "loss_mask")
        return model(**{part: torch.from_numpy(getattr(batch, part)) for part in parts})

    with torch.no_grad():
        together, alone = losses([row]), torch.cat([losses([(piece,)]) for piece in row])
        batch = collate([row], shards, profile)
        batch.position_ids[:] = np.arange(batch.position_ids.shape[1])
        parts = ("input_ids", "position_ids", "targets", "loss_mask")
        leaking = model(**{part: torch.from_numpy(getattr(batch, part)) for part in parts})
    assert len(together) == len(alone) > 0
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert float((leaking - alone).abs().max()) > 1e-3  # what a lost border would look like


def test_the_epoch_reads_every_token_it_accounts_for(tiny_packed):
    _, shards, profile, plan = tiny_packed
    pieces = [piece for row in plan.packed for piece in row]
    assert all(sum(piece.end - piece.begin for piece in row) <= profile.max_length for row in plan.packed)
    documents = {number for number, source in enumerate(shards.sources) if source.is_document}
    read = sum(piece.end - piece.begin for piece in pieces if piece.source in documents)
    drawn = [plan.drawn_sequence(index) for index in range(len(plan.order))]
    assert read == sum(int(shards.sources[s].lengths[q]) for s, q in drawn if s in documents)
    assert {(piece.source, piece.sequence) for piece in pieces} == set(drawn)


def test_no_position_predicts_across_a_border(tiny_packed):
    _, shards, profile, plan = tiny_packed
    for row in plan.packed[:20]:
        batch = collate([row], shards, profile)
        ends = np.cumsum([piece.end - piece.begin for piece in row]) - 1
        assert not batch.loss_mask[0, ends].any()
        assert (batch.position_ids[0, np.append(0, ends[:-1] + 1)] == 0).all()
