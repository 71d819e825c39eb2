"""Reasoning and tool calls in the dialog: what is shown, and what the model gets back."""

import io
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from ropeway.cli.answer_display import AnswerDisplay, is_colorful
from ropeway.cli.chat import ChatSession, GenerationSettings, _stream, chat, load_tools
from ropeway.models.answer_parts import split_answer
from ropeway.runtime.errors import ConfigError
from tests.support.chat_templates import CHATML, STYLES, Style, write_tokenizer

SETTINGS = GenerationSettings("", 64, 0.0, 1.0, 0)
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"word": "rope"}}\n</tool_call>'
KEEPS_BOTH = (
    CHATML.replace("message['content']", "(message.reasoning_content or '') + (message['content'] or '')")
    .replace("{%- for message", "{{- tools | tojson if tools else '' -}}{%- for message", 1)
    .replace("'<|im_end|>'", "(message.tool_calls | tojson if message.tool_calls else '') + '<|im_end|>'", 1)
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "[THINK]", "[/THINK]")


def make_model(folder, jinja):
    folder.mkdir()
    write_tokenizer(folder, Style(jinja, SPECIAL, "<|im_end|>", "<|im_end|>"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=400, max_position_embeddings=4096, bos_token_id=None, eos_token_id=[256, 257], **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    templates = {"thinking": STYLES["thinking"].jinja, "chatml": CHATML, "keeps": KEEPS_BOTH}
    return {name: make_model(root / name, jinja) for name, jinja in templates.items()}


def scripted(folder, answers, tools=()):
    """Return a session whose model says these texts, and the list of prompts that it gets."""
    session, prompts, left = ChatSession(folder, SETTINGS, tools), [], iter(answers)
    tokenizer = session._tokenizer

    def generate(ids, write):
        prompts.append(tokenizer.decode(ids))
        said = tokenizer(next(left), add_special_tokens=False)["input_ids"]
        stream = _stream(tokenizer, write, session._ends())
        stream.put(torch.tensor([ids]))
        for number in said:
            stream.put(torch.tensor([number]))
        stream.end()
        return said

    session._generate = generate
    return session, prompts


def through_pipe(session, text, *, as_json=False):
    out = io.StringIO()
    chat(session, io.StringIO(text), out, as_json=as_json)
    return [json.loads(line) for line in out.getvalue().splitlines()] if as_json else out.getvalue()


class Terminal(io.StringIO):
    """An output that says it is a terminal."""

    def isatty(self):
        return True


def display(text, *, out=None, size=1, **options):
    out = out or io.StringIO()
    shown = AnswerDisplay(out, **options)
    for at in range(0, len(text), size):
        shown.feed(text[at : at + size])
    shown.finish(split_answer(text, prompt=options.get("prompt", "")))
    return out.getvalue()


PLAIN = '[reasoning] Hm.\n[answer] I look.\n[tool call: look_up]\n  {\n    "word": "rope"\n  }\n'


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("is_held", [False, True])
def test_parts_are_shown_apart_in_pieces_of_any_size(size, is_held):
    text = f"<think>Hm.</think>\n\nI look.{CALL}"
    assert display(text, size=size, is_held=is_held).replace("reasoning (<think>)", "reasoning") == PLAIN
    opened = display(f"Hm.</think>I look.{CALL}", size=size, prompt="<think>\n", is_held=is_held)
    assert opened.replace("reasoning (<think>)", "reasoning") == PLAIN


def test_a_terminal_obeys_no_control_character_of_an_answer():
    hostile = "a\x1b]52;c;eA==\x07\x9b31m\u202eb\r\x00\U0001f468\u200d\U0001f469\tc\nd"
    shown = display(f"<think>{hostile}</think>{hostile}", out=Terminal())
    safe = r"a\x1b]52;c;eA==\x07\x9b31m\u202eb\r\x00" + "\U0001f468\u200d\U0001f469\tc\nd"
    assert shown == f"[reasoning] {safe}\n[answer] {safe}\n"
    assert hostile in display(hostile), "a pipe gets what the model said"


def test_only_reasoning_is_dimmed():
    text = display("<think>Hm.</think>Yes.", size=100, is_colorful=True)
    assert text == "\x1b[2m[reasoning] \x1b[0m\x1b[2mHm.\x1b[0m\n[answer] Yes.\n"
    assert "\x1b" not in display("<think>Hm.</think>Yes.")


@given(st.text("<think>/ab[_cal\n", max_size=40).filter(lambda text: len(split_answer(text)) == 1), st.integers(1, 5))
def test_a_text_without_parts_is_shown_as_it_is(text, size):
    if split_answer(text)[0].kind == "text":
        assert display(text, size=size) == f"{text}\n"


def test_colors_are_for_terminals_that_have_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert is_colorful(Terminal())
    assert not is_colorful(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not is_colorful(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not is_colorful(Terminal())


def test_the_template_decides_what_of_the_reasoning_stays_in_the_history(models):
    said = ["<think>\nHm.\n</think>\n\nYes.<|im_end|>", "No.<|im_end|>"]
    for name, stays in (("thinking", False), ("keeps", True)):
        session, prompts = scripted(models[name], said)
        through_pipe(session, "Hi\nWhy?\n")
        assert session.messages[1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
        assert ("Hm." in prompts[1]) == stays
        assert "<think>" not in prompts[1]


def test_a_template_without_a_place_for_reasoning_gets_the_answer_as_it_was(models):
    session, prompts = scripted(models["chatml"], ["<think>Hm.</think>Yes.<|im_end|>", "No.<|im_end|>"])
    through_pipe(session, "Hi\nWhy?\n")
    assert "<think>Hm.</think>Yes.<|im_end|>" in prompts[1]


def test_markers_that_are_special_tokens_are_shown_as_parts(models):
    session, _ = scripted(models["chatml"], ["[THINK]Hm[/THINK]Yes<|im_end|>"])
    assert through_pipe(session, "Hi\n") == "[reasoning] Hm\n[answer] Yes\n"


def test_json_has_the_whole_text_and_the_parts(models):
    session, _ = scripted(models["chatml"], ["<think>Hm<|im_end|>", "Yes<|im_end|>"])
    first, second = through_pipe(session, "Hi\nWhy?\n", as_json=True)
    assert first["answer"] == "<think>Hm"
    assert first["parts"] == [{"kind": "reasoning", "text": "Hm", "marker": "<think>", "finished": False}]
    assert (second["answer"], "parts" in second) == ("Yes", False)


def test_a_result_goes_back_to_the_model_once_all_calls_have_one(models, capsys):
    session, prompts = scripted(models["thinking"], [f"{CALL}\n{CALL}<|im_end|>", "A line.<|im_end|>"], TOOLS)
    text = through_pipe(session, 'What?\n/tool look_up {"means": "line"}\n/tool look_up a line\n')
    assert text.endswith("\nA line.\n")
    assert text.count("[tool call: look_up]") == 2
    assert len(prompts) == 2
    assert prompts[0].startswith("<|im_start|>system\n# Tools")
    assert prompts[1].index('{"means": "line"}') < prompts[1].index("a line\n</tool_response>")
    calls = session.messages[1]["tool_calls"]
    assert [one["tool_call_id"] for one in session.messages[2:4]] == [call["id"] for call in calls]
    assert len({call["id"] for call in calls}) == 2
    assert session.pending_calls == []
    assert "(calls without a result: look_up)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="/tool look_up: no call waits"):
        session.give_result("look_up", "x", print)


def test_tools_are_refused_by_name_where_the_template_has_no_place(models):
    with pytest.raises(ConfigError, match="no place for tools"):
        ChatSession(models["chatml"], SETTINGS, TOOLS)
    described = [{"type": "function", "function": {**TOOLS[0]["function"], "description": "Look"}}]
    assert ChatSession(models["thinking"], SETTINGS, described).tools == described


@pytest.mark.parametrize("text", ["{", "[]", "[1]", '[{"name": ""}]', '{"a": 1}'])
def test_a_file_without_tools_is_an_error_with_its_name(tmp_path, text):
    (tmp_path / "tools.json").write_text(text)
    with pytest.raises(ConfigError, match=r"tools\.json: "):
        load_tools(tmp_path / "tools.json")


def test_tools_are_read_in_each_known_form(tmp_path):
    (tmp_path / "t.json").write_text('[{"name": "f", "input_schema": {"type": "object"}}]')
    assert load_tools(tmp_path / "t.json") == [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    ]


def test_any_end_token_of_the_model_ends_an_answer(models):
    session = ChatSession(models["chatml"], GenerationSettings("", 5, 0.0, 1.0, 0))
    for end in session._ends():
        head = torch.zeros_like(session._model.lm_head.weight)
        session._model.get_input_embeddings().weight.data[:] = 1
        session._model.model.norm.weight.data[:] = 1
        for layer in session._model.model.layers:
            for weight in layer.parameters():
                weight.data[:] = 0
        head[end] = 1
        session._model.lm_head.weight.data = head
        answer = session.ask("Hi", lambda _: None)
        assert (answer.tokens, answer.ended, answer.text) == (1, True, "")
        session.begin()
    assert len(session._ends()) == 2
