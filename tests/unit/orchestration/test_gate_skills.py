"""The gate sees what users notice: accuracy, loss at long range, passkeys and tasks, each with its limit."""

import copy
import math

import pytest

from ropeway.orchestration.gate import gate, sections_to_measure
from tests.support.gate_limits import make_limits

NAN = math.nan
SECTIONS = ("positions", "passkey", "long_context", "tasks")
SKILLS = {
    "max_accuracy_decrease": 0.01,
    "max_position_loss_increase_nats": 0.05,
    "max_passkey_decrease": 0.1,
    "max_long_context_decrease": 0.2,
    "max_task_decrease_errors": 2.0,
}
# Key of the gate -> where eval.json has the value of the tuned model, and a part of its name in the verdict.
PLACES = {
    "max_accuracy_decrease": (("sources", "docs", "tuned", "accuracy"), "docs, accuracy"),
    "max_position_loss_increase_nats": (("positions", "beyond", "tuned"), "loss beyond max_length"),
    "max_passkey_decrease": (("passkey", "tuned", "by_length", "512"), "passkeys at 512 tokens"),
    "max_long_context_decrease": (("long_context", "tuned", "by_kind", "multi_key", "512"), "multi_key at 512 tokens"),
    "max_task_decrease_errors": (("tasks", "quiz", "tuned", "acc"), "quiz, acc"),
}


def evaluated(**changes):
    """An eval.json of a model that can do everything; `changes`: path with dots -> value."""
    report = {
        "sources": {"docs": {"base": {"loss": 4.0, "accuracy": 0.1}, "tuned": {"loss": 2.0, "accuracy": 0.5}}},
        "mean": {"base": 4.0, "tuned": 2.0},
        "validation": "rows",
        "tokenizer": "tokens",
        "positions": {"beyond": {"base": 6.0, "base_unscaled": 9.0, "tuned": 3.0, "tuned_unscaled": 8.0}},
        "passkey": {
            "base": {"by_length": {"128": 0.5, "512": 0.5, "768": 0.0}},
            "tuned": {"by_length": {"128": 1.0, "512": 1.0, "768": 0.5}},
        },
        "long_context": {
            model: {"by_kind": {kind: {"128": share, "512": share} for kind in ("multi_key", "common_words")}}
            for model, share in (("base", 0.1), ("tuned", 0.8))
        },
        "tasks": {
            "quiz": {
                "version": "1.0",
                "shots": 0,
                "n": 100,
                "lower_is_better": ["bits"],
                "base": {"acc": 0.2, "acc_stderr": 0.03, "bits": 1.0},
                "tuned": {"acc": 0.6, "acc_stderr": 0.03, "bits": 0.8},
            }
        },
        "identities": {"positions": "p", "passkey": "k", "long_context": "l", "tasks": "t"},
    }
    for path, value in changes.items():
        put(report, path.split("."), value)
    return report


def put(report, keys, value):
    *parents, last = keys
    for key in parents:
        report = report[key]
    if value is None:
        del report[last]
    else:
        report[last] = value


def judge(ours, theirs, *, max_length=512, **limits):
    return gate(ours, theirs, make_limits(**limits), max_length=max_length, champion_name="v7")


def test_a_run_that_lost_nothing_passes_and_every_metric_is_named_with_its_limit():
    verdict = judge(evaluated(), evaluated(), **SKILLS)
    assert verdict.passed, verdict
    assert verdict.failed == ()
    for line in (
        "docs, accuracy: 0.500, v7 0.500: +0.000, allowed -0.010",
        "loss beyond max_length: 3.000, v7 3.000: +0.000 nats/token, allowed +0.050",
        "passkeys at 128 tokens: 1.000, v7 1.000: +0.000, allowed -0.100",
        "passkeys at 512 tokens: 1.000, v7 1.000: +0.000, allowed -0.100",
        "multi_key at 128 tokens: 0.800, v7 0.800: +0.000, allowed -0.200",
        "common_words at 512 tokens: 0.800, v7 0.800: +0.000, allowed -0.200",
        "quiz, acc: 0.600, v7 0.600: +0.000, allowed -0.085 (2 standard errors of 0.042)",
        "quiz, bits: 0.800, v7 0.800: +0.000, allowed +0.000 (no standard error)",
    ):
        assert line in verdict.lines


def test_a_lower_loss_does_not_pay_for_a_lost_long_context():
    lost = evaluated(**{"sources.docs.tuned.loss": 1.0, "mean.tuned": 1.0, "passkey.tuned.by_length.512": 0.0})
    assert judge(lost, evaluated()).passed  # the losses alone do not show it
    verdict = judge(lost, evaluated(), **SKILLS)
    assert not verdict.passed
    assert verdict.failed == ("passkeys at 512 tokens: 0.000, v7 1.000: -1.000, allowed -0.100",)
    assert "  FAILED  passkeys at 512 tokens" in str(verdict)


