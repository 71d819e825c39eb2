"""A chat template that loops or fills the memory is refused by name, in bounded time and memory."""

import pytest

from ropeway.models import template_limits
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.conversation import Conversation
from ropeway.models.jinja_template import JinjaTemplate
from ropeway.models.open_model import load_tokenizer
from ropeway.models.tokenizer import LLAMA_SPECIAL, train_tokenizer, write_tokenizer
from ropeway.runtime.errors import ConfigError

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a * b %}{% endfor %}{% endfor %}"
DOUBLES = "{% set n = namespace(x='abcdefgh') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
GOOD = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
TALK = Conversation(("hello", "yes"), "be kind")


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 1)
    monkeypatch.setattr(template_limits, "MEMORY_BYTES", 64 << 20)


@pytest.mark.parametrize(("text", "what"), [(LOOPS, "1 s"), (DOUBLES, "memory")], ids=["loops", "doubles"])
def test_a_template_without_bounds_is_refused_by_name(text, what):
    template = JinjaTemplate(text + GOOD, {"eos": "</s>"}, ["</s>"], name="hostile.jinja")
    for render in (template.render, template.render_question):
        with pytest.raises(ConfigError, match=f"'hostile.jinja'.*{what}"):
            render(TALK, end="</s>")


def test_a_template_is_rendered_in_a_child_process_once(monkeypatch):
    template = JinjaTemplate(GOOD + "{# once #}", {"eos": "</s>"}, ["</s>"])
    assert template.render(TALK, end="</s>") == "<system>be kind</s><user>hello</s><assistant>yes</s>"
    monkeypatch.setattr(template_limits.os, "fork", None)
    template.render(TALK, end="</s>")


@pytest.fixture
def folder(tmp_path):
    """Return the function that writes the tokenizer of a package with this template."""

    def write(template):
        tokenizer = train_tokenizer(["hello hello"], vocab_size=269)
        write_tokenizer(tmp_path, tokenizer, LLAMA_SPECIAL, OPEN_ASSISTANT, max_length=64)
        (tmp_path / "chat_template.jinja").write_text(template)
        return tmp_path

    return write


@pytest.mark.parametrize(("text", "what"), [(LOOPS, "1 s"), (DOUBLES, "memory")], ids=["loops", "doubles"])
def test_a_packages_template_without_bounds_is_refused_when_its_tokenizer_is_loaded(folder, text, what):
    refuses_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    for template in (text + GOOD, refuses_system + text):
        with pytest.raises(ConfigError, match=f"default.*{what}"):
            load_tokenizer(folder(template))


def test_a_packages_template_within_limits_is_loaded(folder):
    messages = TALK.to_messages()
    assert "<user>hello</s>" in load_tokenizer(folder(GOOD)).apply_chat_template(messages, tokenize=False)
