"""Questions on long texts: scores of models with known answers, texts by seed, lengths in tokens."""

import csv
import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from ropeway.config.sections import LongContext
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.reporting import report_eval
from ropeway.reporting.report_eval import long_context_grids, read_table
from ropeway.runtime.errors import ConfigError
from ropeway.stages.evaluate import stage as evaluate
from ropeway.stages.evaluate.load_model import open_model
from ropeway.stages.evaluate.long_context import (
    LongContextAnswer,
    LongContextQuestion,
    answer_long_context,
    compose,
    encode_long_context,
    identify_long_context,
    plan_long_context,
    report_long_context,
    table_long_answers,
    table_long_context,
)
from tests.support.speaking_model import speaker
from tests.support.tiny_run import BLOCK, make_run

KINDS = ("multi_key", "multi_value", "variable_tracking", "common_words")
WANTED = LongContext(kinds=list(KINDS), lengths=[384, 256], repeats=2)
STATED = "long_context: {kinds: [multi_key, multi_value, variable_tracking, common_words], lengths: [%d], repeats: 1}"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    workspace, _ = make_run(tmp_path_factory.mktemp("run"))
    return open_model(workspace.model, like=workspace.model)


def ask(opened, questions, text_of):
    """Return the answers of a model that says `text_of(question)` to each question, and then ends."""
    model, tokenizer = opened
    table = {
        tuple(encode_long_context(tokenizer, OPEN_ASSISTANT, one)): [
            *tokenizer(text_of(one), add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        for one in questions
    }
    assert len(table) == len(questions)
    said = speaker(model, lambda prompt, count: table[tuple(prompt)][count])
    return answer_long_context(said, tokenizer, OPEN_ASSISTANT, questions, seed=7)


def expect(question):
    return " " + ", ".join(compose(question).expected) + "."


def test_a_model_that_knows_every_answer_scores_1_in_every_kind(opened):
    questions = plan_long_context(WANTED, seed=7)
    found = ask(opened, questions, expect)
    assert [one.question for one in found] == questions
    assert report_long_context({"tuned": found})["tuned"] == {
        "asked": 16,
        "score": 1.0,
        "by_kind": {kind: {"256": 1.0, "384": 1.0} for kind in KINDS},
    }


@pytest.mark.parametrize("words", [" 77777", " I do not know.", ""])
def test_a_model_that_says_the_same_to_everything_scores_0_in_every_kind(opened, words):
    found = ask(opened, plan_long_context(WANTED, seed=7), lambda _: words)
    assert report_long_context({"tuned": found})["tuned"] == {
        "asked": 16,
        "score": 0.0,
        "by_kind": {kind: {"256": 0.0, "384": 0.0} for kind in KINDS},
    }
    lines = list(table_long_answers({"tuned": found}))
    assert len(lines) == 16
    assert all(line["answer"].strip() == words.strip() and line["score"] == 0 for line in lines)


def test_a_score_is_of_its_kind_and_length_alone():
    questions = plan_long_context(WANTED, seed=7)
    known = [one for one in questions if one.length == 256 and one.kind != "multi_key"]
    found = [LongContextAnswer(one, 9, expect(one) if one in known else "") for one in questions]
    lines = table_long_context({"base": [replace(one, text="") for one in found], "tuned": found})
    assert lines == [
        {"kind": kind, "length": length, "base": 0.0, "tuned": float(length == 256 and kind != "multi_key")}
        for kind in sorted(KINDS)
        for length in (256, 384)
    ]
    assert report_long_context({"tuned": found})["tuned"]["score"] == 6 / 16


def items_of(puzzle, units=8):
    """Every item in the text that has the form of an answer."""
    return list(dict.fromkeys(re.findall(puzzle.item, puzzle.write(units))))


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_items_of_the_text_score_0_and_listing_all_of_them_gains_nothing(kind):
    question = LongContextQuestion(kind, 256, 0, "a seed")
    puzzle = compose(question)
    wrong = [item for item in items_of(puzzle) if item not in puzzle.expected]
    assert len(wrong) >= 2
    assert puzzle.score(", ".join(wrong)) == 0.0
    assert puzzle.score(", ".join([*wrong, *puzzle.expected])) < 1.0
    assert puzzle.score(", ".join([*puzzle.expected, *wrong])) == 1.0
    assert LongContextAnswer(question, 9, " and ".join(reversed(puzzle.expected))).score == 1.0
    repeated = " ".join([puzzle.expected[0]] * 9)
    assert puzzle.score(repeated) == 1 / len(puzzle.expected)
    assert puzzle.score(" ".join([repeated, *puzzle.expected])) == 1.0
    assert puzzle.score(f"{puzzle.expected[0]}1") == 0.0


@pytest.mark.parametrize("units", [0, 1, 7, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_follows_from_the_text_at_every_length(kind, units):
    for number in range(5):
        puzzle = compose(LongContextQuestion(kind, 256, 0, f"seed {number}"))
        text = puzzle.write(units)
        if kind == "common_words":
            counts = Counter(text.split()).most_common()
            assert {word for word, _ in counts[:3]} == set(puzzle.expected)
            assert counts[2][1] > counts[3][1]
        elif kind == "variable_tracking":
            values = {}
            for name, code, other in re.findall(
                r"Variable (\w+) is set to (?:(\d+)|the value of variable (\w+))", text
            ):
                values[name] = code or values[other]  # KeyError: used before it is set
            (asked,) = set(re.findall(r"\d{5}", puzzle.question)) & set(re.findall(r"\d{5}", puzzle.opening))
            assert {name for name, code in values.items() if code == asked} == set(puzzle.expected)
            assert len(values) == 8
        else:
            codes = re.findall(r"code of the ([\w ]+) is (\d{5})\.", text)
            (asked,) = {name for name, _ in codes if name in puzzle.question and name in puzzle.opening}
            assert {code for name, code in codes if name == asked} == set(puzzle.expected)
            assert len(codes) > len(puzzle.expected)
        assert puzzle.write(units) == text


def test_hidden_sentences_are_spread_over_the_text():
    text = compose(LongContextQuestion("multi_key", 256, 0, "a seed")).write(400)
    places = [hit.start() / len(text) for hit in re.finditer("access code", text)]
    assert [int(4 * place) for place in places] == [0, 1, 2, 3]


@pytest.mark.parametrize("length", [256, 384, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_fills_its_length_and_leaves_room_for_the_answer(opened, kind, length):
    _, tokenizer = opened
    question = LongContextQuestion(kind, length, 0, f"{kind}/{length}")
    puzzle = compose(question)
    ids = encode_long_context(tokenizer, OPEN_ASSISTANT, question)
    assert length - 48 < len(ids) + puzzle.answer_tokens <= length
    assert len(tokenizer(expect(question), add_special_tokens=False)["input_ids"]) < puzzle.answer_tokens
    text = tokenizer.decode(ids)
    assert re.search(rf"<\|assistant\|> ?{re.escape(puzzle.opening)}$", text)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_text_depends_only_on_seed_kind_length_and_repeat():
    questions = plan_long_context(WANTED, seed=7)
    texts = {one: (compose(one).write(9), compose(one).expected) for one in questions}
    assert texts == {one: (compose(one).write(9), compose(one).expected) for one in plan_long_context(WANTED, seed=7)}
    assert len(set(texts.values())) == len(questions) == 16
    fewer = LongContext(kinds=["common_words"], lengths=[384], repeats=1)
    assert set(plan_long_context(fewer, seed=7)) <= set(questions)
    others = plan_long_context(WANTED, seed=8)
    assert not {compose(one).write(9) for one in others} & {text for text, _ in texts.values()}
    assert [one.length for one in questions] == [256] * 8 + [384] * 8
    assert plan_long_context(None, seed=7) == []


def test_a_digest_tells_whether_two_reports_are_of_the_same_questions():
    questions = plan_long_context(WANTED, seed=7)
    assert identify_long_context(questions) == identify_long_context(plan_long_context(WANTED, seed=7))
    for other in (questions[1:], plan_long_context(WANTED, seed=8), [replace(one, length=512) for one in questions]):
        assert identify_long_context(other) != identify_long_context(questions)


def test_a_length_too_short_for_its_question_is_refused_before_training(tmp_path):
    workspace, profile = make_run(tmp_path, block=BLOCK.replace("long_context: null", STATED % 160))
    with pytest.raises(
        ConfigError, match=r"evaluation\.long_context\.lengths, kind multi_value: 160 tokens are too few.*or more"
    ):
        evaluate.check_request(workspace, profile)
    workspace, profile = make_run(tmp_path / "fits", block=BLOCK.replace("long_context: null", STATED % 256))
    evaluate.check_request(workspace, profile)


def test_evaluate_writes_scores_by_kind_and_length_all_answers_and_a_plot(tmp_path):
    workspace, profile = make_run(tmp_path, block=BLOCK.replace("long_context: null", STATED % 256))
    evaluate.run(workspace, profile)
    report = json.loads(workspace.evaluation.read_text())
    assert {"long_context", "passkey", "positions"} == set(report["identities"])
    for model in ("base", "tuned"):
        assert report["long_context"][model]["asked"] == 4
        assert set(report["long_context"][model]["by_kind"]) == set(KINDS)
    lines = read_table(workspace.tables / "long_context.csv")
    assert [(line["kind"], line["length"]) for line in lines] == [(kind, "256") for kind in sorted(KINDS)]
    with (workspace.tables / "long_context_answers.csv").open() as file:
        answers = list(csv.DictReader(file))
    assert [line["model"] for line in answers] == ["base"] * 4 + ["tuned"] * 4
    assert all(0 < int(line["tokens"]) <= 256 and line["expected"] for line in answers)
    report_eval.write_plots(workspace.plots, workspace.tables, workspace.steps, max_length=profile.max_length)
    assert (workspace.plots / "long_context.png").read_bytes().startswith(b"\x89PNG")


def test_the_grid_of_the_plot_has_each_score_at_its_kind_and_length():
    lines = [
        {"kind": kind, "length": length, "base": base, "tuned": tuned}
        for kind, length, base, tuned in (
            ("common_words", "256", "0.25", "0.5"), ("common_words", "1024", "0.0", "0.75"),
            ("multi_key", "256", "1.0", "1.0"), ("multi_key", "1024", "0.1", "0.2"),
        )
    ]  # fmt: skip
    assert long_context_grids(lines) == {
        "base": ([256, 1024], ["common words", "multi key"], [[0.25, 0.0], [1.0, 0.1]]),
        "tuned": ([256, 1024], ["common words", "multi key"], [[0.5, 0.75], [1.0, 0.2]]),
    }
