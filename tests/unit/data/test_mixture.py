import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.config.sections import DatasetOptions
from ropeway.data.mixture import (
    count_earlier,
    draw_validation,
    epoch_count,
    plan_chunks,
    plan_order,
    rank_order,
    split_positions,
)
from ropeway.runtime.errors import DataError

sizes_and_counts = st.lists(
    st.integers(0, 40).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size))), min_size=1, max_size=4
)


@given(st.text(max_size=60), st.integers(1, 20))
def test_chunks_laid_end_to_end_are_the_document(text, size):
    chunks = [text[begin:end] for begin, end in plan_chunks(len(text), size)]
    assert "".join(chunks) == text
    assert all(0 < len(chunk) <= size for chunk in chunks)
    assert all(len(chunk) == size for chunk in chunks[:-1])


def test_a_document_is_one_chunk_when_no_size_is_stated_and_none_when_it_is_empty():
    assert plan_chunks(70000, None) == [(0, 70000)]
    assert plan_chunks(0, None) == plan_chunks(0, 5) == []


@given(st.integers(1, 300), st.floats(0, 0.95))
def test_every_entry_is_in_exactly_one_part(count, val_split):
    train, validation = split_positions(count, val_split)
    assert sorted([*train, *validation]) == list(range(count))
    assert len(validation) == int(np.ceil(val_split * count))


def test_the_validation_draw_takes_entries_once_unless_the_historic_draw_is_asked_for():
    generator = np.random.RandomState(3)
    without = draw_validation(1000, 900, generator=generator, replace=False)
    historic = draw_validation(1000, 900, generator=generator, replace=True)
    assert len(set(without)) == 900
    assert len(set(historic)) < 900


def test_a_part_within_its_limit_is_taken_whole_and_draws_nothing():
    generator = np.random.RandomState(3)
    assert draw_validation(5, 5, generator=generator, replace=False).tolist() == [0, 1, 2, 3, 4]
    assert generator.randint(1 << 30) == np.random.RandomState(3).randint(1 << 30)


def test_an_epoch_reads_the_stated_fraction_or_size():
    assert epoch_count(753048, DatasetOptions(fraction=0.25), name="x") == 188262
    assert epoch_count(10, DatasetOptions(size=4), name="x") == 4
    assert epoch_count(10, DatasetOptions(), name="x") == 10


def test_more_entries_than_there_are_name_both_numbers():
    with pytest.raises(DataError, match=r"size is 11 sequences per epoch, .* has 10.* `fraction` above 1"):
        epoch_count(10, DatasetOptions(size=11), name="x")


def test_a_fraction_above_one_counts_whole_passes_and_a_part():
    assert epoch_count(10, DatasetOptions(fraction=2.0), name="x") == 20
    assert epoch_count(10, DatasetOptions(fraction=2.3), name="x") == 23
    assert epoch_count(0, DatasetOptions(fraction=2.3), name="x") == 0


@pytest.mark.parametrize("fraction", [0.0, -1.0, float("inf"), float("nan")])
def test_a_fraction_is_finite_and_above_zero(fraction):
    with pytest.raises(ValueError, match="fraction"):
        DatasetOptions(fraction=fraction)


@given(st.integers(1, 30), st.integers(0, 100), st.integers(0, 9))
def test_repeats_are_whole_passes_and_a_part_without_repeats(size, more, seed):
    count = size + more
    order = plan_order([4, size], [4, count], seed=seed, epoch=0)
    found = Counter(index for index in order if index >= 4)
    whole, rest = divmod(count, size)
    assert found.keys() == set(range(4, 4 + size))
    assert sorted(found.values()) == [whole] * (size - rest) + [whole + 1] * rest
    assert sorted(index for index in order if index < 4) == [0, 1, 2, 3]


def test_the_repeated_part_differs_between_epochs():
    parts = [{i for i, n in Counter(plan_order([99], [150], seed=7, epoch=e)).items() if n == 2} for e in range(3)]
    assert len(set(map(frozenset, parts))) == 3


@given(st.lists(st.integers(0, 5)))
def test_earlier_draws_are_counted_as_a_walk_counts_them(order):
    seen = Counter()
    expected = [(seen[item], seen.update([item]))[0] for item in order]
    assert count_earlier(np.array(order, np.int64)).tolist() == expected


@given(sizes_and_counts, st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_an_epoch_has_the_asked_number_of_different_entries_of_each_source(pairs, seed, epoch):
    sizes, counts = zip(*pairs, strict=True)
    order = plan_order(sizes, counts, seed=seed, epoch=epoch)
    assert len(set(order)) == len(order) == sum(counts)
    borders = np.cumsum((0, *sizes))
    found = Counter(int(np.searchsorted(borders, index, side="right")) - 1 for index in order)
    assert [found[source] for source in range(len(sizes))] == list(counts)


@given(sizes_and_counts, st.integers(1, 5))
def test_the_ranks_share_an_epoch_without_overlap(pairs, world_size):
    sizes, counts = zip(*pairs, strict=True)
    order = plan_order(sizes, counts, seed=1, epoch=0)
    parts = [rank_order(order, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(index for part in parts for index in part) == sorted(order)


def test_the_next_epoch_draws_another_part_and_another_order():
    first, second = (plan_order([100], [20], seed=7, epoch=epoch) for epoch in (0, 1))
    assert first != second
    assert set(first) != set(second)


def test_drawing_leaves_the_global_generators_alone():
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global one is what must not move
    plan_order([100], [20], seed=7, epoch=0)
    split_positions(100, 0.2)
    assert random.random() == random.Random(5).random()
    assert np.random.random() == np.random.RandomState(5).random_sample()  # noqa: NPY002
