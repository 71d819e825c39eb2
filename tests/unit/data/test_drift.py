"""Drift: measures with values that were computed by hand, and what is flagged."""

import copy
import math
import random
from itertools import pairwise

import numpy as np
import pytest

from ropeway.config.sections import DriftLimits
from ropeway.data.drift import (
    compare_profiles,
    flag,
    jensen_shannon,
    population_stability,
    sampling_noise,
    share_seen,
)
from tests.support.data_profiles import profile_texts

LIMITS = DriftLimits(
    max_psi=0.25, max_js_divergence=0.1, max_share_change=0.1, max_size_ratio=3.0, min_seen_share=None, window=5
)
ENGLISH = [f"the lamp number {n} is lit and the sea is calm" for n in range(400)]
RUSSIAN = [f"лампа номер {n + 1000} горит сегодня и море спокойно весь день до вечера и ночью тоже" for n in range(400)]


def counts(*values):
    return np.asarray(values, np.float64)


def measured(old, new, limits=LIMITS):
    return {one.name: one for one in compare_profiles(old, new, limits)}


def test_psi_of_shares_is_the_sum_that_was_computed_by_hand():
    # (0.4 - 0.5) ln(0.4 / 0.5) + (0.6 - 0.5) ln(0.6 / 0.5) = 0.0223144 + 0.0182322
    assert population_stability(counts(50, 50), counts(4, 6)) == pytest.approx(0.0405465, abs=1e-7)
    # An empty part counts as 0.0001, with 10 values as half of one, 0.05.
    # (0.0001 - 0.5) ln(0.0001 / 0.5) + (1 - 0.5) ln(1 / 0.5)
    assert population_stability(counts(1, 1), counts(0, 2)) == pytest.approx(0.4999 * 8.5171932 + 0.3465736, abs=1e-6)
    by_hand = 0.45 * 2.3025851 + 0.3465736
    assert population_stability(counts(1, 1), counts(0, 2), values=10) == pytest.approx(by_hand, abs=1e-6)


def test_the_divergence_of_shares_is_the_sum_that_was_computed_by_hand():
    # p = (1, 0), q = (0.5, 0.5), m = (0.75, 0.25): (log2(1 / 0.75) + 0.5 log2(0.5 / 0.75) + 0.5 log2(0.5 / 0.25)) / 2
    assert jensen_shannon(counts(8, 0), counts(3, 3)) == pytest.approx(0.3112781, abs=1e-7)
    assert jensen_shannon(counts(5, 0), counts(0, 7)) == 1.0


def test_equal_shares_of_different_totals_are_exactly_0():
    assert population_stability(counts(1, 2, 0), counts(3, 6, 0)) == 0.0
    assert jensen_shannon(counts(1, 2, 0), counts(3, 6, 0)) == 0.0


def test_the_same_data_has_a_drift_of_exactly_0_everywhere():
    found = measured(profile_texts(ENGLISH, turns=[2, 4, 4]), profile_texts(ENGLISH, turns=[2, 4, 4]))
    for one in found.values():
        assert one.psi in (None, 0.0)
        assert one.js in (None, 0.0)
        assert one.kind == "seen" or one.old == one.new
        assert not one.exceeds
    assert found["record texts seen in the earlier version"].new == 1.0


@pytest.mark.parametrize("count", [8, 400], ids=["few records", "many records"])
def test_disjoint_data_is_flagged_by_script_tokens_and_text(count):
    limits = LIMITS.model_copy(update={"min_seen_share": 0.1})
    found = measured(profile_texts(ENGLISH[:count]), profile_texts(RUSSIAN[:count]), limits)
    assert found["record texts seen in the earlier version"].new == 0.0
    flagged = {name for name, one in found.items() if one.exceeds}
    wanted = {"scripts of the text", "tokens of the vocabulary", "record texts seen in the earlier version"}
    assert wanted <= flagged
    assert ("cyrillic", 0.0) in {part[:2] for part in found["scripts of the text"].largest}