def test_a_length_is_compared_by_itself_and_only_up_to_the_trained_one():
    ours = evaluated(**{"passkey.tuned.by_length.768": 0.0})
    assert judge(ours, evaluated(), max_passkey_decrease=0.1).passed
    assert not judge(ours, evaluated(), max_length=768, max_passkey_decrease=0.1).passed
    many = {f"passkey.tuned.by_length.{length}": 1.0 for length in range(129, 229)}
    lost = evaluated(**many, **{"passkey.tuned.by_length.512": 0.8})  # 0.002 in the mean of 102 lengths
    assert not judge(lost, evaluated(**many), max_passkey_decrease=0.1).passed


def test_a_lost_task_fails_where_no_loss_shows_it():
    lost = evaluated(**{"tasks.quiz.tuned.acc": 0.4})
    assert judge(lost, evaluated()).passed
    (line,) = judge(lost, evaluated(), **SKILLS).failed
    assert line == "quiz, acc: 0.400, v7 0.600: -0.200, allowed -0.085 (2 standard errors of 0.042)"


ERROR = math.hypot(0.03, 0.03)
EDGES = [
    ("max_accuracy_decrease", 0.01, 0.49, True),
    ("max_accuracy_decrease", 0.01, 0.4899, False),
    ("max_accuracy_decrease", 0.0, 0.5, True),
    ("max_accuracy_decrease", 0.0, 0.499999, False),
    ("max_position_loss_increase_nats", 0.05, 3.05, True),
    ("max_position_loss_increase_nats", 0.05, 3.0501, False),
    ("max_position_loss_increase_nats", 0.0, 2.9, True),
    ("max_passkey_decrease", 0.3, 0.7, True),
    ("max_passkey_decrease", 0.3, 0.65, False),
    ("max_long_context_decrease", 0.2, 0.6, True),
    ("max_long_context_decrease", 0.2, 0.59, False),
    ("max_task_decrease_errors", 2.0, 0.6 - 2 * ERROR, True),
    ("max_task_decrease_errors", 2.0, 0.6 - 2 * ERROR - 1e-4, False),
    ("max_task_decrease_errors", 0.0, 0.6, True),
    ("max_task_decrease_errors", 0.0, 0.59, False),
]


@pytest.mark.parametrize(("key", "limit", "value", "passes"), EDGES)
def test_a_change_of_the_limit_passes_and_more_does_not(key, limit, value, passes):
    keys, name = PLACES[key]
    ours = evaluated(**{".".join(keys): value})
    verdict = judge(ours, evaluated(), **{key: limit})
    assert verdict.passed is passes, verdict
    assert [line for line in verdict.failed if not line.startswith(name)] == []
    assert judge(ours, evaluated()).passed  # null: not checked


@pytest.mark.parametrize("value", [NAN, math.inf, "1.0", True])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("key", SKILLS)
def test_a_value_that_is_not_finite_fails_and_is_named(key, whose, value):
    keys, name = PLACES[key]
    sides = {"ours": evaluated(), "theirs": evaluated()}
    put(sides[whose], keys, value)
    verdict = judge(sides["ours"], sides["theirs"], **SKILLS)
    (line,) = verdict.failed
    assert line.startswith(f"{name}: ")
    assert "unknown" in line


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("key", SKILLS)
def test_a_value_that_only_one_of_them_has_fails(key, whose):
    keys, name = PLACES[key]
    sides = {"ours": evaluated(), "theirs": evaluated()}
    put(sides[whose], keys, None)
    (line,) = judge(sides["ours"], sides["theirs"], **SKILLS).failed
    assert line.startswith(f"{name}: ")
    assert "unknown" in line


@pytest.mark.parametrize("section", SECTIONS)
def test_an_older_champion_without_a_section_fails_with_what_to_do(section):
    champion = evaluated(**{section: None, f"identities.{section}": None})
    (line,) = judge(evaluated(), champion, **SKILLS).failed
    for words in ("v7 was not evaluated on", "log of publish", "null"):
        assert words in line


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_of_other_questions_is_not_compared(section):
    champion = evaluated(**{f"identities.{section}": "others"})
    (line,) = judge(evaluated(), champion, **SKILLS).failed
    assert "v7 was not evaluated on" in line
    assert sections_to_measure(evaluated(), champion, make_limits(**SKILLS)).keys() == {section}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_model_that_no_longer_measures_what_its_champion_has_fails(section):
    ours = evaluated(**{section: None, f"identities.{section}": None})
    verdict = judge(ours, evaluated(), **SKILLS)
    (line,) = verdict.failed
    assert "evaluation" in line
    assert judge(ours, evaluated()).passed
    assert sections_to_measure(ours, evaluated(), make_limits(**SKILLS)) == {}


def test_what_neither_of_them_measured_is_named_and_does_not_fail():
    sides = [evaluated(**{name: None for one in SECTIONS for name in (one, f"identities.{one}")}) for _ in range(2)]
    verdict = judge(*sides, **SKILLS)
    assert verdict.passed
    assert sum("compares nothing" in line for line in verdict.lines) == 4


