import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ropeway.models import chat_template
from ropeway.models.chat_template import OPEN_ASSISTANT, ChatTemplate, Speaker, open_template
from ropeway.models.conversation import Conversation
from ropeway.models.tokenizer import (
    open_tokenizer,
    prepare_tokenizer,
    read_special,
    read_special_names,
    write_tokenizer,
)
from ropeway.runtime.errors import DataError
from ropeway.stages.evaluate.samples import encode_prompt
from ropeway.stages.package.model_config import plan_tokenizer_config
from ropeway.stages.tokenize.encode import Encoder
from tests.support.raw_records import TOKENIZER

PROMPTER, ASSISTANT, SYSTEM = "<|prompter|>", "<|assistant|>", "<|system|>"

texts = st.text(max_size=12)
talks = st.builds(Conversation, st.lists(texts, max_size=6).map(tuple), texts)


def test_the_cards_two_templates_are_rendered_letter_for_letter():
    assert (
        OPEN_ASSISTANT.render_prompt(["user prompt"], end="</s>", system="system message")
        == "<|system|>system message</s><|prompter|>user prompt</s><|assistant|>"
    )
    assert (
        OPEN_ASSISTANT.render_prompt(["Q1", "A1", "Q2"], end="</s>", system="system message")
        == "<|system|>system message</s><|prompter|>Q1</s><|assistant|>A1</s><|prompter|>Q2</s><|assistant|>"
    )


def test_an_empty_system_message_is_left_out_and_a_blank_one_is_not():
    assert OPEN_ASSISTANT.render(Conversation(("q",), ""), end="</s>") == "<|prompter|>q</s>"
    assert OPEN_ASSISTANT.render(Conversation(("q",), " "), end="</s>") == "<|system|> </s><|prompter|>q</s>"


def test_without_turns_nothing_is_left_not_even_the_system_message():
    assert OPEN_ASSISTANT.render(Conversation((), "alone"), end="</s>") == ""


def test_the_role_tokens_stand_in_the_fixed_order_that_makes_their_ids():
    assert OPEN_ASSISTANT.added_tokens == (
        "<|prompter|>",
        "<|assistant|>",
        "<|system|>",
        "<|prefix_begin|>",
        "<|prefix_end|>",
    )
    assert OPEN_ASSISTANT.added_tokens[:3] == (PROMPTER, ASSISTANT, SYSTEM)


@given(talks)
def test_turns_alternate_and_every_one_ends_with_the_end_token(talk):
    turns = OPEN_ASSISTANT.render_turns(talk, end="§")
    assert len(turns) == len(talk.turns)
    assert all(turn.endswith(text + "§") for turn, text in zip(turns, talk.turns, strict=True))
    opened = [
        turn.removeprefix(f"{SYSTEM}{talk.system}§") if number == 0 else turn for number, turn in enumerate(turns)
    ]
    roles = [PROMPTER, ASSISTANT] * 3
    assert all(turn.startswith(role) for turn, role in zip(opened, roles[: len(opened)], strict=True))


@given(talks)
def test_a_prompt_is_the_conversation_so_far_and_an_open_answer(talk):
    prompt = OPEN_ASSISTANT.render_prompt(talk.turns, end="§", system=talk.system)
    assert prompt == OPEN_ASSISTANT.render(talk, end="§") + ASSISTANT


@pytest.fixture(scope="module")
def rendered_by_transformers():
    """The template as transformers' own sandbox renders it, {% generation %} and all."""
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}

    def rendered(talk, **options):
        messages = [{"role": "system", "content": talk.system}]
        messages += [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(talk.turns)]
        (text,), marked = render_jinja_template([messages], chat_template=OPEN_ASSISTANT.jinja, **special, **options)
        return text, marked

    return rendered


@given(talk=talks)
def test_the_exported_template_renders_what_training_saw(rendered_by_transformers, talk):
    if not talk.turns:  # such a conversation is refused; the template would keep its system message
        return
    assert rendered_by_transformers(talk)[0] == "<s>" + OPEN_ASSISTANT.render(talk, end="</s>")
    prompt = OPEN_ASSISTANT.render_prompt(talk.turns, end="</s>", system=talk.system)
    assert rendered_by_transformers(talk, add_generation_prompt=True)[0] == "<s>" + prompt


