import copy
import functools
import math

import pytest

from ropeway.orchestration import gate as module
from ropeway.orchestration.gate import describe_change
from tests.support.gate_limits import make_limits

LIMITS = make_limits()
gate = functools.partial(module.gate, max_length=512)


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
    for figure in ("base 4.000", "tuned 1.700", "gain +2.300", "required 1.000"):
        assert figure in verdict.lines[0]
    assert "no champion" in verdict.lines[1]
    assert not gate(measured(base=2.5), None, LIMITS).passed


@pytest.mark.parametrize(("docs", "passes"), [(1.9, True), (2.0, True), (2.009, True), (2.02, False)])
def test_each_source_may_lose_what_is_allowed_and_no_more(docs, passes):
    verdict = gate(measured(docs=docs), measured(), LIMITS, champion_name="laptop@v7")
    assert verdict.passed is passes
    assert any(line.startswith("chat: 1.400, laptop@v7 1.400: +0.000") for line in verdict.lines)


def test_a_gain_on_one_source_does_not_pay_for_a_loss_on_another():
    verdict = gate(measured(chat=0.5, docs=2.1), measured(), LIMITS, champion_name="laptop@v7")
    assert not verdict.passed
    assert "docs: 2.100, laptop@v7 2.000: +0.100 nats/token, allowed +0.010" in verdict.lines
    assert str(verdict).startswith("gate: not passed\n  passed  mean loss")


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


def bytewise(chat=0.35, docs=0.5, *, tokenizer="ours", tokens=100, size=400, base=4.0):
    """As evaluate writes it: losses a token and a byte, and whose tokens they are."""
    metrics = measured(chat * size / tokens, docs * size / tokens, base=base)
    for name, loss in (("chat", chat), ("docs", docs)):
        metrics["sources"][name]["tuned"] |= {"nats_per_byte": loss, "tokens": tokens, "bytes": size}
    return {**metrics, "tokenizer": tokenizer}


NAN = math.nan
# ours, theirs (None: no champion), allowed nats/token, required gain over the base, passes, part of a line
TABLE = [
    (measured(), None, 0.01, 1.0, True, "no champion"),
    (measured(base=2.7), None, 0.01, 1.0, True, "gain +1.000 nats/token, required 1.000"),
    (measured(base=2.6), None, 0.01, 1.0, False, "gain +0.900 nats/token, required 1.000"),
    (measured(base=1.0), None, 0.01, 0.0, False, "gain -0.700 nats/token"),
    (measured(base=1.0), None, 0.01, -1.0, True, "required -1.000"),
    (measured(base=NAN), None, 0.01, 1.0, False, "base unknown, tuned 1.700"),
    (measured(), measured(), 0.0, 1.0, True, "docs: 2.000, v7 2.000: +0.000"),
    (measured(), measured(chat=1.0), 0.5, 1.0, True, "chat: 1.400, v7 1.000: +0.400 nats/token, allowed +0.500"),
    (measured(), measured(chat=1.0), 0.3, 1.0, False, "chat: 1.400, v7 1.000: +0.400 nats/token, allowed +0.300"),
    (measured(chat=0.1), measured(docs=1.9), 0.01, 1.0, False, "docs: 2.000, v7 1.900: +0.100"),
    (measured(chat=NAN), measured(), 0.01, 1.0, False, "chat: unknown, v7 1.400"),
    (measured(), measured(chat=math.inf), 0.01, 1.0, False, "chat: 1.400, v7 unknown"),
    (measured(), measured(validation="others"), 0.01, 1.0, False, "other validation rows (others…)"),
    (measured(validation=""), measured(validation=""), 0.01, 1.0, False, "other validation rows"),
    (bytewise(), bytewise(), 0.01, 1.0, True, "chat: 1.400, v7 1.400: +0.000"),
    (bytewise(), measured(), 0.01, 1.0, True, "chat: 1.400, v7 1.400"),  # an older champion does not say its tokenizer
    # 200 tokens of 2 bytes where ours has 100 of 4: half the loss a token, the same a byte.
    (bytewise(), bytewise(tokenizer="x", tokens=200), 0.01, 1.0, True, "v7 0.3500 nats/byte"),
    (bytewise(), bytewise(0.30, tokenizer="x", tokens=200), 0.01, 1.0, False, "+0.0500, allowed +0.0025"),
    (bytewise(), bytewise(0.348, tokenizer="x"), 0.01, 1.0, True, "(0.010 nats/token at 4.00 bytes/token)"),
    (bytewise(), bytewise(0.40, tokenizer="x"), 0.01, 1.0, True, "chat: 0.3500, v7 0.4000 nats/byte"),
    (bytewise(), bytewise(NAN, tokenizer="x"), 0.01, 1.0, False, "v7 unknown nats/byte"),
    (bytewise(size=0), bytewise(tokenizer="x"), 0.01, -9.0, False, "nats/byte: one is unknown"),
    (measured() | {"tokenizer": "ours"}, bytewise(tokenizer="x"), 0.01, 1.0, False, "chat: unknown, v7 0.3500"),
    (bytewise(), {**bytewise(tokenizer="x"), "sources": {}}, 0.01, 1.0, False, "v7 unknown nats/byte"),
]


@pytest.mark.parametrize(("ours", "theirs", "allowed", "asked", "passes", "says"), TABLE)
def test_the_gate_s_table(ours, theirs, allowed, asked, passes, says):
    limits = make_limits(max_loss_increase_nats=allowed, min_gain_over_base_nats=asked)
    verdict = gate(ours, theirs, limits, champion_name="v7")
    assert verdict.passed is passes, verdict
    assert any(says in line for line in verdict.lines), verdict
    assert len(verdict.lines) == (2 if theirs is None or "other validation rows" in str(verdict) else 3)


def test_the_summary_says_better_worse_the_same_or_why_not_comparable():
    ours, other = ({"validation": "rows", "mean": {"base": 8.0, "tuned": loss}} for loss in (4.5, 5.0))
    assert describe_change(ours, other, "production (laptop@v1)") == (
        "better than production (laptop@v1): mean loss 4.500, was 5.000 (-0.500 nats/token)"
    )
    assert describe_change(other, ours, "production").startswith("WORSE than production")
    assert describe_change(ours, ours, "production").startswith("the same as production")
    for champion in (None, other | {"validation": "others"}, other | {"mean": {}}, {}):
        assert describe_change(ours, champion, "production").startswith("not compar")
    assert "nats/byte" in describe_change(ours | {"tokenizer": "a"}, other | {"tokenizer": "b"}, "production")
