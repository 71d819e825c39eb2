"""The one place that knows how a causal model of transformers is opened, created and built.

Stages ask for the parts of a model here: its backbone, its output head, its rotary module. Which architectures are
accepted is decided in `ropeway.models.architectures`.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ropeway.models.architectures import ACCEPTED, DEFAULT

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


LoadingInfo = Mapping[str, Collection[str]]  # of transformers: missing_keys, unexpected_keys


def read_config(folder: Path, options: Mapping[str, object]) -> PreTrainedConfig:
    """Return the config of a folder; `options` as `open_checked` takes them."""
    return AutoConfig.from_pretrained(folder, **options)


def open_folder(folder: Path, dtype: torch.dtype, **options: str) -> PreTrainedModel:
    """Return the model of a folder that a stage of this package wrote; `options` are those of `from_pretrained`."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, **options
    )


def open_reporting(folder: Path) -> tuple[PreTrainedModel, LoadingInfo]:
    """Return (model, loading info of transformers) of a folder, as its own config says."""
    options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    opened: tuple[PreTrainedModel, LoadingInfo] = AutoModelForCausalLM.from_pretrained(folder, **options)
    return opened


def open_original(
    folder: Path, config: PreTrainedConfig, options: Mapping[str, object]
) -> tuple[PreTrainedModel, LoadingInfo]:
    """Return (model in its stored dtype, loading info of transformers) of somebody else's model.

    Args:
        folder: Its files.
        config: Its config, whose architecture is accepted.
        options: `gguf_file`, or nothing.
    """
    opened: tuple[PreTrainedModel, LoadingInfo] = model_class(config).from_pretrained(
        folder, config=config, dtype="auto", output_loading_info=True, use_safetensors=True, **options
    )
    return opened


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of transformers that holds a config's weights; its architecture is accepted."""
    named: type[PreTrainedModel] = getattr(transformers, ACCEPTED[config.model_type][1])
    return named


def create_model(shape: Mapping[str, object]) -> PreTrainedModel:
    """Return a model of this shape; its weights are drawn from torch's global generator."""
    config = AutoConfig.for_model(DEFAULT, **shape)
    return model_class(config)(config)


def plain_copy(opened: PreTrainedModel) -> PreTrainedModel:
    """Return a model with the weights of a GGUF file: transformers 5.24 refuses to save or resize the one it opened."""
    stated = opened.config.to_dict()
    config = type(opened.config).from_dict(
        {key: value for key, value in stated.items() if key != "quantization_config" and key[0] != "_"}
    )
    model = type(opened)(config)
    model.load_state_dict(opened.state_dict())
    return model


def backbone(model: PreTrainedModel) -> nn.Module:
    """Return the decoder without the output head: embedding, layers, last norm."""
    decoder: nn.Module = getattr(model, model.base_model_prefix)
    return decoder


def output_head(model: PreTrainedModel) -> nn.Linear:
    """Return the layer that turns `(…, H)` states into `(…, V)` logits; with LoRA, what peft wraps around it."""
    head: nn.Linear = model.get_output_embeddings()
    return head


class Rotary(Protocol):
    """A live rotary module, of whatever class its architecture has.

    Attributes:
        inv_freq: `(D/2,)`.
        attention_scaling: The attention factor.
    """

    inv_freq: torch.Tensor
    attention_scaling: float


def rotary(model: PreTrainedModel) -> Rotary:
    """Return the live rotary module."""
    return cast("Rotary", backbone(model).rotary_emb)


def head_dim(config: PreTrainedConfig) -> int:
    """Return the size of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def measure_frequencies(config: PreTrainedConfig) -> tuple[float, ...]:
    """Return the attention factor and the fp32 frequencies that transformers computes from an untouched config."""
    module = LlamaRotaryEmbedding(config)
    return (float(module.attention_scaling), *(float(value) for value in module.inv_freq.float()))


@contextmanager
def rope_of(model: PreTrainedModel, parameters: Mapping[str, object] | None = None) -> Iterator[None]:
    """Let a model read positions under these `rope_parameters` for a while, by default its own, computed again.

    The same as loading it with them in its config, without reading the weights again.
    """
    decoder = backbone(model)
    before = decoder.rotary_emb
    config = type(model.config).from_dict(
        {**model.config.to_dict(), "rope_parameters": dict(parameters or model.config.rope_parameters)}
    )
    decoder.rotary_emb = type(before)(config).to(model.device)
    try:
        yield
    finally:
        decoder.rotary_emb = before
