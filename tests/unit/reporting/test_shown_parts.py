"""Answers with reasoning and tool calls on pages: parts apart, and nothing of them is markup."""

import re
from html.parser import HTMLParser

import pytest

from ropeway.models.answer_parts import split_answer, to_records
from ropeway.reporting.model_card import _answers
from ropeway.reporting.render import render
from ropeway.reporting.report_eval import render_samples
from ropeway.reporting.shown_parts import join_shown, show_answers

EVIL = "<script>alert(1)</script>"
ANSWER = (
    f'<think>{EVIL} hm</think>I look.<tool_call>{{"name": "look_up", "arguments": {{"word": "{EVIL}"}}}}</tool_call>'
)


class Tree(HTMLParser):
    """Texts by the class of the innermost element that has one of the wanted classes."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.tags = [], {}, []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "input", "hr"):
            self.open.append((tag, dict(attrs).get("class", "")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        names = [name for _, name in self.open if name in ("text", "reasoning", "call", "nothing")]
        if names:
            self.texts.setdefault(names[-1], []).append(data)


def result(text, name="tuned/greedy"):
    parts = split_answer(text)
    own = {"parts": [to_records(parts)]} if any(part.kind != "text" for part in parts) else {}
    return {"sampling_config": name, "sampling_params": {}, "outputs": [text], **own}


def read(*texts):
    results = [result(text, f"{name}/greedy") for name, text in zip(("base", "tuned"), texts, strict=False)]
    page = render_samples({"model_name": "m", "args": {}, "prompts": [{"prompt": "Hi", "results": results}]})
    tree = Tree()
    tree.feed(page)
    assert tree.open == []
    return page, tree


def test_reasoning_is_collapsed_and_a_call_is_a_block_of_its_own():
    _, tree = read(ANSWER)
    assert "".join(tree.texts["reasoning"]) == f"reasoning (<think>){EVIL} hm"
    assert "".join(tree.texts["call"]).startswith('tool call: look_up{\n  "word": ')
    assert "I look." in "".join(tree.texts["text"])
    assert tree.tags.count("details") == 3  # and the two of the page's head


def test_nothing_of_reasoning_or_arguments_is_markup():
    page, tree = read(ANSWER)
    assert page.count("<script>") == 1
    assert tree.tags.count("script") == 1
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("<think>cut", ["reasoning", "text"]),
        ("Write <think>x</think>.", ["text"]),
        ("", ["text"]),
        ("<think>a</think>\n\n", ["reasoning", "text"]),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_call>', ["tool_call"]),
    ],
)
def test_an_answer_without_text_is_empty_and_unfinished_reasoning_says_so(text, kinds):
    (parts,) = show_answers(result(text))
    assert [part.kind for part in parts] == kinds
    assert any(part.title.startswith("unfinished") for part in parts) == (text == "<think>cut")
    _, tree = read(text)
    assert ("nothing" in tree.texts) == (kinds[-1] == "text" and not parts[-1].text)


def test_a_table_cell_cuts_the_reasoning_and_not_the_answer():
    (parts,) = show_answers(result(f"<think>{'a' * 900}</think>Yes."))
    cell = join_shown(parts)
    assert re.search(r"^\[reasoning [^]]*\] a{200} … \(700 more characters\)\n\[answer\] Yes\.$", cell)


def test_a_card_has_the_parts_of_both_models():
    one = {"prompt": "Hi", "results": [result(ANSWER, "base/greedy"), result("[THINK]x[/THINK]Yes", "tuned/greedy")]}
    answers = _answers(one, "greedy")
    assert [part.kind for part in answers["base"]] == ["reasoning", "text", "tool_call"]
    assert [part.text for part in answers["tuned"]] == ["x", "Yes"]


def test_an_unsafe_title_is_shown_by_its_code_points():
    name = "f\u202e<b>"
    text = f'<tool_call>{{"name": "{name}", "arguments": "x"}}</tool_call>'
    page, _ = read(text)
    assert "\u202e" not in page
    assert "fU+202E&lt;b&gt;" in page
    assert render("page.html.jinja", title=name).count("U+202E") == 2
