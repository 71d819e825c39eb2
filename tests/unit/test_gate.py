import copy
import math

import pytest

from ropeway.gate import gate
from ropeway.params import Gate

LIMITS = Gate(max_loss_increase_nats=0.01, min_gain_over_base_nats=1.0)


def measured(chat=1.4, docs=2.0, *, base=4.0, validation="rows"):
    return {
        "sources": {
            name: {"base": {"loss": base}, "tuned": {"loss": loss}} for name, loss in (("chat", chat), ("docs", docs))
        },
        "mean": {"base": base, "tuned": (chat + docs) / 2},
        "validation": validation,
    }


def test_a_first_model_passes_as_such_if_it_beats_its_base():
    verdict = gate(measured(), None, LIMITS)
    assert verdict.passed
    assert (
        verdict.lines[0]
        == "mean loss over sources: base 4.000, tuned 1.700: better by 2.300 nats, at least 1.000 asked"
    )
    assert "the first model of this name" in verdict.lines[1]
    assert not gate(measured(base=2.5), None, LIMITS).passed


@pytest.mark.parametrize(("docs", "passes"), [(1.9, True), (2.0, True), (2.009, True), (2.02, False)])
def test_each_source_may_lose_what_is_allowed_and_no_more(docs, passes):
    verdict = gate(measured(docs=docs), measured(), LIMITS, champion_name="laptop@v7")
    assert verdict.passed is passes
    assert any(line.startswith("chat: 1.400, laptop@v7 1.400: better by 0.000") for line in verdict.lines)


def test_a_gain_on_one_source_does_not_pay_for_a_loss_on_another():
    verdict = gate(measured(chat=0.5, docs=2.1), measured(), LIMITS, champion_name="laptop@v7")
    assert not verdict.passed
    assert "docs: 2.100, laptop@v7 2.000: worse by 0.100 nats, 0.010 allowed" in verdict.lines
    assert str(verdict).startswith("gate: not passed\n  mean loss")


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1.0", True])
@pytest.mark.parametrize("where", ["mean", "source"])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_a_loss_that_is_missing_or_not_finite_fails(value, where, whose):
    sides = {"ours": measured(), "theirs": measured()}
    broken = copy.deepcopy(sides[whose])
    if where == "mean":
        broken["mean"]["tuned"] = value
    else:
        broken["sources"]["docs"]["tuned"]["loss"] = value
    sides[whose] = broken
    passes = where == "mean" and whose == "theirs"  # the champion's gain over its base is not asked again
    assert gate(sides["ours"], sides["theirs"], LIMITS).passed is passes


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_a_source_that_only_one_of_them_has_fails(whose):
    sides = {"ours": measured(), "theirs": measured()}
    del sides[whose]["sources"]["docs"]
    verdict = gate(sides["ours"], sides["theirs"], LIMITS)
    assert not verdict.passed
    assert any(line.startswith("docs: ") and "unknown" in line for line in verdict.lines)


def test_losses_on_other_rows_are_not_compared():
    verdict = gate(measured(), measured(validation="others"), LIMITS)
    assert not verdict.passed
    assert "other validation rows (others…)" in verdict.lines[1]
    assert not gate(measured(validation=None), measured(validation=None), LIMITS).passed


def test_nothing_measured_is_not_a_pass():
    assert not gate({}, None, LIMITS).passed
    assert not gate({**measured(), "sources": {}}, {**measured(), "sources": {}}, LIMITS).passed