def test_the_template_puts_no_bos_where_none_is_wanted(rendered_by_transformers):
    assert rendered_by_transformers(Conversation(("q",)), add_bos=False)[0] == "<|prompter|>q</s>"


@given(talk=talks)
def test_the_template_marks_answers_with_their_end_as_generated(rendered_by_transformers, talk):
    text, (marks,) = rendered_by_transformers(talk, return_assistant_tokens_mask=True)
    assert [text[begin:end] for begin, end in marks] == [answer + "</s>" for answer in talk.turns[1::2]]


def test_the_digest_is_that_of_the_template_everyone_has():
    assert OPEN_ASSISTANT.digest == "5d528d31ba713351f7a4b69866922597af3165cafdcd82ce0309a19009eb2c00"


class Lines(ChatTemplate):
    """A template of one line per message, in which only the assistant's tokens follow its mark."""

    name = "lines"
    generation_prompt = "<|say|>"
    added_tokens = ("<|ask|>", "<|say|>")
    jinja = (
        "{%- for message in messages -%}{%- if message['role'] == 'user' -%}{{- '<|ask|>' + message['content'] -}}"
        "{%- else -%}{{- '<|say|>' -}}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
        "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|say|>' -}}{%- endif -%}"
    )

    def render_turns(self, conversation, *, end):
        return [f"<|say|>{text}{end}" if at % 2 else f"<|ask|>{text}" for at, text in enumerate(conversation.turns)]

    def speakers(self, tokens, lengths=None, *, ids):
        assert lengths is None or len(lengths) == 1
        said = np.cumsum(tokens == ids["<|say|>"]) >= np.cumsum(tokens == ids["<|ask|>"])
        return np.where(said, Speaker.ASSISTANT, Speaker.USER).astype(np.uint8)


def test_a_template_of_its_own_class_decides_tokens_masks_prompts_and_the_export(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "TEMPLATES", (OPEN_ASSISTANT, lines := Lines()))
    tokenizer, names = open_tokenizer(TOKENIZER), read_special_names(TOKENIZER)
    prepare_tokenizer(tokenizer, names, lines)
    write_tokenizer(tmp_path, tokenizer, names, lines, max_length=64)
    assert open_template(tmp_path) is lines
    special = read_special(tmp_path, tokenizer, lines)
    talk = Conversation(("Hi", "Hello"))
    (encoded,) = Encoder(tokenizer, special, lines, None, "parse").encode_batches([talk])
    assert encoded.tokens.tolist() == tokenizer.encode("<|ask|>Hi<|say|>Hello</s>").ids
    begins = encoded.tokens.tolist().index(special["<|say|>"])
    assert encoded.kinds[begins:].tolist() == [Speaker.ASSISTANT] * (len(encoded.tokens) - begins)
    others = AutoTokenizer.from_pretrained(tmp_path)
    assert encode_prompt(others, lines, "Hi") == tokenizer.encode("<|ask|>Hi<|say|>").ids
    config = plan_tokenizer_config({"bos_token": "<s>"}, lines, max_length=64)
    assert config["additional_special_tokens"] == ["<|ask|>", "<|say|>"]
    assert "generation -" not in config["chat_template"]
    told = others.apply_chat_template(talk.to_messages(), tokenize=False, chat_template=config["chat_template"])
    assert told == "<|ask|>Hi<|say|>Hello</s>"


def test_a_folder_with_no_template_or_an_unknown_one_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"chat_template\.jinja: .*found no file"):
        open_template(tmp_path)
    for changed in (OPEN_ASSISTANT.jinja + " ", OPEN_ASSISTANT.jinja[:-1], ""):
        (tmp_path / "chat_template.jinja").write_text(changed)
        with pytest.raises(DataError, match=r"differs from template open_assistant at character"):
            open_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(DataError, match=r"chat_template\.jinja: cannot be read"):
        open_template(tmp_path)
