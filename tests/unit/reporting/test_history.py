"""The rule of regressions, on values that are written down, and what a history reads of a publication."""

import json
from dataclasses import asdict

import pytest

from ropeway.reporting.history import build_history
from ropeway.reporting.history_page import describe_last, describe_rule, render_history, render_history_markdown


def versions(losses, *, rows=None, speeds=None):
    """Facts of versions with these losses, as `Artifact.describe_recent` returns them."""
    return [
        {
            "number": number,
            "digest": f"{number:064x}",
            "published_at": "2026-11-30T03:00:00+00:00",
            "aliases": [],
            "withdrawn": False,
            "promotions": [],
            "reviews": [],
            "provenance": {
                "evaluation": {"mean": {"tuned": loss}, "validation": rows[number - 1] if rows else "rows"},
                "run": {"tokens_per_second": speeds[number - 1]} if speeds else {},
            },
        }
        for number, loss in enumerate(losses, 1)
    ]


def history(*arguments, price=None, **options):
    found = versions(*arguments, **options)
    return build_history("model", "file:///registry", len(found), found, price=price)


def flagged(found):
    return [one.number for one in found.versions if one.regressions]


def test_a_value_beyond_four_spreads_of_the_median_is_a_regression_and_one_within_is_not():
    before = [2.00, 2.02, 1.98, 2.01, 1.99]  # median 2, median absolute deviation 0.01
    limit = 2.00 + 4 * 1.4826 * 0.01
    (found,) = history([*before, limit + 0.0001]).versions[-1].regressions
    assert (found.metric, found.median, found.count, found.same_rows) == ("loss", 2.0, 5, True)
    assert found.spread == pytest.approx(0.014826)
    assert flagged(history([*before, limit - 0.0001])) == []


def test_a_change_below_the_smallest_that_counts_is_none_however_equal_the_versions_are():
    assert flagged(history([2.0] * 6 + [2.019])) == []
    assert flagged(history([2.0] * 6 + [2.021])) == [7]


def test_better_is_never_a_regression_and_too_few_versions_are_no_measure():
    assert flagged(history([2.0] * 6 + [1.0])) == []
    assert flagged(history([2.0] * 3 + [9.0])) == []


def test_only_the_ten_versions_before_count():
    assert flagged(history([1.0] * 5 + [2.0] * 10 + [2.0])) == [6, 7, 8, 9, 10]


def test_losses_are_compared_on_equal_rows_where_enough_versions_have_them():
    mixed = ["a"] * 5 + ["b"] * 5
    assert flagged(history([2.0] * 5 + [3.0] * 4 + [3.0], rows=mixed)) == [6, 7, 8, 9]  # then four have rows b
    (found,) = history([2.0] * 4 + [3.0], rows=["a"] * 4 + ["b"]).versions[-1].regressions
    assert not found.same_rows
    assert "on other validation rows" in found.words


def test_a_slower_training_is_a_regression_from_a_tenth_on():
    assert flagged(history([2.0] * 6, speeds=[100, 100, 100, 100, 100, 91])) == []
    assert flagged(history([2.0] * 6, speeds=[100, 100, 100, 100, 100, 89])) == [6]


def test_the_newest_version_is_described_and_an_empty_history_is_a_page():
    assert [is_bad for is_bad, _ in describe_last(history([2.0] * 6 + [3.0]))] == [True]
    assert [is_bad for is_bad, _ in describe_last(history([2.0] * 6))] == [False]
    assert "no regression" in describe_last(history([2.0] * 6))[0][1]
    assert "no version" in render_history(history([]))
    assert "no version" in render_history_markdown(history([]))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_too_few_versions_make_no_statement_about_regressions(count):
    made = history([2.0] * count)
    assert not made.is_compared
    assert describe_rule(made) == ""
    for text in (describe_last(made)[0][1], render_history(made), render_history_markdown(made)):
        assert "regression" not in text.lower()
    assert ("<img" in render_history(made)) == (count > 1)


def test_a_metric_that_few_versions_have_is_not_compared():
    made = history([2.0] * 6, speeds=[None, None, None, 100, 100, 50])
    assert [one.compared for one in made.versions] == [()] * 4 + [("loss",)] * 2
    assert describe_rule(made)


def test_text_of_a_publication_is_escaped_in_page_and_markdown():
    found = versions([2.0] * 2)
    found[1]["reviews"] = [{"decision": "approve", "by": "<script>alert(1)</script>|x"}]
    made = build_history("model", "file:///registry", 2, found, price=None)
    assert "<script>alert" not in render_history(made)
    assert "<script>" not in render_history_markdown(made)
    assert "\\|x" in render_history_markdown(made)


@pytest.mark.parametrize(
    "damage",
    [
        {"verdict": {}},
        {"verdict": {"passed": True, "checks": [{"passed": False}]}},
        {"evaluation": [1]},
        {"run": {"train_seconds": "x", "gpus": 8}},
        {"evaluation": {"mean": {"tuned": float("nan")}}},
        {"evaluation": {"mean": {"tuned": 10**400}}},
        {"drift": {"references": [{"why": []}]}},
        {"run": {"wandb": "javascript:alert(1)"}},
    ],
)
def test_a_record_that_ropeway_did_not_write_neither_ends_the_history_nor_acts_in_its_page(damage):
    found = versions([2.0] * 6)
    found[-1]["provenance"] = {**found[-1]["provenance"], **damage}
    made = build_history("model", "file:///registry", len(found), found, price=1.0)
    assert "javascript:" not in render_history(made)
    assert "nan" not in render_history_markdown(made)
    json.dumps(asdict(made), allow_nan=False)
    assert [one.loss for one in made.versions[:-1]] == [2.0] * 5


def test_a_median_of_zero_has_no_percentage():
    (regression,) = history([0.0] * 8 + [5.0]).versions[-1].regressions
    assert "%" not in regression.words
