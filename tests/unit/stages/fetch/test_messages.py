"""What chats of today carry is kept for the template, field by field, or refused by name."""

import json

import pytest

from ropeway.models.conversation import Conversation
from ropeway.stages.fetch.records import find_unused, to_record
from ropeway.stages.fetch.values import UnreadableError

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
MADE = {**CALL, "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
RESULT = {"role": "tool", "content": "rain", "tool_call_id": "c1"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}

# (what, rows, record, the messages of the conversation, its tools)
CHATS = [
    ("tools", "messages", {"messages": [Q, CALLED, RESULT, A], "tools": [TOOL]},
     [Q, {**CALLED, "tool_calls": [MADE]}, RESULT, A], [TOOL]),
    ("tools as JSON, flat", "messages", {"messages": [Q, A], "tools": json.dumps([TOOL["function"]])}, [Q, A], [TOOL]),
    ("tools of Anthropic", "messages",
     {"messages": [Q, A], "tools": [{"name": "weather", "input_schema": {"type": "object"}}]}, [Q, A], [TOOL]),
    ("text parts", "messages", {"messages": [{**Q, "content": [{"type": "text", "text": "q"}]}, A]}, [Q, A], []),
    ("blocks", "messages",
     {"messages": [
         Q,
         {"role": "assistant", "content": [
             {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Let me see."},
             {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Bern"}}]},
         {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "rain"}]},
         A]},
     [Q, {"role": "assistant", "content": "Let me see.", "reasoning_content": "hm", "tool_calls": [MADE]}, RESULT, A],
     []),
    ("reasoning", "messages", {"messages": [Q, {**A, "reasoning_content": "hm"}]},
     [Q, {**A, "reasoning_content": "hm"}], []),
    ("thinking", "messages", {"messages": [Q, {**A, "thinking": "hm"}]}, [Q, {**A, "reasoning_content": "hm"}], []),
    ("developer", "messages", {"messages": [{"role": "developer", "content": "d"}, Q, A]},
     [{"role": "developer", "content": "d"}, Q, A], []),
    ("assistant first", "messages", {"messages": [A, Q, A]}, [A, Q, A], []),
    ("system in the middle", "messages", {"messages": [Q, A, {"role": "system", "content": "s"}, Q, A]},
     [Q, A, {"role": "system", "content": "s"}, Q, A], []),
    ("twice the same role", "messages", {"messages": [Q, Q, A, A]}, [Q, Q, A, A], []),
    ("a name", "messages", {"messages": [{**Q, "name": "Ann"}, A]}, [{**Q, "name": "Ann"}, A], []),
    ("weight 1", "messages", {"messages": [{**Q, "weight": 0}, {**A, "weight": 1}]}, [Q, A], []),
    ("sharegpt with tools", "sharegpt",
     {"conversations": [{"from": "human", "value": "q"},
                        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'},
                        {"from": "observation", "value": "rain"}, {"from": "gpt", "value": "a"}],
      "tools": json.dumps([TOOL])},
     [Q, {**CALLED, "tool_calls": [{key: value for key, value in MADE.items() if key != "id"}]},
      {"role": "tool", "content": "rain"}, A], [TOOL]),
    ("prompt and completion", "prompt_completion", {"prompt": "q", "completion": "a"}, [Q, A], []),
    ("prompt of messages", "prompt_completion", {"prompt": [Q, A, Q], "completion": [A]}, [Q, A, Q, A], []),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "value", "messages", "tools"), [row[1:] for row in CHATS], ids=[r[0] for r in CHATS])
def test_nothing_of_a_chat_is_lost(rows, value, messages, tools):
    record = to_record(value, rows, {})
    assert isinstance(record, Conversation)
    assert record.to_messages() == messages
    assert record.read_form().get("tools", []) == tools
    assert not find_unused(value, rows, {})


@pytest.mark.parametrize(
    ("messages", "supervised"),
    [([Q, A, Q, A], [1, 3]), ([Q, {**A, "weight": 0}, Q, A], [3]), ([Q, {**A, "weight": 0}], [])],
)
def test_a_weight_of_0_takes_an_answer_out_of_the_loss(messages, supervised):
    record = to_record({"messages": messages}, "messages", {})
    assert record.supervised_messages() == supervised
    assert all("weight" not in message for message in record.to_messages())


def test_the_answers_of_a_prompt_are_not_supervised():
    record = to_record({"prompt": [Q, A, Q], "completion": [A]}, "prompt_completion", {})
    assert record.supervised_messages() == [3]


def test_a_field_that_params_name_is_not_read_and_is_counted():
    value = {"messages": [Q, {**A, "reasoning_content": "hm"}], "tools": [TOOL]}
    record = to_record(value, "messages", {}, ["reasoning_content", "tools"])
    assert record == Conversation(("q", "a"))
    assert find_unused(value, "messages", {}, ["reasoning_content", "tools"]) == {
        "tools": False, "reasoning_content": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({**A, "weight": 0.5}, "weight is neither 0 nor 1"),
        ({**A, "weight": "0"}, "weight is neither 0 nor 1"),
        ({**A, "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}, "tool call's arguments: not a JSON"),
        ({**A, "tool_calls": [{"function": {"arguments": "{}"}}]}, "a tool call without a name"),
        ({**A, "tool_calls": "f"}, "tool calls are not a list"),
        ({**A, "content": None}, "null text"),
        ({**A, "content": []}, "null text"),
        ({**A, "content": [{"type": "audio"}]}, "content part of type 'audio'"),
        ({**A, "thinking": 3}, "not text"),
    ],
)
def test_a_broken_answer_is_refused_by_name(answer, reason):
    with pytest.raises(UnreadableError, match=reason):
        to_record({"messages": [Q, answer]}, "messages", {})


def test_an_unknown_field_of_a_turn_is_found_in_prompt_and_completion():
    value = {"prompt": [{**Q, "mood": "sad"}], "completion": [{**A, "score": 1}]}
    assert find_unused(value, "prompt_completion", {}) == {"mood": True, "score": True}


@pytest.mark.parametrize("field", [{"tool_calls": [CALL]}, {"reasoning": "hm"}])
def test_only_the_assistant_reasons_and_calls(field):
    with pytest.raises(UnreadableError, match="of role 'user'"):
        to_record({"messages": [{**Q, **field}, A]}, "messages", {})


def called(**call):
    return {"messages": [Q, {"role": "assistant", "content": None, "tool_calls": [call]}, A]}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (called(name="f"), "without arguments"),
        (called(name="f", arguments={}, parameters={}), "two kinds"),
        (called(name="f", arguments={}, note="n"), "unused field 'note' of a tool call"),
        (called(name="f", arguments={}, type="custom"), "of type 'custom'"),
        (called(name="f", arguments='{"a": 1, "a": 2}'), "duplicate keys"),
        (called(name="f", arguments='{"a":' * 200_000), "not a JSON object"),
        (called(name="f", arguments={"a": "\ud800"}), "lone surrogate"),
        (called(name="f", arguments={"a": "b\0"}), "NUL"),
        ({"messages": [Q, {**A, "thinking": "a", "reasoning": "b"}]}, "two different reasonings"),
        ({"messages": [Q, {**A, "content": [{"type": ["x"]}]}]}, "content part of type"),
        ({"messages": [Q, {**A, "content": [{"type": "tool_result", "content": "r"}]}]}, "tool result of role"),
        ({"messages": [Q, {**A, "content": [{"type": "tool_use", "name": "f", "input": {}},
                                            {"type": "text", "text": "b"}]}]}, "order would be lost"),
        ({"messages": [Q, A], "tools": "[" * 200_000}, "tools are not JSON"),
        ({"messages": [Q, A], "tools": [{"name": ""}]}, "a tool without a name"),
        ({"messages": [Q, A], "tools": [{"name": "f", "parameters": {}, "input_schema": {}}]}, "two kinds"),
        ({"messages": [Q, A], "tools": [{"type": "custom", "function": {"name": "f"}}]}, "a tool that is no function"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_whole_is_refused_by_name(value, reason):
    with pytest.raises(UnreadableError, match=reason):
        to_record(value, "messages", {})


def test_llama_3s_spelling_of_arguments_is_read():
    record = to_record(called(name="f", parameters={"city": "Bern"}), "messages", {})
    (call,) = record.to_messages()[1]["tool_calls"]
    assert call["function"]["arguments"] == {"city": "Bern"}
