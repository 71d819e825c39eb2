"""Opens the base model for training: precision, attention and RoPE scaling as params say, and proof that they took."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ropeway.config.params import TrainParams
from ropeway.data.batches import Row
from ropeway.models.attention import VARLEN, Attention, register, varlen_kernel
from ropeway.models.lora import add_adapters
from ropeway.models.open_model import DTYPES, head_dim, open_folder, rotary
from ropeway.models.rope import RopeScaling
from ropeway.runtime.errors import ConfigError


def open_model(folder: Path, profile: TrainParams, attention: Attention) -> PreTrainedModel:
    """Return the base model of `folder` ready for training, with the RoPE scaling that its config states."""
    if attention.implementation == VARLEN:
        register(varlen_kernel(on_cuda=attention.on_cuda))
    model = open_folder(folder, DTYPES[profile.dtype], attn_implementation=attention.implementation)
    model.config.use_cache = False
    add_adapters(model, profile)
    if profile.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model


def learning(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the optimizer gets: all but frozen ones."""
    return [part for part in model.parameters() if part.requires_grad]


def count_weights(model: nn.Module, *, learning_only: bool = False) -> int:
    """Return how many weights a model has, those that ZeRO-3 left with other ranks included."""
    parts = learning(model) if learning_only else model.parameters()
    return sum(int(getattr(part, "ds_numel", part.numel())) for part in parts)


def check_rope(model: PreTrainedModel, scaling: RopeScaling) -> None:
    """Compare the live module's frequencies, in fp32, with the formula; of a kept scaling, with the base's own.

    Raises:
        ConfigError: They differ, or the engine rounded them to 16 bit (older DeepSpeed did: field report #8066).
    """
    live = rotary(model).inv_freq.detach().cpu()
    if live.dtype != torch.float32:
        raise ConfigError(
            f"RoPE frequencies are {live.dtype} after the engine started, expected torch.float32: at position "
            "8,191 the angle would be off by radians. Use deepspeed >= 0.19.2"
        )
    expected = torch.from_numpy(scaling.inv_freq(head_dim(model.config)))
    if not torch.allclose(live, expected, rtol=1e-6, atol=0):
        raise ConfigError(
            f"RoPE frequencies of the live model start {live[:3].tolist()}, expected {expected[:3].tolist()}: "
            f"{scaling.kind} scaling did not reach the model"
        )
    if not math.isclose(factor := rotary(model).attention_scaling, scaling.attention_factor, rel_tol=1e-6):
        raise ConfigError(
            f"RoPE's attention factor of the live model is {factor:g}, expected {scaling.attention_factor:g}: "
            f"{scaling.kind} scaling did not reach the model"
        )


def token_flops(model: PreTrainedModel) -> float:
    """Return FLOPs of forward and backward for one token in matrix products: 4 a weight, 2 more if it is trained.

    The input table only looks up, unless it is the head too. Source: Chowdhery et al. 2022, arXiv:2204.02311, app. B.
    """
    table = model.get_input_embeddings()
    looked_up = 0 if model.config.tie_word_embeddings else count_weights(table)
    learned = 0 if model.config.tie_word_embeddings else count_weights(table, learning_only=True)
    return 4.0 * (count_weights(model) - looked_up) + 2.0 * (count_weights(model, learning_only=True) - learned)


def step_flops(per_token: float, config: PreTrainedConfig, rows: Iterable[Row]) -> float:
    """Return what the model needs for these rows: no padding, nothing recomputed.

    A sequence attends to what lies before in itself: 6 L H T^2, half of the square, forward and backward.
    """
    lengths = [piece.end - piece.begin for row in rows for piece in row]
    squares = sum(length * length for length in lengths)
    return float(per_token * sum(lengths) + 6.0 * config.num_hidden_layers * config.hidden_size * squares)
