"""Opens the base model for training and checks that precision, attention and RoPE scaling are as params set them."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ropeway.config.params import TrainParams, WeightParams
from ropeway.data.batches import Row
from ropeway.models.attention import Attention, register_attention
from ropeway.models.lora import add_adapters
from ropeway.models.open_model import DTYPES, disable_dropout, live_frequencies, open_folder, rotary, rotary_dim
from ropeway.models.rope import LongRope, RopeScaling, frequency_faults, longest_independent, main_parameters
from ropeway.models.sequence_parallel import SequenceGroup
from ropeway.runtime.errors import ConfigError


def open_model(
    folder: Path,
    profile: TrainParams,
    attention: Attention,
    *,
    device: str = "cpu",
    sequence: SequenceGroup | None = None,
) -> PreTrainedModel:
    """Return the base model of `folder` ready for training, with the RoPE scaling that its config states."""
    if attention.kernel is not None:
        register_attention(attention.kernel, sequence)
    model = open_folder(folder, DTYPES[profile.dtype], device=device, attn_implementation=attention.implementation)
    model.config.use_cache = False
    disable_dropout(model)
    add_adapters(model, profile)
    if profile.gradient_checkpointing:
        enable_checkpointing(model)
    model.train()
    return model


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass; transformers 5.17 and 5.20 have the older method only."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters to optimize: all that are not frozen."""
    return [part for part in model.parameters() if part.requires_grad]


def count_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Return the number of parameters, including those that ZeRO-3 keeps on other ranks."""
    parts = trainable_parameters(model) if trainable_only else model.parameters()
    return sum(int(getattr(part, "ds_numel", part.numel())) for part in parts)


def check_rope(model: PreTrainedModel, scaling: RopeScaling) -> None:
    """Compare the model's RoPE frequencies in fp32 with the formula of the scaling, or with the base's own if kept.

    Raises:
        ConfigError: They differ, or the engine cast them to 16 bit (DeepSpeed before 0.19.2 did; field report #8066).
    """
    module = rotary(model)
    for name, buffer in module.named_buffers():
        if buffer.dtype != torch.float32:
            raise ConfigError(
                f"RoPE frequencies ({name}) are {buffer.dtype} after the engine started, expected torch.float32: at "
                "position 8,191 the angle would be off by radians. Use deepspeed >= 0.19.2"
            )
    if faults := list(frequency_faults(live_frequencies(module), scaling.expected(rotary_dim(model.config)))):
        raise ConfigError("\n".join([f"{scaling.kind} scaling did not reach the model:", *faults]))


def check_rows(config: PreTrainedConfig, profile: WeightParams) -> None:
    """Raise ConfigError where a base's longrope would give short texts the factors of long ones beside them.

    transformers takes `long_factor` for all texts of a batch if the longest exceeds the original context, else
    `short_factor`. A reader of the model gives each text the factors of its own length.
    """
    longest = longest_independent(config.rope_parameters, config.max_position_embeddings)
    is_longrope = main_parameters(config.rope_parameters)["rope_type"] == LongRope.kind
    if not is_longrope or longest is None or profile.max_length <= longest:
        return
    if profile.layout == "packed" or profile.per_device_train_batch_size > 1:
        raise ConfigError(
            f"max_length is {profile.max_length} tokens, but the base's longrope has short_factor up to {longest:,} "
            "tokens and long_factor beyond, and transformers takes one of them for all texts of a micro-batch. Set "
            "layout: padded and per_device_train_batch_size: 1, a shorter max_length, or superhot: true with "
            "superhot_config: {type: longrope, long_factor: null, …}, which uses the base's long_factor for all texts"
        )


def token_flops(model: PreTrainedModel) -> float:
    """Return FLOPs per token of matrix products, forward and backward: 4 per parameter, 2 more if it is trained.

    The input embedding is a lookup without FLOPs, unless it is tied to the head.

    Source: Chowdhery et al. 2022, arXiv:2204.02311, app. B.
    """
    embedding = model.get_input_embeddings()
    total, trainable = count_parameters(model), count_parameters(model, trainable_only=True)
    if not model.config.tie_word_embeddings:
        total -= count_parameters(embedding)
        trainable -= count_parameters(embedding, trainable_only=True)
    return 4.0 * total + 2.0 * trainable


def step_flops(per_token: float, config: PreTrainedConfig, rows: Iterable[Row]) -> float:
    """Return the model FLOPs of these rows, without padding and recomputation.

    Causal attention within each sequence adds 6 L H T^2, forward and backward.
    """
    lengths = [piece.end - piece.begin for row in rows for piece in row]
    squares = sum(length * length for length in lengths)
    return float(per_token * sum(lengths) + 6.0 * config.num_hidden_layers * config.hidden_size * squares)
