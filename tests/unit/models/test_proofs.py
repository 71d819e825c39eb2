"""The proofs fail where this project's code would compute something else than a model's own."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ropeway.models import attention, proofs, supervised_loss
from ropeway.models.architectures import PACKED, SDPA, VARIABLE_LENGTH, check_architecture, check_proof
from ropeway.models.open_model import (
    check_dense,
    compute_logits,
    disable_dropout,
    measure_frequencies,
    model_class,
    output_head,
    refused_by_name,
)
from ropeway.models.proofs import prove_model, shorten
from ropeway.runtime.errors import ConfigError
from tests.support.families import FAMILIES, SIZES

EQUAL = {SDPA: "", VARIABLE_LENGTH: "", PACKED: ""}


def make(name, **more):
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.model_type, **family.sizes, **more)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_the_loss_and_gradients_of_its_own_code(name):
    found = prove_model(make(name))
    if name == "gemma2":  # transformers' SDPA has no soft cap
        assert found.pop(SDPA)
        assert found == {VARIABLE_LENGTH: "", PACKED: ""}
    elif name == "stablelm":
        assert found.pop(SDPA) == ""
        assert all("does not pass the boundaries" in fault for fault in found.values())
    else:
        assert found == EQUAL


def test_dropout_of_a_base_is_off_in_training_and_stays_in_its_config():
    model = make("seed_oss").train()
    ids = torch.arange(40)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert disable_dropout(model) == {"attention_dropout": 0.1, "residual_dropout": 0.1}
    trained = model(ids).logits
    assert torch.equal(trained, model.eval()(ids).logits)
    assert (model.config.attention_dropout, model.config.residual_dropout) == (0.1, 0.1)
    assert disable_dropout(model) == {}


def test_dropout_that_stays_on_is_found(monkeypatch):
    monkeypatch.setattr(proofs, "disable_dropout", lambda _: {})
    found = prove_model(make("seed_oss"))
    assert all(found.values())


def test_experts_are_found_in_the_live_model_and_in_parts_of_a_config():
    mixtral = AutoConfig.for_model("mixtral", **SIZES, num_local_experts=2)
    with torch.device("meta"), pytest.raises(ConfigError, match=r"mixture of experts .*experts"):
        check_dense(AutoModelForCausalLM.from_config(mixtral))
    check_dense(make("granitemoehybrid"))
    stated = {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 4}}
    with pytest.raises(ConfigError, match="moe_num_experts: 4"):
        check_architecture(stated, where="x")
    check_architecture({"model_type": "doge", "is_moe": False, "num_experts": 9}, where="x")
    check_architecture({"model_type": "granitemoehybrid", "num_local_experts": 0, "num_experts_per_tok": 2}, where="x")


def test_an_error_of_a_family_s_own_code_refuses_it_by_name():
    with (
        pytest.raises(ConfigError, match=r"my-model \(odd\): it cannot be proved .* StopIteration"),
        refused_by_name("my-model (odd)"),
    ):
        next(iter(()))
    with pytest.raises(ConfigError, match="own words"), refused_by_name("my-model"):
        raise ConfigError("own words")
    with pytest.raises(OSError, match="disk"), refused_by_name("my-model"):
        raise OSError("disk")


@pytest.mark.parametrize("name", ["cwm", "modernbert-decoder"])
def test_a_config_that_requires_token_ids_can_be_shortened(name):
    config = AutoConfig.for_model(name, vocab_size=2000, num_hidden_layers=4)
    assert shorten(config).vocab_size == 512


def test_a_family_that_does_not_call_the_kernels_is_found():
    config = AutoConfig.for_model("falcon", **SIZES, new_decoder_architecture=False, multi_query=False)
    torch.manual_seed(0)
    found = prove_model(AutoModelForCausalLM.from_config(config))
    assert found[SDPA] == ""
    assert found[VARIABLE_LENGTH]
    assert found[PACKED] == found[VARIABLE_LENGTH]


def without(option):
    """Return a kernel that ignores one of its options."""
    plain = attention.attend_each

    def kernel(*given, **more):
        more.pop(option, None)
        return plain(*given, **more)

    return kernel


def test_a_lost_sliding_window_is_found(monkeypatch):
    monkeypatch.setattr(proofs, "attend_each", without("window"))
    found = prove_model(make("mistral"))
    assert found[SDPA] == ""
    assert "the loss is" in found[VARIABLE_LENGTH]


def test_a_lost_soft_cap_is_found(monkeypatch):
    monkeypatch.setattr(proofs, "attend_each", without("softcap"))
    found = prove_model(make("gemma2", attn_logit_softcapping=0.5))
    assert "the loss is" in found[VARIABLE_LENGTH] or "the gradient of" in found[VARIABLE_LENGTH]


@pytest.mark.parametrize("name", ["granite", "cohere2"])
def test_a_lost_scale_of_the_logits_is_found(monkeypatch, name):
    monkeypatch.setattr(supervised_loss, "compute_logits", lambda model, hidden: output_head(model)(hidden))
    assert "the loss is" in prove_model(make(name))[SDPA]


def test_ignored_boundaries_are_found(monkeypatch):
    plain = attention.attend_each

    def joined(q, k, v, cu, longest, scale, **more):
        return plain(q, k, v, cu[[0, -1]], longest, scale, **more)

    monkeypatch.setattr(proofs, "attend_each", joined)
    assert "packed row" in prove_model(make("llama"))[PACKED] or prove_model(make("llama"))[VARIABLE_LENGTH]


def test_a_wrong_gradient_is_found(monkeypatch):
    plain = attention.attend_each
    monkeypatch.setattr(proofs, "attend_each", lambda q, k, *rest, **more: plain(q, k.detach() + 0 * k, *rest, **more))
    assert "the gradient of" in prove_model(make("llama"))[VARIABLE_LENGTH]


def test_the_logits_are_those_of_the_models_own_forward():
    for name in ("granite", "gemma2", "cohere2", "llama"):
        model = make(name).eval()
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            hidden = model.model(input_ids=ids).last_hidden_state
            assert torch.allclose(compute_logits(model, hidden[0]), model(input_ids=ids).logits[0], atol=1e-6), name
        assert hasattr(model.model, "layers")  # the decoder is in its place again


def test_the_first_layers_have_every_kind():
    short = shorten(make("gemma3_text").config)
    assert short.num_hidden_layers == 6
    assert set(short.layer_types) == {"sliding_attention", "full_attention"}
    assert (shorten(make("llama").config).num_hidden_layers, short.sliding_window, short.vocab_size) == (2, 12, 512)


def test_frequencies_of_every_buffer_are_measured_with_the_familys_own_class():
    config = make("gemma3_text").config
    assert set(measure_frequencies(config)) == {"sliding_attention_inv_freq", "full_attention_inv_freq"}
    assert len(measure_frequencies(make("glm4").config)["inv_freq"]) == 1 + 2  # half of a head of 8


@pytest.mark.parametrize(
    ("model_type", "more", "words"),
    [("gpt2", {}, "no module `rotary_emb`"), ("mixtral", {}, "mixture of experts"), ("t5", {}, "encoder-decoder")],
)
def test_what_cannot_be_trained_is_refused_by_name(model_type, more, words):
    with pytest.raises(ConfigError, match=words):
        measure_frequencies(AutoConfig.for_model(model_type, **more))
    assert model_class(AutoConfig.for_model("llama")).__name__ == "LlamaForCausalLM"


def test_a_failed_proof_is_refused_with_what_works_and_only_where_it_is_needed():
    found = {SDPA: "", VARIABLE_LENGTH: "x is 1", PACKED: "y is 2"}
    check_proof(found, SDPA, where="base")
    with pytest.raises(
        ConfigError, match=r"base: with attention `packed` .*: y is 2\. What works: layout: padded with"
    ):
        check_proof(found, PACKED, where="base")
    with pytest.raises(ConfigError, match="Nothing else works either"):
        check_proof(dict.fromkeys(found, "z"), SDPA, where="base")


def test_an_argument_of_attention_that_no_kernel_has_is_refused():
    parts = [torch.zeros(1, 1, 4, 8) for _ in range(3)]
    ends = torch.tensor([0, 4], dtype=torch.int32)
    for more in ({"s_aux": torch.ones(1)}, {"dropout": 0.1}, {"is_causal": False}):
        with pytest.raises(ConfigError, match="which the kernels of this project do not have"):
            attention.varlen_attention(
                None, *parts, None, kernel=attention.attend_each, cu_seqlens=ends, longest=4, **more
            )
