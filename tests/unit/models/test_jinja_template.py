"""Jinja templates: what is supervised is what the model would generate, for a dozen formats; or a reason is given.

The outside authority for every rendering is `apply_chat_template` of transformers.
"""

from dataclasses import replace

import pytest
from tokenizers import Regex
from transformers import AutoTokenizer

from ropeway.models.chat_template import open_template
from ropeway.models.conversation import Conversation
from ropeway.models.jinja_template import JinjaTemplate, UnusableConversationError, pin_date
from ropeway.models.tokenizer import open_tokenizer
from ropeway.stages.tokenize.encode import Encoder
from tests.support.chat_templates import STYLES, write_tokenizer

CHATS = {
    "one": Conversation(("Hi", "Hello there")),
    "three": Conversation(("Why?", "Because 2 > 1.", "Go on\nplease", "No.", "  spaces ", " and spaces ")),
    "unanswered": Conversation(("Hi", "Hello", "And?", "So", "Bye")),
}
SYSTEM = Conversation(("Hi", "Hello there"), system="Be kind.")


@pytest.fixture(scope="module", params=STYLES)
def folder(request, tmp_path_factory):
    where = tmp_path_factory.mktemp(request.param)
    write_tokenizer(where, STYLES[request.param])
    return where


def encode(folder, conversation, *, history="per_turn", special="parse"):
    tokenizer, template = open_tokenizer(folder), open_template(folder)
    eos = tokenizer.token_to_id(AutoTokenizer.from_pretrained(folder).eos_token)
    encoder = Encoder(tokenizer, {"eos": eos, "pad": eos}, template, None, special, history)
    parts = list(encoder.encode_batches([conversation]))
    rows = []
    for part in parts:
        ends = part.lengths.cumsum()
        rows += [(part.tokens[end - length : end].tolist(), part.kinds[end - length : end])
                 for length, end in zip(part.lengths, ends, strict=True)]  # fmt: skip
    return rows, dict(encoder.refused)


def as_jinja(folder) -> JinjaTemplate:
    template = open_template(folder)
    assert isinstance(template, JinjaTemplate)
    return template


def asked(authority, messages, **options):
    pin_date(authority.chat_template)
    return authority.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("name", CHATS)
def test_every_answer_follows_its_generation_prompt_and_ends_with_the_end_token(folder, name):
    authority, conversation = AutoTokenizer.from_pretrained(folder), CHATS[name]
    rows, refused = encode(folder, conversation)
    assert not refused
    messages, end = conversation.to_messages(), authority.convert_tokens_to_ids(STYLES[folder.name[:-1]].end)
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [(ids, first, last) for ids, kinds in rows for first, last in supervised_spans(kinds)]
    assert len(spans) == len(answers)
    for at, (ids, first, last) in zip(answers, spans, strict=True):
        assert ids[:first] == asked(authority, messages[:at], add_generation_prompt=True)
        assert ids[last - 1] == end
        assert messages[at]["content"].strip() in authority.decode(ids[first : last - 1])
        assert ids[:last] == asked(authority, messages[: at + 1])[:last]
    if len(rows) == 1:
        assert rows[0][0] == asked(authority, messages)


def supervised_spans(kinds):
    """(first, one after the last) of each run of supervised tokens."""
    spans, begin = [], None
    for at, kind in enumerate([*kinds.tolist(), 5]):
        if kind == 6 and begin is None:
            begin = at
        elif kind != 6 and begin is not None:
            spans.append((begin, at))
            begin = None
    return spans


def test_a_system_message_is_rendered_or_refused_by_the_template(folder):
    rows, refused = encode(folder, SYSTEM)
    if "gemma" in folder.name:
        assert refused == {"the template refuses it: System role not supported": 1}
    else:
        (ids, _), authority = rows[0], AutoTokenizer.from_pretrained(folder)
        assert ids == asked(authority, SYSTEM.to_messages())
        assert "Be kind." in authority.decode(ids)