def test_without_a_champion_the_base_stands_in_for_passkeys_and_long_range_only():
    verdict = judge(evaluated(), None, **SKILLS)
    assert verdict.passed
    assert "passkeys at 512 tokens: 1.000, the base 0.500: +0.500, allowed -0.100" in verdict.lines
    assert "loss beyond max_length: 3.000, the base 6.000: -3.000 nats/token, allowed +0.050" in verdict.lines
    assert not [line for line in verdict.lines if "quiz" in line or "accuracy" in line]
    lost = evaluated(**{"passkey.tuned.by_length.128": 0.2, "positions.beyond.tuned": 6.5, "tasks.quiz.tuned.acc": 0.0})
    assert [line.split(":")[0] for line in judge(lost, None, **SKILLS).failed] == [
        "loss beyond max_length",
        "passkeys at 128 tokens",
    ]


@pytest.mark.parametrize(
    ("found", "minimum", "passes"), [(0.8, 0.8, True), (0.79, 0.8, False), (NAN, 0.0, False), (0.0, 0.0, True)]
)
def test_a_minimum_of_passkeys_is_required_at_every_length_with_or_without_a_champion(found, minimum, passes):
    ours = evaluated(**{"passkey.tuned.by_length.512": found})
    for champion in (None, evaluated()):
        assert judge(ours, champion, min_passkey_accuracy=minimum).passed is passes
    (line,) = judge(ours, None, max_length=64, min_passkey_accuracy=minimum).failed
    assert "none up to 64 tokens" in line


def test_another_tokenizer_leaves_what_is_counted_in_tokens_to_the_base_or_to_bytes():
    champion = evaluated(tokenizer="x", positions=None, **{"identities.positions": None})
    for side, size in ((ours := evaluated(), 400), (champion, 400)):
        side["sources"]["docs"]["tuned"] |= {"nats_per_byte": 0.5, "tokens": 100, "bytes": size}
    assert sections_to_measure(ours, champion, make_limits(**SKILLS)) == {}
    verdict = judge(ours, champion, **SKILLS)
    assert verdict.passed, verdict
    assert any(line.startswith("accuracy: not compared, because the tokenizer of v7 differs") for line in verdict.lines)
    assert "loss beyond max_length: 3.000, the base 6.000: -3.000 nats/token, allowed +0.050" in verdict.lines
    assert "passkeys at 512 tokens: 1.000, v7 1.000: +0.000, allowed -0.100" in verdict.lines


@pytest.mark.parametrize(("bits", "passes"), [(0.7, True), (0.8, True), (0.81, False)])
def test_a_metric_that_should_fall_may_not_rise(bits, passes):
    assert judge(evaluated(**{"tasks.quiz.tuned.bits": bits}), evaluated(), **SKILLS).passed is passes


@pytest.mark.parametrize(("key", "value"), [("version", "2.0"), ("shots", 5), ("n", 90)])
def test_another_version_of_a_task_is_another_task(key, value):
    champion = evaluated(**{f"tasks.quiz.{key}": value})
    assert not judge(evaluated(), champion, **SKILLS).passed
    assert list(sections_to_measure(evaluated(), champion, make_limits(**SKILLS))) == ["tasks"]


def test_a_filter_s_metric_has_its_own_standard_error():
    named = {"f1,strict": 0.5, "f1_stderr,strict": 0.1}
    ours, theirs = evaluated(), evaluated()
    for side, value in ((ours, 0.3), (theirs, 0.5)):
        side["tasks"]["quiz"]["tuned"] = {**named, "f1,strict": value}
    assert "quiz, f1,strict: 0.300, v7 0.500: -0.200, allowed -0.283 (2 standard errors of 0.141)" in str(
        judge(ours, theirs, **SKILLS)
    )


def test_only_what_a_limit_compares_is_measured_again():
    old = {name: value for name, value in evaluated().items() if name not in ("identities", *SECTIONS)}
    for keys, needed in [
        ((), set()),
        (("max_passkey_decrease",), {"passkey"}),
        (("max_task_decrease_errors",), {"tasks"}),
        (tuple(SKILLS), set(SECTIONS)),
    ]:
        limits = make_limits(**{key: SKILLS[key] for key in keys})
        assert sections_to_measure(evaluated(), old, limits).keys() == needed
        assert sections_to_measure(evaluated(), evaluated(), limits) == {}
        others = {**copy.deepcopy(old), "validation": "others"}
        assert sections_to_measure(evaluated(), others, limits).keys() == {"losses", *needed}


def test_two_evaluations_that_do_not_say_what_they_measured_are_not_compared():
    ours, theirs = (evaluated(identities=None) for _ in range(2))
    failed = judge(ours, theirs, **SKILLS).failed
    assert [line.split(":")[0] for line in failed] == [
        "loss beyond max_length",
        "passkeys",
        "long context",
        "task quiz",
    ]
    assert all("dvc repro evaluate" in line for line in failed[:3])
