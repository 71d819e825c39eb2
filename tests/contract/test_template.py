"""The template that travels with the tokenizer says what `chat_template` says, in every engine that may run it."""

import jinja2
import jinja2.ext
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerFast

from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.conversation import Conversation
from ropeway.models.tokenizer import open_tokenizer
from tests.support.tiny_run import PARITY, copy_tokenizer

TEXTS = st.text(alphabet=st.sampled_from("ab \n\t<|>'\"{}%é漢"), max_size=12)
CONVERSATIONS = st.builds(
    Conversation,
    turns=st.lists(TEXTS, min_size=1, max_size=5).map(tuple),
    system=TEXTS,
)
# As transformers sets it up (4.34 to 5.24), but without its own {% generation %} tag.
PLAIN = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    copy_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@given(CONVERSATIONS)
def test_any_jinja_engine_renders_the_plain_template_as_training_did(conversation):
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    text = PLAIN.from_string(OPEN_ASSISTANT.plain_jinja).render(messages=conversation.to_messages(), **names)
    assert text == "<s>" + OPEN_ASSISTANT.render(conversation, end="</s>")


def test_an_engine_without_the_generation_tag_cannot_read_the_other_one():
    with pytest.raises(jinja2.TemplateSyntaxError, match="generation"):
        PLAIN.from_string(OPEN_ASSISTANT.jinja)


@given(conversation=CONVERSATIONS)
def test_transformers_renders_both_templates_as_training_did(tokenizer, conversation):
    for template in (OPEN_ASSISTANT.jinja, OPEN_ASSISTANT.plain_jinja):
        text = tokenizer.apply_chat_template(conversation.to_messages(), tokenize=False, chat_template=template)
        assert text == "<s>" + OPEN_ASSISTANT.render(conversation, end="</s>")


@given(conversation=CONVERSATIONS)
def test_transformers_ids_are_ours_with_one_bos(tokenizer, conversation):
    ours = open_tokenizer(PARITY / "tokenizer").encode(OPEN_ASSISTANT.render(conversation, end="</s>")).ids
    told = tokenizer.apply_chat_template(conversation.to_messages(), tokenize=True, return_dict=False)
    assert told == ours
    assert told.count(1) == 1


def test_the_generation_prompt_is_the_prompt_that_evaluation_uses(tokenizer):
    messages = [
        {"role": "system", "content": "S"}, {"role": "user", "content": "A"}, {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]  # fmt: skip
    told = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert told == "<s>" + OPEN_ASSISTANT.render_prompt(["A", "B", "C"], end="</s>", system="S")
    assert told.endswith("<|prompter|>C</s><|assistant|>")


def test_an_empty_system_message_is_none(tokenizer):
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "A"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s><|prompter|>A</s>"


def test_what_counts_as_the_answer_is_its_text_and_its_end_token(tokenizer):
    messages = Conversation(("Hi", "Hello there", "Why", "So")).to_messages()
    told = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=OPEN_ASSISTANT.jinja
    )
    ids, mask = told["input_ids"], told["assistant_masks"]
    answers = "".join(tokenizer.convert_ids_to_tokens([i for i, counts in zip(ids, mask, strict=True) if counts]))
    assert answers.replace("▁", " ").split("</s>")[:2] == [" Hello there", " So"]
    assert sum(i == 2 and bool(counts) for i, counts in zip(ids, mask, strict=True)) == 2