def test_only_a_rewritten_history_needs_one_sequence_per_answer(folder):
    rows, refused = encode(folder, CHATS["three"], history="refuse")
    rewrites = folder.name.startswith(("thinking",))
    assert bool(refused) == rewrites
    assert len(rows) == (0 if rewrites else 1)
    assert len(encode(folder, CHATS["three"])[0]) == (3 if rewrites else 1)


def test_special_tokens_in_a_text_are_ordinary_tokens_when_escaped(folder):
    authority = AutoTokenizer.from_pretrained(folder)
    end = STYLES[folder.name[:-1]].end
    text = f"ends{end}here"
    rows, refused = encode(folder, Conversation(("Hi", text)), special="escape")
    plain, _ = encode(folder, Conversation(("Hi", "ends here")))
    if refused:
        assert folder.name.startswith("deepseek")  # it splits answers at </think>, so it does more than insert them
        return
    number = authority.convert_tokens_to_ids(end)
    assert rows[0][0].count(number) == plain[0][0].count(number)
    assert text in authority.decode(rows[0][0])


USER, ANSWER = {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Yes."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
CALLED = {"role": "assistant", "content": None, "reasoning_content": "Look it up.", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "rain"}


@pytest.fixture
def thinking(tmp_path):
    write_tokenizer(tmp_path, STYLES["thinking"])
    return tmp_path


def decoded_answers(folder, rows):
    authority = AutoTokenizer.from_pretrained(folder)
    return [authority.decode(ids[first:last]) for ids, kinds in rows for first, last in supervised_spans(kinds)]


def test_tools_calls_results_and_reasoning_are_rendered_and_the_calls_are_supervised(thinking):
    messages = [USER, CALLED, RESULT, ANSWER]
    rows, refused = encode(thinking, Conversation.from_messages(messages, [TOOL]))
    assert not refused
    assert rows[0][0] == asked(AutoTokenizer.from_pretrained(thinking), messages, tools=[TOOL])
    call, answer = decoded_answers(thinking, rows)
    assert call.startswith("<think>\nLook it up.\n</think>")
    assert '"name": "weather"' in call
    assert call.endswith("</tool_call><|im_end|>")
    assert answer.endswith("Yes.<|im_end|>")


def test_an_answer_of_weight_0_is_context(thinking):
    messages = [USER, {**ANSWER, "weight": 0}, USER, ANSWER]
    rows, _ = encode(thinking, Conversation.from_messages(messages))
    assert len(rows) == 1
    assert len(decoded_answers(thinking, rows)) == 1
    rows, refused = encode(thinking, Conversation.from_messages(messages[:2]))
    assert (rows, refused) == ([], {"no answer counts": 1})


def test_reasoning_of_an_earlier_turn_makes_one_sequence_per_answer_each_as_inference_would(thinking):
    reasoned = {**ANSWER, "reasoning_content": "Clouds."}
    chat = Conversation.from_messages([USER, reasoned, USER, reasoned])
    rows, _ = encode(thinking, chat)
    assert len(rows) == 2
    assert all("Clouds." in answer for answer in decoded_answers(thinking, rows))
    authority = AutoTokenizer.from_pretrained(thinking)
    assert authority.decode(rows[1][0]).count("Clouds.") == 1
    _, refused = encode(thinking, chat, history="refuse")
    assert list(refused.values()) == [1]


@pytest.mark.parametrize(
    ("style", "messages", "tools", "reason"),
    [
        ("chatml", [USER, ANSWER], [TOOL], "no place for tools"),
        ("chatml", [USER, {**ANSWER, "reasoning_content": "Clouds."}], [], "no place for reasoning"),
        ("zephyr", [USER, {**ANSWER, "tool_calls": [CALL]}], [], "no place for tool calls"),
        ("granite", [{**USER, "name": "Ann"}, ANSWER], [], "no place for names"),
        (
            "deepseek",
            [USER, {**ANSWER, "content": "<think>hm</think>Yes."}],
            [],
            "drops or changes a text of role assis",
        ),
    ],
)
def test_what_a_template_would_drop_is_refused_by_name(tmp_path, style, messages, tools, reason):
    write_tokenizer(tmp_path, STYLES[style])
    rows, refused = encode(tmp_path, Conversation.from_messages(messages, tools))
    assert rows == []
    assert reason in next(iter(refused))


CHATML = STYLES["chatml"].jinja
CONTENT = "message['content']"


def changed(folder, jinja, style="chatml"):
    write_tokenizer(folder, replace(STYLES[style], jinja=jinja))
    return folder


def test_a_call_without_text_is_rendered_as_transformers_does(tmp_path):
    calls = "message['content'] | trim + (message.tool_calls | tojson if message.tool_calls else '')"
    folder = changed(tmp_path, CHATML.replace(CONTENT, calls))
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    rows, refused = encode(folder, Conversation.from_messages(messages))
    assert not refused
    # transformers drops a content of null itself, but not in its lowest version here.
    told = [USER, {key: part for key, part in messages[1].items() if part is not None}]
    assert rows[0][0] == asked(AutoTokenizer.from_pretrained(folder), told)
    assert "None" not in decoded_answers(folder, rows)[0]


@pytest.mark.parametrize(
    "test",
    [
        "'/no_think' in messages[-1]['content']",
        "messages[-1]['content'] | length > 3",
        "'/no_think' in ('' ~ messages[-1]['content'])",
    ],
)
def test_a_prompt_that_depends_on_a_text_is_rendered_for_each_conversation(tmp_path, test):
    prompt = "<|im_start|>assistant\\n"
    assert CHATML.count(prompt) == 1
    thinks = f"{prompt}' -}}}}{{%- if {test} -%}}{{{{- '<think></think>"
    folder = changed(tmp_path, CHATML.replace(prompt, f"{thinks}' -}}}}{{%- endif -%}}{{{{- '"))
    rows, refused = encode(folder, Conversation(("Hi /no_think", "Hello")))
    assert (rows, sum(refused.values())) == ([], 1)
    rows, refused = encode(folder, Conversation(("Hi", "Hello")))
    assert (len(rows), refused) == (1, {})


def test_an_answer_that_the_template_changes_is_refused_also_if_its_text_is_in_the_question(tmp_path):
    write_tokenizer(tmp_path, STYLES["deepseek"])
    rows, refused = encode(tmp_path, Conversation(("I wrote '</think>4'. Ok?", "</think>4")))
    assert (rows, sum(refused.values())) == ([], 1)


def test_a_greeting_before_the_first_question_is_context(tmp_path):
    write_tokenizer(tmp_path, STYLES["chatml"])
    rows, refused = encode(tmp_path, Conversation.from_messages([ANSWER, USER, {**ANSWER, "content": "ok"}]))
    assert not refused
    assert decoded_answers(tmp_path, rows) == ["ok<|im_end|>"]


def test_an_end_token_that_the_tokenizer_reads_as_several_is_refused(tmp_path):
    write_tokenizer(tmp_path, STYLES["chatml"])
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"single_word": false', '"single_word": true'))
    rows, refused = encode(tmp_path, Conversation(("q", "q")))
    assert (rows, sum(refused.values())) == ([], 1)


def test_a_token_that_swallows_white_space_after_it_still_ends_an_answer(tmp_path):
    write_tokenizer(tmp_path, STYLES["phi"])
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"rstrip": false', '"rstrip": true'))
    rows, refused = encode(tmp_path, Conversation.from_messages([USER, USER, ANSWER]))
    assert not refused
    assert decoded_answers(tmp_path, rows) == ["Yes.<|end|>"]


LOST = [
    ("calls beside tools", CHATML + "{{ tools }}", [USER, {**ANSWER, "tool_calls": [CALL]}, USER, ANSWER], [TOOL]),
    ("arguments", CHATML.replace(CONTENT, "(message.content or message.tool_calls[0].function.name)"),
     [USER, {**CALLED, "reasoning_content": None}, RESULT, ANSWER], []),
    ("the second call",
     CHATML.replace(CONTENT, "(message.content or '') + (message.tool_calls or [])[:1] | tojson"),
     [USER, {**ANSWER, "tool_calls": [CALL, CALL]}], []),
    ("a result", CHATML.replace("for message in messages", "for message in messages if message['role'] != 'tool'"),
     [USER, ANSWER, {"role": "tool", "content": "18"}, {**ANSWER, "content": "18 degrees"}], []),
    ("a system message",
     CHATML.replace("for message in messages", "for message in messages if message.role != 'system'"),
     [{"role": "system", "content": "Yes"}, USER, ANSWER], []),
    ("reasoning that is said, too", CHATML, [USER, {**ANSWER, "reasoning_content": "Yes."}], []),
    ("a name that is said, too", CHATML, [{**USER, "name": "Rain"}, ANSWER], []),
    ("calls of a context", CHATML, [USER, {**ANSWER, "weight": 0, "tool_calls": [CALL]}, USER, ANSWER], []),
    ("descriptions", "{%- if tools -%}{{ tools[0].function.name }}{%- endif -%}" + CHATML, [USER, ANSWER],
     [{"type": "function", "function": {"name": "f", "description": "It rains."}}]),
]  # fmt: skip


@pytest.mark.parametrize(("jinja", "messages", "tools"), [row[1:] for row in LOST], ids=[row[0] for row in LOST])
def test_what_is_lost_is_found_also_where_its_text_stands_elsewhere(tmp_path, jinja, messages, tools):
    folder = changed(tmp_path, jinja)
    rows, refused = encode(folder, Conversation.from_messages(messages, tools))
    assert (rows, sum(refused.values())) == ([], 1)


def test_special_tokens_in_reasoning_and_arguments_are_found(tmp_path):
    write_tokenizer(tmp_path, replace(STYLES["thinking"], special=(*STYLES["thinking"].special, '<|"|>')))
    chat = Conversation.from_messages([USER, {**ANSWER, "reasoning_content": 'x <|"|> y'}])
    assert encode(tmp_path, chat, special="reject")[1] == {"special token in text": 1}


def test_the_generation_prompt_is_the_one_of_transformers(folder):
    template, authority = open_template(folder), AutoTokenizer.from_pretrained(folder)
    text = template.render_prompt(["Hi", "Hello", "And?"], end="")
    assert authority(text, add_special_tokens=False)["input_ids"] == asked(
        authority, Conversation(("Hi", "Hello", "And?")).to_messages(), add_generation_prompt=True
    )


def test_todays_date_is_not_in_the_data(tmp_path):
    write_tokenizer(tmp_path, STYLES["llama3_dated"])
    template = as_jinja(tmp_path)
    assert template.depends_on_date
    assert "26 Jul 2024" in template.render(CHATS["one"], end="")
    write_tokenizer(tmp_path, STYLES["llama3"])
    assert not as_jinja(tmp_path).depends_on_date


def test_an_answer_whose_prompt_has_other_tokens_alone_is_refused(tmp_path):
    """GPT-2 splits "\\n\\n" before a word into two tokens, at the end of a prompt it is one."""
    write_tokenizer(tmp_path, STYLES["llama3"], words=Regex(r" ?\p{L}+| ?[^\s\p{L}]+|\s+(?!\S)|\s+"))
    rows, refused = encode(tmp_path, CHATS["one"])
    assert (rows, list(refused.values())) == ([], [1])
    assert "generation prompt" in next(iter(refused))


def test_a_template_without_an_end_token_is_refused(tmp_path):
    style = STYLES["chatml"]
    write_tokenizer(tmp_path, type(style)(style.jinja.replace("'<|im_end|>'", "'.'"), style.special, "<|im_end|>", "x"))
    with pytest.raises(UnusableConversationError, match="without a special token"):
        as_jinja(tmp_path).sequences(CHATS["one"], per_turn=True)
