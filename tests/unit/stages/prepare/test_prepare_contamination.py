import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.data.tokenized import open_tokenized
from ropeway.data.words import hash_grams, is_short
from ropeway.models.conversation import Conversation
from ropeway.runtime.errors import ConfigError
from ropeway.stages.prepare.contamination import (
    IN_PROMPTS,
    IN_VALIDATION,
    GramSet,
    find_hits,
    parse_prompts,
)
from ropeway.stages.tokenize.fingerprints import hash_sequence_grams, sequence_texts
from tests.support.chat_templates import STYLES
from tests.support.prepared_run import TALKS, make_prepared

WORDS = [f"w{n}" for n in range(60)]
RUN = " ".join(WORDS[:13])


def hits(training, validation=(), prompts=(), ngram=13):
    known, _ = hash_sequence_grams(validation, ngram)
    validation, asked = (GramSet.of(grams) for grams in (known[~is_short(known)], marked(prompts, ngram)))
    grams, counts = hash_sequence_grams(training, ngram)
    return find_hits(grams, np.concatenate([[0], np.cumsum(counts)]), validation, asked).tolist()


def marked(prompts, ngram):
    return hash_grams(prompts, ngram, mark_short=True).values


def test_thirteen_words_in_common_are_a_hit_and_twelve_are_not():
    training = [
        (f"Before. {RUN.upper()}! After.",),
        (" ".join(WORDS[1:13]) + " other",),
        (f"{WORDS[13]} {' '.join(WORDS[:12])}",),
    ]
    assert hits(training, [(f"so, {RUN}, then",)]) == [IN_VALIDATION, 0, 0]


def test_no_run_crosses_from_one_turn_into_the_next():
    apart = (" ".join(WORDS[:7]), " ".join(WORDS[7:13]))
    assert hits([apart], [(RUN,)]) == hits([(RUN,)], [apart]) == [0]


def test_a_short_prompt_is_a_hit_only_where_a_whole_turn_equals_it():
    training = [("What is a list?", "A sequence."), ("Tell me: what is a list?",), ("what is... a LIST",)]
    assert hits(training, prompts=["What is a list?"]) == [IN_PROMPTS, 0, IN_PROMPTS]


def test_a_short_validation_turn_is_no_hit():
    assert hits([("Thank you!", "You are welcome.")], [("Thank you!", "You are welcome.")]) == [0]


def test_a_sequence_may_hit_both():
    assert hits([(RUN,), ("x",)], [(RUN,)], [RUN]) == [IN_VALIDATION | IN_PROMPTS, 0]


def test_sequences_are_compared_as_they_are_stored_and_without_system_message():
    assert sequence_texts("abcde", 2) == [("ab",), ("cd",), ("e",)]
    assert sequence_texts("", 2) == []
    assert sequence_texts(Conversation(("q", "a"), "Be kind."), 2) == [("q", "a")]
    assert sequence_texts(Conversation(("q", "a", "r", "b"), "Be kind."), 2, 2) == [("q", "a"), ("q", "a", "r", "b")]


@given(st.lists(st.integers(0, 2**64 - 1)), st.lists(st.integers(0, 2**64 - 1)))
def test_a_set_of_grams_holds_what_was_put_in(inside, asked):
    grams = GramSet.of(np.array(inside, np.uint64))
    asked += inside[::2]
    assert grams.contains(np.array(asked, np.uint64)).tolist() == [value in set(inside) for value in asked]
    assert grams.filters.size < 16 * max(len(set(inside)), 1) + 1


def test_prompts_are_lines_of_text_or_the_strings_in_lines_of_json():
    assert parse_prompts("What is it?\n\nWho? \n", "a.txt") == ["What is it?", "Who? "]
    lines = '"One\u2028line"\n\n{"question": "Q", "choices": ["A", "B"], "id": 3, "answer": null}\n'
    assert parse_prompts(lines, "b.jsonl") == ["One\u2028line", "Q", "A", "B"]


def test_prompts_that_are_not_json_are_reported():
    with pytest.raises(ConfigError, match=r"d.jsonl: expected one JSON value per line"):
        parse_prompts("{", "d.jsonl")


def test_each_answer_of_a_rewritten_history_has_the_words_up_to_it(tmp_path):
    style = STYLES["thinking"]
    workspace, _ = make_prepared(tmp_path, style=style, history="per_turn", what_counts="answers")
    source = open_tokenized(workspace.tokens)[0]["talk"]
    counts = source.column("gram_counts")
    assert len(counts) == len(source.column("lengths")) == 2 * len(TALKS)
    assert counts.sum() == len(source.shard("grams", 0))
    assert (counts[1::2] > counts[::2]).all()
