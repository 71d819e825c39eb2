"""Conversations turn by turn in `ropeway inspect` and on the data page: what a record says, and what is trained."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from ropeway.cli.inspect_output import draw_inspection, draw_turns
from ropeway.cli.main import app
from ropeway.data.find_record import RecordFinder
from ropeway.data.tokenized import open_tokenized
from ropeway.models.chat_template import open_template
from ropeway.models.conversation import Conversation
from ropeway.reporting.inspection import inspect_sequence, open_prepared, to_json
from ropeway.reporting.turns import ConversationFinder, Turns, show_turn
from tests.support.chat_templates import STYLES
from tests.support.pages import assert_only_its_own_script
from tests.support.prepared_run import TALKS, make_prepared

EVIL = "<script>alert(1)</script>"
TOOLS = [
    {"type": "function", "function": {"name": "look_up", "description": f"Looks\na word up. {EVIL}", "parameters": {}}}
]
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is a rope?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": f"I look. {EVIL}",
        "tool_calls": [
            {"type": "function", "function": {"name": "look_up", "arguments": {"word": EVIL, "long": "x" * 3000}}}
        ],
    },
    {"role": "tool", "name": "look_up", "content": "A line\x1b[31m."},
    {"role": "assistant", "content": "A line.", "reasoning_content": "It says so."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Hm.", "weight": 0},
    {"role": "user", "content": "Well?"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "I am."},
]
REFUSED = [
    {"role": "user", "content": "Hi", "name": "Ann"},  # the template has no place for names
    {"role": "assistant", "content": "Hello"},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    talks = [
        *(Conversation.from_messages(REFUSED) for _ in range(7)),
        Conversation.from_messages(MESSAGES, TOOLS),
        *TALKS,
    ]
    return make_prepared(
        tmp_path_factory.mktemp("turns"), talks=talks, style=STYLES["thinking"], history="per_turn",
        what_counts="answers", special_tokens_in_text="parse", max_refused_fraction=0.9,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finder(made):
    return ConversationFinder(*made)


def test_each_sequence_has_the_conversation_up_to_the_answer_that_it_trains(finder):
    found = [finder.find("talk", sequence) for sequence in range(3)]
    assert [one.record for one in found] == [7, 7, 7]
    assert [one.answer for one in found] == [1, 2, 3]
    assert [[at for at, turn in enumerate(one.turns) if turn.is_trained] for one in found] == [[2], [4], [8]]
    assert [len(one.turns) for one in found] == [3, 5, 9]
    assert [turn.message["role"] for turn in found[2].turns] == [one["role"] for one in MESSAGES]
    assert found[2].turns[6].use == "context, weight 0"
    assert found[0].tools == tuple(TOOLS)


def test_reasoning_that_the_template_drops_is_said(finder):
    whole = finder.find("talk", 2)
    assert [turn.drops_reasoning for turn in whole.turns if turn.message.get("reasoning_content")] == [
        True,
        True,
        False,
    ]
    assert "reasoning_dropped" not in whole.turns[8].to_json()
    assert show_turn(whole.turns[2], 99).reasoning_title == "reasoning, not in this sequence"


def test_every_sequence_finds_its_own_record_also_behind_refused_ones(made, finder):
    workspace, _ = made
    records = np.load(workspace.tokens / "talk" / "records.npy")
    for sequence, kept in enumerate(records.tolist()):
        found = finder.find("talk", sequence)
        assert found.record == kept + 7
        if kept:
            assert (
                tuple(turn.message["content"] for turn in found.turns if turn.message["role"] != "system")
                == (TALKS[kept - 1].turns[: len(found.turns) - bool(TALKS[kept - 1].system)])
            )
    assert finder.find("text", 0) is None


def test_a_record_is_only_found_by_the_hash_of_its_text(made):
    workspace, _ = made
    source = open_tokenized(workspace.tokens)[0]["talk"]
    finder = RecordFinder(workspace.raw / "talk", source, open_template(workspace.base), "<|im_end|>")
    keys = source.column("keys").copy()
    keys[5] += np.uint64(1)
    object.__setattr__(finder, "_keys", keys)
    assert finder.find(5) is None
    assert finder.find(6) is not None


def test_it_is_said_why_a_conversation_is_not_shown(made, monkeypatch):
    workspace, profile = made
    prepared = open_prepared(workspace, profile)
    assert inspect_sequence(prepared, "talk", 1).note == ""
    assert inspect_sequence(prepared, "text", 0).note == ""
    monkeypatch.setattr("ropeway.data.find_record._MOST_RENDERED", 0)
    lost = inspect_sequence(prepared, "talk", 1)
    assert lost.turns is None
    assert "was not found" in lost.note
    assert any(lost.note in line.plain for line in draw_inspection(lost, prepared, is_colourful=False))
    assert json.loads(to_json(lost, prepared))["note"] == lost.note
    assert "were removed" in inspect_sequence(replace(prepared, conversations=None), "talk", 1).note


def test_no_part_is_missing_in_the_terminal_and_long_values_say_what_is_left_out(finder):
    text = "\n".join(line.plain for line in draw_turns(finder.find("talk", 1), is_colourful=False))
    for part in (
        "conversation of record 7, up to answer 2: 5 messages",
        "  look_up: Looks a word up.",
        "system  (context)\n  Be kind.",
        "user  (context)\n  What is a rope?",
        f"  [reasoning] I look. {EVIL}",
        f'  [tool call: look_up]\n    {{\n      "word": "{EVIL}",',
        "tool look_up  (context)\n  A line<U+001B>[31m.",
        "assistant  (trained)\n  [reasoning] It says so.\n  A line.",
    ):
        assert part in text
    assert re.search(r"x … \([\d,]+ more characters; --json has all\)", text)
    assert "\x1b" not in text
    left = sum(cut.left_out for turn in finder.find("talk", 1).turns for _, cut in show_turn(turn, 2000).calls)
    assert f"({left:,} more" in text


def test_colors_mark_what_is_trained(finder):
    lines = list(draw_turns(finder.find("talk", 1), is_colourful=True))
    filled = [
        line.plain[span.start : span.end] for line in lines for span in line.spans if "on green" in str(span.style)
    ]
    assert filled == ["(trained)"]


def test_json_has_every_value_whole(made, monkeypatch):
    monkeypatch.chdir(made[0].root)
    result = CliRunner().invoke(app, ["inspect", "talk", "2", "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)["conversation"]
    assert (found["record"], found["answer"], found["tools"]) == (7, 3, TOOLS)
    extra = {"trained", "reasoning_dropped"}
    assert [{key: value for key, value in turn.items() if key not in extra} for turn in found["turns"]] == MESSAGES
    assert [turn["trained"] for turn in found["turns"]] == [False] * 8 + [True]


def test_a_row_and_a_document_have_no_turns(made, monkeypatch):
    monkeypatch.chdir(made[0].root)
    for words in (["--row", "0"], ["text", "0"]):
        result = CliRunner().invoke(app, ["inspect", *words, "--json"], catch_exceptions=False)
        assert "conversation" not in json.loads(result.stdout)


def test_tokens_are_shown_where_raw_data_were_removed(made, tmp_path):
    workspace, profile = made
    prepared = open_prepared(workspace, profile)
    assert prepared.conversations is not None
    (workspace.tokens / "manifest.json").rename(tmp_path / "manifest.json")
    try:
        assert open_prepared(workspace, profile).conversations is None
    finally:
        (tmp_path / "manifest.json").rename(workspace.tokens / "manifest.json")


def test_the_page_shows_the_turns_and_nothing_of_them_is_markup(made):
    page = made[0].report.read_text(encoding="utf-8")
    assert page.count("<script>") == 1
    assert_only_its_own_script(page)
    assert "Conversation of record 7, up to answer 1: 3 messages" in page
    assert '<div class="turn trained"><p class="who">assistant <small>trained</small></p>' in page
    assert "tool call: look_up" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert re.search(r"&hellip; [\d,]+ more characters", page)
    assert "A lineU+001B[31m." in page


def test_the_published_template_supervises_all_but_the_users_turns(tmp_path):
    for at, what_counts in enumerate(("published", "answers")):
        (tmp_path / str(at)).mkdir()
        workspace, profile = make_prepared(tmp_path / str(at), what_counts=what_counts)
        found = ConversationFinder(workspace, profile).find("talk", 1)
        expected = [what_counts == "published", False, True, False, True]
        assert [turn.is_trained for turn in found.turns] == expected
        assert (found.record, found.answer) == (1, 0)
        assert isinstance(found, Turns)
