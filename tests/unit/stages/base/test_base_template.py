"""The template of a run: chosen by params, proved on the base's tokenizer before anything is tokenized."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.jinja_template import JinjaTemplate, find_own_templates
from ropeway.models.tokenizer import open_tokenizer, read_response_template, read_special_names
from ropeway.runtime.errors import ConfigError
from ropeway.stages.base.base_template import (
    BaseTokenizer,
    choose_template,
    describe_template,
    find_replaced_template,
    prove_template,
)
from ropeway.stages.base.stage import write_base_tokenizer
from ropeway.stages.package.model_config import plan_tokenizer_config
from tests.support.chat_templates import STYLES, write_tokenizer


def opened_from(folder, style):
    write_tokenizer(folder, style)
    return BaseTokenizer(open_tokenizer(folder), read_special_names(folder), templates=find_own_templates(folder))


def wanted(template):
    return SimpleNamespace(template=template, model_name="some/model")


@pytest.mark.parametrize("name", STYLES)
def test_a_bases_own_template_is_kept_and_its_end_token_found(tmp_path, name):
    opened = opened_from(tmp_path, STYLES[name])
    template = choose_template(wanted("base"), tmp_path, opened)
    assert (template.jinja, template.added_tokens) == (STYLES[name].jinja, ())
    facts = prove_template(template, opened, name="base")
    assert facts["end"] == STYLES[name].end
    assert facts["rewrites_history"] == (name == "thinking")
    assert (facts["date"] is not None) == (name == "llama3_dated")
    assert facts["replaces_own"] is False


RESPONSE = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {"content": {"close": "<|im_end|>", "content": "text"}},
}


def test_how_a_base_says_its_answers_are_parsed_goes_to_the_package_with_its_own_template_only(tmp_path):
    folder = tmp_path / "origin"
    folder.mkdir()
    opened = opened_from(folder, STYLES["chatml"])
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "response_template": RESPONSE}))
    opened = replace(opened, response_template=read_response_template(folder))
    own = choose_template(wanted("base"), tmp_path, opened)
    for name, template, stays in (
        ("own", own, True),
        ("other", opened.in_jinja(STYLES["smol"].jinja, name="f"), False),
    ):
        (tmp_path / name).mkdir()
        write_base_tokenizer(tmp_path / name, opened, template, max_length=99)
        written = json.loads((tmp_path / name / "tokenizer_config.json").read_bytes())
        packaged = plan_tokenizer_config(written, template, max_length=99)
        assert (written.get("response_template"), packaged.get("response_template")) == (
            RESPONSE if stays else None,
        ) * 2
    assert AutoTokenizer.from_pretrained(tmp_path / "own").response_template == RESPONSE


def test_the_published_template_replaces_the_bases_own_and_says_so(tmp_path):
    opened = opened_from(tmp_path, STYLES["chatml"])
    template = choose_template(wanted("open_assistant"), tmp_path, opened)
    assert template is OPEN_ASSISTANT
    facts = prove_template(template, opened, name="open_assistant")
    assert facts["replaces_own"]
    assert "own chat template is replaced" in describe_template(facts)


def test_a_base_without_a_template_cannot_keep_it(tmp_path):
    opened = opened_from(tmp_path, STYLES["chatml"])
    with pytest.raises(ConfigError, match=r"expected a chat template of some/model .* found none"):
        choose_template(wanted("base"), tmp_path, BaseTokenizer(opened.tokenizer, opened.names))


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        ("{{ bos_token }}" + STYLES["llama3"].jinja, "two <|begin_of_text|>"),
        (STYLES["llama3"].jinja.replace("+ '<|eot_id|>'", ""), "without a special token"),
        (STYLES["llama3"].jinja.replace("assistant<|end_header_id|>", "model<|end_header_id|>"), "does not begin as"),
        ("{{ nothing.at.all }}", "the template refuses it"),
        ("{% for", "the template refuses it"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused_by_name(tmp_path, jinja, reason):
    opened = opened_from(tmp_path, STYLES["llama3"])
    special = [token.content for token in opened.tokenizer.get_added_tokens_decoder().values()]
    template = JinjaTemplate(jinja, opened.names, special)
    with pytest.raises(ConfigError) as caught:
        prove_template(template, opened, name="my.jinja")
    assert reason in str(caught.value)
    assert "my.jinja" in str(caught.value)


def test_a_replaced_template_that_can_ask_is_kept_for_the_evaluation_of_the_base(tmp_path, capsys):
    opened = opened_from(tmp_path, STYLES["chatml"])
    assert find_replaced_template(OPEN_ASSISTANT, opened) == STYLES["chatml"].jinja
    own = choose_template(wanted("base"), tmp_path, opened)
    assert find_replaced_template(own, opened) is None
    broken = BaseTokenizer(opened.tokenizer, opened.names, templates={"default": "{{ nothing.at.all }}"})
    assert find_replaced_template(OPEN_ASSISTANT, broken) is None
    assert "evaluation asks it in the run's template" in capsys.readouterr().out


def test_of_several_templates_the_default_is_taken_and_the_others_are_named(tmp_path):
    write_tokenizer(tmp_path, STYLES["chatml"])
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    chatml, other = STYLES["chatml"].jinja, STYLES["smol"].jinja
    listed = [{"name": "tool_use", "template": other}, {"name": "default", "template": chatml}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": listed}))
    opened = BaseTokenizer(
        open_tokenizer(tmp_path), read_special_names(tmp_path), templates=find_own_templates(tmp_path)
    )
    template = choose_template(wanted("base"), tmp_path, opened)
    assert template.jinja == chatml
    facts = prove_template(template, opened, name="base")
    assert facts["not_kept"] == ["tool_use"]
    assert "tool_use" in describe_template(facts)
    unnamed = replace(opened, templates={"rag": other, "tool_use": other})
    with pytest.raises(ConfigError, match=r"found several and none named default \(rag, tool_use\)"):
        choose_template(wanted("base"), tmp_path, unnamed)