def test_two_samples_of_one_source_are_not_flagged_however_few_records_they_have():
    drawn = random.Random(5)
    words = [f"w{n}" for n in range(300)]
    for count in (20, 60, 400):
        old, new = (
            profile_texts([" ".join(drawn.choices(words, k=drawn.randrange(1, 60))) for _ in range(count)])
            for _ in range(2)
        )
        assert [name for name, one in measured(old, new).items() if one.exceeds] == []


def test_sampling_noise_is_the_99_percent_quantile_of_chi_squared():
    assert sampling_noise(1000, 1000, 11) == pytest.approx(23.209 * 2 / 1000, rel=2e-3)  # 10 degrees of freedom
    assert sampling_noise(1000, 1000, 1) == 0.0


def test_a_distribution_that_only_one_version_has_is_flagged_and_one_that_neither_has_is_noted():
    found = measured(profile_texts(ENGLISH), profile_texts(ENGLISH, turns=[2] * 50))
    assert found["turns per conversation"].exceeds
    assert (found["roles of messages"].psi, found["roles of messages"].js) == (None, None)
    assert not found["roles of messages"].exceeds


def test_shares_and_sizes_are_flagged_above_their_limit_and_not_at_it():
    old = profile_texts(ENGLISH, duplicates=40)
    at, above = (measured(old, profile_texts(ENGLISH, duplicates=count))["exact duplicates"] for count in (80, 84))
    assert not at.exceeds
    assert above.exceeds
    third, less = (measured(profile_texts(ENGLISH[:300]), profile_texts(ENGLISH[:n]))["records"] for n in (100, 99))
    assert not third.exceeds
    assert less.exceeds


def test_tokens_of_different_tokenizers_are_not_compared_and_that_is_said():
    one = measured(profile_texts(ENGLISH), profile_texts(ENGLISH, tokenizer="other"))["tokens of the vocabulary"]
    assert (one.psi, one.js, one.exceeds) == (None, None, ())
    assert "tokenizers differ" in one.note


def test_null_limits_flag_nothing():
    off = DriftLimits(
        max_psi=None, max_js_divergence=None, max_share_change=None, max_size_ratio=None, min_seen_share=None, window=1
    )
    for one in compare_profiles(profile_texts(ENGLISH), profile_texts(RUSSIAN[:3]), None):
        assert not one.exceeds
        assert not flag(one, off).exceeds


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_the_share_of_texts_seen_before_is_estimated_within_its_error(overlap):
    drawn = random.Random(1)
    old = {drawn.randrange(1 << 62) for _ in range(20_000)}
    kept = set(drawn.sample(sorted(old), int(50_000 * min(overlap, 0.4))))
    new = kept | {drawn.randrange(1 << 62) for _ in range(50_000 - len(kept))}
    sketches = [[f"{one:016x}" for one in sorted(side)[:1024]] for side in (old, new)]
    share, sample = share_seen(*sketches, most=1024)
    right = len(kept) / len(new)
    assert abs(share - right) < 4 * math.sqrt(max(right * (1 - right), 0.01) / sample)


def test_a_profile_of_another_format_or_without_a_key_is_refused():
    good = profile_texts(ENGLISH)
    with pytest.raises(ValueError, match="format"):
        compare_profiles({**good, "format": 2}, good, LIMITS)
    with pytest.raises(ValueError, match="KeyError"):
        compare_profiles({**good, "all": {}}, good, LIMITS)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1, 10**400])
def test_a_number_that_is_no_count_is_refused_and_not_taken_for_no_drift(wrong):
    good = profile_texts(["one text", "another text"])
    bad = copy.deepcopy(good)
    place = bad["all"]
    key = next(key for key, value in place.items() if isinstance(value, int) and key != "format")
    place[key] = wrong
    for old, new in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="is not a count"):
            measured(old, new)


def test_a_slow_shift_is_below_the_limit_from_one_version_to_the_next_and_above_it_from_first_to_last():
    versions = []
    for step in range(5):
        russian = 60 + step * 60
        versions.append(profile_texts(ENGLISH[: 400 - russian] + RUSSIAN[:russian]))
    for old, new in pairwise(versions):
        assert not measured(old, new)["scripts of the text"].exceeds
    assert measured(versions[0], versions[-1])["scripts of the text"].exceeds
