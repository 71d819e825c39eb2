"""Where a model's parts are is known in one place, and what is accepted is decided there."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ropeway
from ropeway.models.architectures import EMBEDDING, HEAD, check_architecture, class_name, is_embedding_or_head
from ropeway.models.open_model import backbone, create_model, head_dim, measure_frequencies, output_head, rotary
from ropeway.runtime.errors import ConfigError

SHAPE = {
    "vocab_size": 24, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
# How transformers spells a Llama and its parts.
SPELLINGS = re.compile(r"LlamaForCausalLM|LlamaConfig|LlamaRotary|rotary_emb|lm_head|embed_tokens")
KNOWING = {"models/architectures.py", "models/open_model.py"}


def test_only_two_modules_spell_a_model_and_its_parts():
    package = Path(ropeway.__file__).parent
    spelling = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if SPELLINGS.search(path.read_text("utf-8"))
    }
    assert spelling == KNOWING


def test_the_parts_are_those_of_the_model():
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    assert backbone(model) is model.model
    assert output_head(model) is model.lm_head
    assert rotary(model) is model.model.rotary_emb
    assert head_dim(model.config) == 4
    factor, *frequencies = measure_frequencies(model.config)
    assert factor == rotary(model).attention_scaling
    assert frequencies == rotary(model).inv_freq.tolist()


def test_names_of_the_tables_are_those_in_a_file():
    names = set(LlamaForCausalLM(LlamaConfig(**SHAPE)).state_dict())
    assert {name for name in names if is_embedding_or_head(name)} == {EMBEDDING, HEAD}


def test_a_created_model_is_drawn_from_the_global_generator_alone():
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(create_model(SHAPE))
    torch.manual_seed(3)
    expected = LlamaForCausalLM(LlamaConfig(**SHAPE)).state_dict()
    for model in drawn:
        assert all(torch.equal(part, expected[name]) for name, part in model.state_dict().items())


@pytest.mark.parametrize("model_type", ["mistral", None, ["llama"]])
def test_a_model_type_that_is_not_accepted_is_refused_by_name(model_type):
    with pytest.raises(ConfigError, match=re.escape(repr(model_type))):
        check_architecture(model_type, where="x")
    assert class_name(model_type) is None


def test_a_llama_is_accepted():
    check_architecture("llama", where="x")
    assert class_name("llama") == "LlamaForCausalLM"
