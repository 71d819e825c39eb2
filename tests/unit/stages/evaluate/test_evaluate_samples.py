import json
import re
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel, ConfigDict
from transformers import AutoTokenizer, LlamaForCausalLM

from ropeway.models.answer_parts import ParsedAnswer, split_answer
from ropeway.models.chat_template import OPEN_ASSISTANT, open_template
from ropeway.models.conversation import Conversation
from ropeway.reporting.report_eval import render_samples
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.stages.evaluate import stage as evaluate
from ropeway.stages.evaluate.load_model import open_model
from ropeway.stages.evaluate.samples import (
    derive_seed,
    describe_prompt,
    encode_prompt,
    generate_answer,
    generate_samples,
    parse_generation_configs,
    parse_prompts,
    plan_samples,
    report_samples,
)
from tests.support.chat_templates import STYLES, write_tokenizer
from tests.support.tiny_run import make_run

ROOT = Path(__file__).parents[4]
SAMPLING = ROOT / "configs" / "sampling.json"
WAYS = {
    name: {**arguments, "max_new_tokens": 8}
    for name, arguments in parse_generation_configs(SAMPLING.read_text(), "sampling.json").items()
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    workspace, profile = make_run(tmp_path_factory.mktemp("run"))
    return workspace, profile, *open_model(workspace.model, like=workspace.model)


def always(model, *ids):
    """Return a copy of the model that generates these tokens for every prompt."""
    copy = LlamaForCausalLM(model.config).eval()
    forward = copy.forward
    said = iter(ids)

    def speak(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor(next(said)), out.logits.shape[-1]).float() * 99
        return out

    copy.forward = speak
    return copy


def test_greedy_answers_are_the_argmax_token_by_token(opened):
    _, _, model, tokenizer = opened
    ids = encode_prompt(tokenizer, OPEN_ASSISTANT, "What is a list?")
    row = list(ids)
    for _ in range(8):
        with torch.inference_mode():
            row.append(int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        if row[-1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(row[len(ids) :], skip_special_tokens=True)
    assert (
        generate_answer(model, tokenizer, ids, {"max_new_tokens": 8, "do_sample": False, "num_beams": 1}, seed=0)
        == expected
    )


def test_an_answer_ends_at_eos_and_does_not_include_it(opened):
    _, _, model, tokenizer = opened
    word = tokenizer.encode("even", add_special_tokens=False)[0]
    speaker = always(model, word, word, tokenizer.eos_token_id)  # a fourth token would exhaust it
    text = generate_answer(
        speaker,
        tokenizer,
        encode_prompt(tokenizer, OPEN_ASSISTANT, "Hi"),
        {"max_new_tokens": 8, "do_sample": False},
        seed=0,
    )
    assert text.split() == tokenizer.decode([word, word]).split()


def test_an_id_of_the_padded_vocabulary_decodes_to_nothing(opened):
    _, _, model, tokenizer = opened
    speaker = always(model, 2010, 2010, tokenizer.eos_token_id)
    ids = encode_prompt(tokenizer, OPEN_ASSISTANT, "Hi")
    assert generate_answer(speaker, tokenizer, ids, {"max_new_tokens": 8, "do_sample": False}, seed=0) == ""


def test_a_prompt_uses_the_models_template_with_one_bos(opened):
    _, _, _, tokenizer = opened
    ids = encode_prompt(tokenizer, OPEN_ASSISTANT, "Hi")
    assert ids.count(1) == 1
    assert ids[:2] == [1, 2000]
    assert ids[-2:] == [2, 2001]
    messages = [{"role": "user", "content": "Hi"}]
    told = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert told == ids


def test_a_tokenizer_that_adds_no_bos_is_refused(opened):
    workspace, *_ = opened
    tokenizer = AutoTokenizer.from_pretrained(workspace.model)
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(DataError, match=r"expected one BOS \(id 1\).*found 0 in ids \[2000"):
        encode_prompt(tokenizer, OPEN_ASSISTANT, "Hi")


def test_sampled_answers_are_reproducible_and_restore_the_global_generator(opened):
    _, _, model, tokenizer = opened
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draws = plan_samples(["Hi", "Why?"], WAYS)
    first, second = (generate_samples(model, tokenizer, OPEN_ASSISTANT, draws, WAYS, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == second
    assert generate_samples(model, tokenizer, OPEN_ASSISTANT, draws[::-1], WAYS, seed=3) == first[::-1]
    other = dict(zip(draws, generate_samples(model, tokenizer, OPEN_ASSISTANT, draws, WAYS, seed=4), strict=True))
    same = {draw for draw, text in zip(draws, first, strict=True) if other[draw] == text}
    assert {("Hi", "greedy"), ("Why?", "greedy")} <= same
    assert not {("Hi", "k50"), ("Why?", "k50")} & same


def test_seeds_depend_only_on_the_run_s_seed_and_the_names():
    assert derive_seed(1, "k50", "Hi") == 8363188654836202129
    assert derive_seed(1, "k50", "Hi") != derive_seed(2, "k50", "Hi")


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class SamplingResult(Strict):
    """Open-Assistant's classes (sampling_report.py, July 2023), with unknown keys forbidden."""

    sampling_config: str
    sampling_params: dict
    outputs: list[str]


class PromptResults(Strict):
    prompt: str
    results: list[SamplingResult]


class SamplingReport(Strict):
    model_name: str
    date: str
    args: dict
    prompts: list[PromptResults]


def test_samples_json_has_the_format_of_open_assistant_s_viewers(tmp_path):
    workspace, profile = make_run(tmp_path)
    evaluate.run(workspace, profile)
    report = SamplingReport.model_validate_json(workspace.samples.read_bytes())
    assert report.model_name == "tiny-3"
    assert report.date == ""
    assert report.args["config"] == "configs/sampling.json"
    assert [one.prompt for one in report.prompts] == ["What is a list?", "How are you?"]
    names = ["default", "k50", "beam5", "magic_numbers", "typical95", "greedy"]
    for one in report.prompts:
        assert [result.sampling_config for result in one.results] == [
            f"{model}/{name}" for model in ("base", "tuned") for name in names
        ]
        for result in one.results:
            assert result.sampling_params["max_new_tokens"] == 8
            assert len(result.outputs) == 1
            assert "</s>" not in result.outputs[0]
    page = render_samples(json.loads(workspace.samples.read_bytes()))
    assert all(f'value="{name}"' in page for name in names)


def test_the_shipped_configurations_are_open_assistant_s():
    ways = parse_generation_configs(SAMPLING.read_text(), "sampling.json")
    drawn = {"do_sample": True, "temperature": 1.0}
    # Source: Open-Assistant, model_eval/manual/config/default.json; there each has min_new_tokens 5 as well.
    assert ways == {
        "default": drawn,
        "k50": {**drawn, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.2},
        "beam5": {**drawn, "temperature": 0.8, "top_p": 0.9, "num_beams": 5},
        "magic_numbers": {**drawn, "top_k": 9607, "top_p": 0.242},
        "typical95": {**drawn, "top_k": 1000, "top_p": 0.95, "typical_p": 0.95, "repetition_penalty": 1.2},
        "greedy": {"do_sample": False, "temperature": 1.0, "num_beams": 1},
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "expected {default: {generate_args}, configurations"),
        ('{"default": {"generate_args": {}}}', "KeyError: 'configurations'"),
        ('{"default": {"generate_args": {}}, "configurations": []}', "unique names, found 0"),
        (
            '{"default": {"generate_args": {}}, "configurations": [{"name": "a", "generate_args": {"topk": 5}}]}',
            "a: generate_args: topk is unknown to transformers",
        ),
        (
            '{"default": {"generate_args": {"max_length": 5}}, "configurations": [{"name": "a", "generate_args": {}}]}',
            "max_length is set by params",
        ),
    ],
)
def test_an_invalid_configurations_file_is_an_error(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_generation_configs(text, "sampling.json")


def test_the_page_escapes_all_text_and_shows_models_side_by_side():
    bad = "</script><img src=x onerror=alert(1)>&"
    results = [
        {"sampling_config": f"{model}/greedy", "sampling_params": {"do_sample": False}, "outputs": [text]}
        for model, text in (("base", bad), ("tuned", ""))
    ]
    page = render_samples({"model_name": "<m>", "args": {"a": bad}, "prompts": [{"prompt": bad, "results": results}]})
    assert "<img" not in page
    assert page.count("</script>") == 1
    assert page.count("&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;&amp;") == 3
    assert page.index('class="model">base') < page.index('class="model">tuned')
    assert page.count('class="nothing"') == 1


@pytest.mark.parametrize(
    "text", ["\ud83d half", "\u202egnp.exe", "\x1b[2J\x00", "x" * 100_000, "\u05e9\u05dc\u05d5\u05dd {{ 7 * 7 }}"]
)
def test_the_page_shows_any_text_and_stays_valid_utf_8(text):
    results = [{"sampling_config": "tuned/greedy", "sampling_params": {}, "outputs": [text]}]
    page = render_samples({"model_name": text, "args": {"a": text}, "prompts": [{"prompt": text, "results": results}]})
    assert page.encode().decode() == page
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", page)
    for character in set(text) & set("\ud83d\u202e\x1b\x00"):
        assert f"U+{ord(character):04X}" in page
    if text.isprintable():
        assert page.count(text) >= 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('"a"\nb\n', "prompts.jsonl:2: expected a JSON string, .*, found b"),
        ("{}\n", "prompts.jsonl:1: expected a JSON"),
        ("\n", "no prompts"),
    ],
)
def test_an_invalid_prompts_file_is_an_error_with_the_line_number(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_prompts(text, "prompts.jsonl")


CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "rope"}}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
QUESTION = {
    "tools": [TOOL],
    "messages": [
        {"role": "user", "content": "What is a rope?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "look_up", "content": "A line."},
    ],
}


def test_a_prompt_may_have_several_messages_and_tools():
    plain, many, asked = parse_prompts(
        "\n".join(json.dumps(one) for one in ("Hi", {"messages": QUESTION["messages"][:1]}, QUESTION)), "p.jsonl"
    )
    assert plain == "Hi"
    assert many == Conversation(("What is a rope?",))
    assert asked.read_form()["tools"] == [TOOL]
    assert describe_prompt(asked).splitlines() == [
        "tools: look_up",
        "user: What is a rope?",
        'assistant: look_up({"word": "rope"})',
        "tool: A line.",
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"metadata": 1}, "'metadata'"),
        ({"messages": [{"role": "user", "content": "Hi", "weight": 0}]}, "'weight'"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "one of the roles"),
        ({"messages": [{"role": "user", "content": 3}]}, "has texts"),
        ({"messages": [{"role": "user"}]}, "has texts"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]}, "the last message"),
        ({"messages": []}, "expected"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
            "calls",
        ),
        ({"tools": {"name": "f"}}, "tools are a list"),
    ],
)
def test_what_a_prompt_would_lose_is_refused(change, named):
    with pytest.raises(ConfigError, match=rf"p\.jsonl:1: .*{named}"):
        parse_prompts(json.dumps({**QUESTION, **change}), "p.jsonl")


