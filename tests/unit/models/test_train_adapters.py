import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ropeway.config.load_params import load_profile
from ropeway.config.sections import Lora
from ropeway.models.lora import add_adapters, merge_adapters
from ropeway.runtime.errors import ConfigError
from tests.support.tiny_run import ROOT

LORA = Lora(rank=4, alpha=8, dropout=0.0, target_modules=["q_proj", "down_proj"], train_embeddings=False)
IDS = torch.arange(12)[None]


def profile_with(**values):
    profile = load_profile(ROOT / "params.yaml", "laptop")[1]
    return profile.model_copy(update={"peft_model": True, "lora": LORA.model_copy(update=values)})


def small_llama(*, tied=False):
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=20,
            tie_word_embeddings=tied,
        )
    ).eval()


def train_a_little(model):
    optimizer = torch.optim.SGD([part for part in model.parameters() if part.requires_grad], lr=0.5)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_new_adapter_does_not_change_the_logits_and_only_it_is_trained():
    model = small_llama()
    before, frozen = model(input_ids=IDS).logits, {name: part.clone() for name, part in model.named_parameters()}
    add_adapters(model, profile_with())
    assert torch.equal(model(input_ids=IDS).logits, before)
    train_a_little(model)
    after = {name.replace(".base_layer", ""): part for name, part in model.named_parameters() if "lora_" not in name}
    assert all(torch.equal(after[name], part) for name, part in frozen.items())
    assert not torch.allclose(model(input_ids=IDS).logits, before, atol=1e-4)


def test_the_merged_model_is_a_plain_llama_with_the_adapters_logits():
    model = small_llama()
    names = list(model.state_dict())
    add_adapters(model, profile_with())
    train_a_little(model)
    learned = model(input_ids=IDS).logits
    merge_adapters(model)
    assert list(model.state_dict()) == names
    assert torch.allclose(model(input_ids=IDS).logits, learned, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_train_embeddings_trains_embedding_and_head(tied):
    model = small_llama(tied=tied)
    add_adapters(model, profile_with(train_embeddings=True))
    learns = {name for name, part in model.named_parameters() if part.requires_grad and "lora_" not in name}
    assert learns == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})


def test_an_unknown_layer_is_reported_with_the_existing_ones():
    with pytest.raises(ConfigError, match=r"lora\.target_modules: c_attn .*q_proj"):
        add_adapters(small_llama(), profile_with(target_modules=["c_attn"]))


def test_an_adapter_that_gives_non_finite_weights_is_rejected():
    model = small_llama()
    add_adapters(model, profile_with())
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.q_proj.lora_B.default").weight.fill_(float("inf"))
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj"):
        merge_adapters(model)
