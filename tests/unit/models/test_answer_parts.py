import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ropeway.models.answer_parts import (
    CALLS,
    REASONING,
    STATED,
    AnswerPart,
    ParsedAnswer,
    from_records,
    parse_answer,
    split_answer,
    to_message,
    to_records,
)
from tests.support.chat_templates import STYLES, Style, write_tokenizer

CALL = '{"name": "look_up", "arguments": {"word": "rope", "deep": {"n": [1, 2]}}}'
CHANNELS = (
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.look_up "
    '<|constrain|>json<|message|>{"word": "rope"}'
)


def summarize(parts):
    return [(part.kind, part.text.strip(), part.is_finished, part.name) for part in parts]


@pytest.mark.parametrize("markers", REASONING)
def test_reasoning_at_the_beginning_is_a_part(markers):
    text = f"\n{markers.open}\nHm.\n{markers.close}\n\nYes."
    assert summarize(split_answer(text)) == [("reasoning", "Hm.", True, ""), ("text", "Yes.", True, "")]
    assert split_answer(text)[0].marker == markers.open


@pytest.mark.parametrize("markers", REASONING)
def test_reasoning_that_was_cut_is_unfinished(markers):
    assert summarize(split_answer(f"{markers.open}Hm, th")) == [("reasoning", "Hm, th", False, "")]


def test_reasoning_that_the_prompt_opens_is_a_part():
    assert summarize(split_answer("Hm.</think>Yes.", prompt="…<think>\n")) == [
        ("reasoning", "Hm.", True, ""),
        ("text", "Yes.", True, ""),
    ]
    assert summarize(split_answer("Hm", prompt="<think>")) == [("reasoning", "Hm", False, "")]
    assert summarize(split_answer("Yes.", prompt="<think>\n\n</think>\n\n")) == [("text", "Yes.", True, "")]


@pytest.mark.parametrize(
    "text",
    [
        "Write <think>x</think> first.",
        "Hm.</think>Yes.",
        "<tool_call>not JSON</tool_call>",
        "<tool_call> is a marker.",
        "",
    ],
)
def test_a_text_about_markers_stays_text(text):
    assert split_answer(text) == (AnswerPart("text", text),)


@pytest.mark.parametrize("markers", CALLS)
def test_calls_are_parts_with_name_and_arguments(markers):
    first, call, *_ = split_answer(f"I look.{markers.open}\n{CALL}\n{markers.close}")
    assert (first.kind, first.text) == ("text", "I look.")
    assert (call.kind, call.name, call.marker) == ("tool_call", "look_up", markers.open)
    assert call.arguments == {"word": "rope", "deep": {"n": [1, 2]}}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", ["look_up", "look_up"]),
        (f"[TOOL_CALLS][{CALL}, {CALL}]", ["look_up", "look_up"]),
        ('[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b[ARGS]{}', ["a", "b"]),
        ('<|python_tag|>{"name": "a", "parameters": {}}', ["a"]),
        ('<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "a", "parameters": {}}]<|END_ACTION|>', ["a"]),
        ("<tool_call>\n<function=a>\n<parameter=x>\n1 < 2\n</parameter>\n</function>\n</tool_call>", ["a"]),
    ],
)
def test_the_known_forms_of_calls_are_read(text, names):
    assert [part.name for part in split_answer(text)] == names


def test_a_call_that_was_cut_is_unfinished_and_has_no_name():
    assert summarize(split_answer('So <tool_call>\n{"name": "lo')) == [
        ("text", "So", True, ""),
        ("tool_call", '{"name": "lo', False, ""),
    ]


def test_channels_are_parts():
    assert summarize(split_answer(CHANNELS)) == [
        ("reasoning", "Hm.", True, ""),
        ("tool_call", '{"word": "rope"}', True, "look_up"),
    ]
    assert summarize(split_answer("<|channel|>analysis<|message|>Hm")) == [("reasoning", "Hm", False, "")]


PIECES = [mark for one in (*REASONING, *CALLS) for mark in one if mark] + [
    CALL,
    "{",
    "[",
    "<|channel|>",
    "<|message|>",
    "7",
]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.sampled_from(["", "<think>\n"]))
def test_no_character_is_lost_but_markers_and_blanks(text, prompt):
    parts = split_answer(text, prompt=prompt)
    assert from_records(json.loads(json.dumps(to_records(parts)))) == parts
    at = 0
    for part in parts:
        if part.kind == "tool_call" and part.name:
            assert part.name in text
        else:
            assert part.text in text[at:]
            at = text.index(part.text, at) + len(part.text)
    assert text.count("7") == sum(part.text.count("7") for part in parts)


@pytest.fixture
def tokenizer(tmp_path):
    special = ("<|im_start|>", "<|im_end|>", "[THINK]", "[/THINK]")
    write_tokenizer(tmp_path, Style(STYLES["chatml"].jinja, special, "<|im_end|>", "<|im_end|>"))
    return AutoTokenizer.from_pretrained(tmp_path)


def generated(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_markers_that_are_special_tokens_stay_in_the_text(tokenizer):
    ends = [tokenizer.eos_token_id]
    answer = parse_answer(tokenizer, generated(tokenizer, "[THINK]Hm[/THINK]Yes<|im_end|>"), prompt="", ends=ends)
    assert answer.text == "[THINK]Hm[/THINK]Yes"
    assert summarize(answer.parts) == [("reasoning", "Hm", True, ""), ("text", "Yes", True, "")]
    plain = parse_answer(tokenizer, generated(tokenizer, "<|im_start|>Yes<|im_end|>"), prompt="", ends=ends)
    assert (plain.text, plain.has_parts) == ("Yes", False)


def test_a_template_for_answers_that_the_tokenizer_states_is_used(tokenizer):
    stated = {
        "start_anchor": "<|im_start|>",
        "fields": {
            "reasoning_content": {"open": "((", "close": "))", "content": "text"},
            "content": {"close": "<|im_end|>", "content": "text"},
        },
    }
    setattr(tokenizer, STATED, stated)
    ends = [tokenizer.eos_token_id]
    answer = parse_answer(tokenizer, generated(tokenizer, "((Hm))Yes<|im_end|>"), prompt="<|im_start|>", ends=ends)
    assert summarize(answer.parts) == [("reasoning", "Hm", True, ""), ("text", "Yes", True, "")]
    assert {part.marker for part in answer.parts} == {STATED}
    assert answer.text == "((Hm))Yes"
    cut = parse_answer(tokenizer, generated(tokenizer, "((Hm"), prompt="<|im_start|>", ends=ends)
    assert summarize(cut.parts) == [("reasoning", "Hm", False, "")]
    setattr(tokenizer, STATED, {"fields": 3})
    known = parse_answer(tokenizer, generated(tokenizer, "<think>Hm</think>Yes"), prompt="", ends=ends)
    assert [part.kind for part in known.parts] == ["reasoning", "text"]


def test_a_message_has_parts_of_its_own_only_where_the_template_has_a_place():
    text = f"<think>Hm</think>I look.<tool_call>{CALL}</tool_call>"
    answer = ParsedAnswer(text, split_answer(text))
    both = to_message(answer, has_reasoning=True, has_calls=True, make_id=lambda: "call00001")
    assert (both["content"], both["reasoning_content"]) == ("I look.", "Hm")
    assert both["tool_calls"][0]["id"] == "call00001"
    assert both["tool_calls"][0]["function"] == json.loads(CALL)
    for has_reasoning, has_calls in ((False, True), (True, False)):
        message = to_message(answer, has_reasoning=has_reasoning, has_calls=has_calls, make_id=str)
        assert message == {"role": "assistant", "content": text}