def test_a_prompt_that_the_template_cannot_write_is_refused_by_its_part(opened, tmp_path):
    _, _, _, tokenizer = opened
    (asked,) = parse_prompts(json.dumps(QUESTION), "p.jsonl")
    with pytest.raises(ConfigError, match="template open_assistant has no tools"):
        encode_prompt(tokenizer, OPEN_ASSISTANT, asked)
    assert encode_prompt(tokenizer, OPEN_ASSISTANT, Conversation(("Hi",))) == encode_prompt(
        tokenizer, OPEN_ASSISTANT, "Hi"
    )
    found = {}
    for name in ("thinking", "chatml"):
        (tmp_path / name).mkdir()
        write_tokenizer(tmp_path / name, STYLES[name])
        found[name] = (AutoTokenizer.from_pretrained(tmp_path / name), open_template(tmp_path / name))
    ids = encode_prompt(*found["thinking"], asked)
    text = found["thinking"][0].decode(ids)
    assert text.startswith("<|im_start|>system\n# Tools")
    assert text.endswith("A line.\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    (offered,) = parse_prompts(json.dumps({**QUESTION, "messages": QUESTION["messages"][:1]}), "p.jsonl")
    with pytest.raises(ConfigError, match="no place for tools"):
        encode_prompt(*found["chatml"], offered)


def test_an_answer_with_parts_has_them_beside_its_whole_text():
    texts = {"tuned": "<think>Hm</think>Yes", "base": "Yes"}
    answers = {name: [ParsedAnswer(text, split_answer(text))] for name, text in texts.items()}
    report = report_samples("m", ["Hi"], {"greedy": {}}, answers, {})
    tuned, base = report["prompts"][0]["results"]
    assert (tuned["outputs"], base["outputs"]) == ([texts["tuned"]], [texts["base"]])
    assert [part["kind"] for part in tuned["parts"][0]] == ["reasoning", "text"]
    assert "parts" not in base
