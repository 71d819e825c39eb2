"""Fused kernels are used only if a small model of the same shape says that loss and gradients agree."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ropeway.models.fused import apply_liger, check_fused
from ropeway.runtime.errors import ConfigError

SHAPE = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=7, num_attention_heads=4, vocab_size=99)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check(apply, dtype):
    check_fused(SHAPE, DTYPES[dtype], torch.device("cpu"), apply)


def wrong_epsilon(model):
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 0.1


def wrong_gradient(model):
    down = model.model.layers[1].mlp.down_proj
    forward = down.forward
    down.forward = lambda x: forward(x.detach() + 0.9 * (x - x.detach()))


def wrong_mlp(model):
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_that_compute_the_same_are_accepted_and_the_shape_is_not_changed(dtype):
    check(lambda _: None, dtype)
    assert SHAPE.num_hidden_layers == 7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apply", [wrong_epsilon, wrong_gradient, wrong_mlp])
def test_kernels_that_compute_something_else_are_refused(apply, dtype):
    with pytest.raises(ConfigError, match=r"fused_kernels: the (loss|gradient)"):
        check(apply, dtype)


def test_a_model_type_without_liger_kernels_is_refused_by_name(monkeypatch):
    fake = SimpleNamespace(_apply_liger_kernel_to_instance=lambda **_: None)  # as Liger: it only logs
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=fake))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake)
    with pytest.raises(ConfigError, match="no kernels for model_type llama"):
        apply_liger(LlamaForCausalLM(SHAPE))


def test_without_liger_the_refusal_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ConfigError, match="EXTRAS=gpu"):
        apply_liger(torch.nn.Linear(1, 1))
