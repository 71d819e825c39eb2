"""Runs with the base model's own chat template, from chats with tools and reasoning to the published package."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from ropeway.data.shards import Kind, open_shards
from ropeway.runtime.manifest import load_manifest
from tests.support.chat_templates import STYLES, write_tokenizer
from tests.support.whole_run import jsonl, make_workspace, run_all, say

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def chats(style):
    """Chats as a style can write them: with reasoning, calls and weights for `thinking`."""
    for number in range(40):
        ask, answer = {"role": "user", "content": say(number, 5)}, {"role": "assistant", "content": say(number + 9, 6)}
        if style == "thinking" and number % 2:
            call = {"function": {"name": "look", "arguments": json.dumps({"at": number})}}
            called = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": say(number, 3)}
            yield {"messages": [ask, called, {"role": "tool", "content": say(number, 2)}, answer], "tools": [TOOL]}
        else:
            first = {**answer, "weight": 0} if number % 4 else answer  # two trained answers are two sequences
            yield {"messages": [ask, first, ask, answer] if style == "thinking" else [ask, answer]}


def save_base(folder, style):
    """Save a tiny Llama with this style's tokenizer and template, two end tokens and a temperature."""
    folder.mkdir()
    write_tokenizer(folder, STYLES[style])
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=448,
        max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None, eos_token_id=7, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[7, 9], temperature=0.6, do_sample=True)
    model.save_pretrained(folder)


@pytest.mark.parametrize(("style", "layout"), [("thinking", "packed"), ("gemma", "padded")])
def test_a_bases_template_tokens_and_settings_go_through_to_the_package(tmp_path, monkeypatch, style, layout):
    save_base(tmp_path / "base", style)
    changes = {
        "base": {"kind": "folder"},
        "model_name": str(tmp_path / "base"),
        "expected_model": None,
        "superhot": False,
        "template": "base",
        "history": "per_turn",
        "what_counts": "answers",
        "layout": layout,
        "max_length": 256,
    }
    source = {"kind": "files", "paths": ["talk.jsonl"], "rows": "messages", "columns": {}, "expected_rows": None}
    workspace = make_workspace(tmp_path / "workspace", {"talk": source}, changes)
    (workspace.root / "talk.jsonl").write_bytes(jsonl(chats(style)))
    run_all(workspace, monkeypatch)

    shards = open_shards(workspace.data)
    authority = AutoTokenizer.from_pretrained(tmp_path / "base")
    end = authority.convert_tokens_to_ids(STYLES[style].end)
    for number in range(len(shards.sources[0].lengths)):
        ids, kinds = shards.sources[0].read(number)
        answers = ids[kinds == Kind.ANSWER]
        assert answers[-1] == end
        assert ids[0] != ids[1]
    (account,) = json.loads(workspace.ledger.read_bytes())["sources"]
    assert account["records"].get("further_answers", 0) == (10 if style == "thinking" else 0)
    assert ("up to answer" in workspace.report.read_text()) == (style == "thinking")
    package = workspace.package
    assert (package / "chat_template.jinja").read_text() == STYLES[style].jinja
    loaded = AutoTokenizer.from_pretrained(package)
    assert (loaded.bos_token, loaded.eos_token) == (authority.bos_token, authority.eos_token)
    messages = [{"role": "user", "content": "Hi"}]
    told = [one.apply_chat_template(messages, add_generation_prompt=True) for one in (loaded, authority)]
    assert told[0] == told[1]
    settings = GenerationConfig.from_pretrained(package)
    assert {7, 9, end} <= set(settings.eos_token_id)
    assert (settings.temperature, settings.do_sample) == (0.6, True)
    model = AutoModelForCausalLM.from_pretrained(package)
    assert set(model.config.eos_token_id) == set(settings.eos_token_id)
    chat = load_manifest(workspace.base, remedy="")["chat"]
    assert (chat["end"], chat["replaces_own"]) == (STYLES[style].end, False)
