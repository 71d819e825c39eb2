"""Where a model's parts are is known in one place, and what is accepted is decided there."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ropeway
from ropeway.models.architectures import EMBEDDING, HEAD, check_architecture
from ropeway.models.open_model import (
    backbone,
    create_model,
    head_dim,
    measure_frequencies,
    open_folder,
    output_head,
    rotary,
)
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
    ((name, (factor, *frequencies)),) = measure_frequencies(model.config).items()
    assert name == "inv_freq"
    assert factor == rotary(model).attention_scaling
    assert frequencies == rotary(model).inv_freq.tolist()


def test_names_of_the_tables_are_those_in_a_file():
    assert {EMBEDDING, HEAD} < set(LlamaForCausalLM(LlamaConfig(**SHAPE)).state_dict())


def test_a_created_model_is_drawn_from_the_global_generator_alone():
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(create_model(SHAPE))
    torch.manual_seed(3)
    expected = LlamaForCausalLM(LlamaConfig(**SHAPE)).state_dict()
    for model in drawn:
        assert all(torch.equal(part, expected[name]) for name, part in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": None}, "found None"),
        ({"model_type": ["llama"]}, re.escape("found ['llama']")),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixtral is a mixture of experts .num_local_experts: 8"),
        ({"model_type": "gemma3", "vision_config": {}}, "gemma3 is multimodal .vision_config"),
    ],
)
def test_what_is_no_dense_decoder_of_text_is_refused_by_name(config, words):
    with pytest.raises(ConfigError, match=words):
        check_architecture(config, where="x")


def test_any_other_model_type_is_left_to_the_proofs():
    check_architecture({"model_type": "llama", "num_local_experts": 1}, where="x")


@pytest.fixture
def stored(tmp_path):
    """Return the folder of a model stored in bf16."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def mapped(folder):
    return str(folder / "model.safetensors") in Path("/proc/self/maps").read_text()


def test_weights_of_the_stored_dtype_stay_mapped_so_that_ranks_share_their_pages(stored):
    model = open_folder(stored, torch.bfloat16)
    assert mapped(stored)
    del model
    assert not mapped(stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_opened_on_a_device_are_those_opened_in_host_memory(stored, dtype, monkeypatch):
    expected, given = open_folder(stored, dtype), {}
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **options: given.update(options) or load(*args, **options),
    )
    opened = open_folder(stored, dtype, device="cpu:0")  # any device but "cpu" takes the way of a GPU
    assert given["device_map"] == {"": "cpu:0"}
    for kind in ("named_parameters", "named_buffers"):
        found = dict(getattr(opened, kind)())
        for name, part in getattr(expected, kind)():
            assert found[name].dtype == part.dtype
            assert torch.equal(found[name], part), name
