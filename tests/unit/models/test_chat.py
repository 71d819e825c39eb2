import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.models.chat_template import OPEN_ASSISTANT, open_template
from ropeway.models.conversation import Conversation
from ropeway.runtime.errors import DataError
from tests.support.tiny_run import copy_tokenizer

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


def test_a_folder_without_a_readable_template_is_refused_and_another_one_is_not_the_published_one(tmp_path):
    with pytest.raises(DataError, match=r"chat_template\.jinja: .*found no file"):
        open_template(tmp_path)
    copy_tokenizer(tmp_path)
    for changed in (OPEN_ASSISTANT.jinja + " ", OPEN_ASSISTANT.jinja[:-1], ""):
        (tmp_path / "chat_template.jinja").write_text(changed)
        assert open_template(tmp_path).digest != OPEN_ASSISTANT.digest
    (tmp_path / "chat_template.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(DataError, match=r"chat_template\.jinja: cannot be read"):
        open_template(tmp_path)
