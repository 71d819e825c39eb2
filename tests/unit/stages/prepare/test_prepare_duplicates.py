import random
from collections import Counter

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from ropeway.data.record_identity import compared_texts, exact_keys
from ropeway.models.conversation import Conversation
from ropeway.stages.prepare.duplicates import (
    band_keys,
    find_exact,
    find_near,
    has_grams,
    plan_bands,
)
from ropeway.stages.tokenize.fingerprints import minhash_signatures

VOCABULARY = [f"word{n}" for n in range(3000)]


def made_up(seed, length=200):
    return random.Random(seed).choices(VOCABULARY, k=length)


def changed(text, share, seed):
    """The text with this share of its words replaced."""
    generator = random.Random(seed)
    return [generator.choice(VOCABULARY) if generator.random() < share else word for word in text]


def grams(text, n=5):
    return {tuple(text[at : at + n]) for at in range(len(text) - n + 1)}


def jaccard(one, other):
    return len(grams(one) & grams(other)) / len(grams(one) | grams(other))


def signed(texts):
    return minhash_signatures(
        [(text if isinstance(text, str) else " ".join(text),) for text in texts], ngram=5, permutations=128
    )


def near(texts, threshold=0.8, candidates=None):
    signatures = signed(texts)
    taking_part = has_grams(signatures) if candidates is None else candidates
    return find_near(signatures, band_keys(signatures, threshold), taking_part, threshold=threshold)


def exact(texts):
    return find_exact(exact_keys([(text,) for text in texts])).tolist()


def test_the_first_of_equal_texts_stays_whatever_their_blanks_and_normal_form():
    texts = ["café au lait", "tea", "  cafe\u0301\n au\tlait ", "Tea", "tea", "tea."]
    assert exact(texts) == [False, False, True, False, True, False]


def test_records_without_text_are_no_duplicates():
    assert exact(["", "  \n", "", "a", "a"]) == [False, False, False, False, True]


def test_turns_are_compared_apart_and_the_system_message_is_not():
    talks = [
        Conversation(("a b", "c"), "Be kind."),
        Conversation(("a", "b c")),
        Conversation(("a b", "c"), "Be brief."),
        Conversation(("a b c",)),
    ]
    keys = exact_keys([compared_texts(talk) for talk in talks])
    assert find_exact(keys).tolist() == [False, False, True, False]


@given(st.lists(st.sampled_from(["a", "b", "a ", "c\n", "", " ", "B"]), max_size=30))
def test_exactly_one_of_each_group_of_equal_texts_stays_and_it_is_the_first(texts):
    removed = exact(texts)
    folded = [" ".join(text.split()) for text in texts]
    stays = [text for text, gone in zip(folded, removed, strict=True) if not gone and text]
    assert Counter(stays) == Counter(set(folded) - {""})
    assert all(folded.index(text) < at for at, (text, gone) in enumerate(zip(folded, removed, strict=True)) if gone)


@given(st.lists(st.sampled_from("abcd"), max_size=20), st.randoms())
def test_how_many_exact_duplicates_there_are_does_not_depend_on_order(texts, generator):
    count = sum(exact(texts))
    generator.shuffle(texts)
    assert sum(exact(texts)) == count


def test_similarity_is_estimated_as_datasketch_estimates_it_and_as_it_is():
    errors, errors_of_the_reference = [], []
    for seed in range(60):
        one = made_up(seed)
        other = changed(one, seed / 600, seed + 1000)
        ours = signed([one, other])
        reference = []
        for text in (one, other):
            sketch = MinHash(num_perm=128, seed=1)
            sketch.update_batch([" ".join(gram).encode() for gram in grams(text)])
            reference.append(sketch)
        truth = jaccard(one, other)
        errors.append((ours[0] == ours[1]).mean() - truth)
        errors_of_the_reference.append(reference[0].jaccard(reference[1]) - truth)
    # One estimate of 128 permutations is off by sqrt(s (1 - s) / 128) <= 0.044 (one standard deviation).
    assert np.abs(errors).max() < 4 * 0.044
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 1.4 * np.std(errors_of_the_reference) + 0.005


def test_planted_near_duplicates_are_found_and_others_are_not():
    originals = [made_up(seed) for seed in range(150)]
    copies = [changed(text, 0.03 * (n % 6) / 5, n + 5000) for n, text in enumerate(originals)]
    halves = [text[:100] + made_up(n + 9000, 100) for n, text in enumerate(originals)]
    found = near([*originals, *halves, *copies])
    assert not found[:300].any()
    truth = np.array([jaccard(*pair) for pair in zip(originals, copies, strict=True)])
    sure = found[300:][truth >= 0.88]  # two standard deviations above
    assert len(sure) >= 70
    assert sure.mean() >= 0.97  # recall
    assert not found[300:][truth < 0.7].any()  # precision: three below
    assert found[300:][(truth >= 0.7) & (truth < 0.8)].mean() < 0.5


def test_each_near_duplicate_that_goes_has_an_earlier_one_that_stays():
    texts, chain = [], made_up(1, 300)
    for step in range(40):  # each like the one before, the ends unlike
        chain = changed(chain, 0.015, step)
        texts.append(chain)
    found = near(texts)
    estimated = signed(texts)
    assert 0 < found.sum() < len(texts) - 1
    for at in np.flatnonzero(found):
        assert any((estimated[at] == estimated[one]).mean() >= 0.8 for one in range(at) if not found[one])


def test_near_duplicates_in_another_order_leave_as_many():
    families = [[[*made_up(seed), f"end{n}"] for n in range(4)] for seed in range(20)]
    texts = [text for family in families for text in family]
    assert near(texts).sum() == 60
    random.Random(3).shuffle(texts)
    assert near(texts).sum() == 60


def test_a_bucket_of_unlike_texts_is_compared_with_more_than_its_first():
    signatures = np.arange(4 * 128, dtype=np.uint32).reshape(4, 128)
    signatures[3] = signatures[2]
    bands = np.zeros((1, 4), np.uint64)  # all in one bucket
    assert find_near(signatures, bands, np.ones(4, np.bool_), threshold=0.8).tolist() == [False, False, False, True]


def test_those_that_do_not_take_part_neither_go_nor_make_others_go():
    text = made_up(1)
    taking_part = np.array([False, True, True])
    assert near([text, text, text], candidates=taking_part).tolist() == [False, False, True]


def test_short_texts_and_texts_without_words():
    assert near(["yes", "Yes!", "no", "", "?!", ""]).tolist() == [False, True, False, False, False, False]


def test_no_records_at_all():
    assert near([]).tolist() == exact([]) == []


@settings(max_examples=15)
@given(st.integers(1, 7), st.integers(1, 64))
def test_signing_in_batches_changes_nothing(size, permutations):
    records = [(" ".join(made_up(n, 20 * (n % 3))), "Yes.") for n in range(8)]
    whole = minhash_signatures(records, ngram=5, permutations=permutations)
    parts = [
        minhash_signatures(records[at : at + size], ngram=5, permutations=permutations) for at in range(0, 8, size)
    ]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95])
def test_bands_find_just_similar_pairs_nineteen_times_in_twenty(threshold):
    bands, values = plan_bands(threshold, 128)
    assert bands * values <= 128
    assert 1 - (1 - threshold**values) ** bands >= 0.95
