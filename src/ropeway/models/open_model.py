"""Load and create causal models of transformers, and access their parts.

Stages get the backbone, the output head and the rotary module of a model from here. `ropeway.models.architectures`
decides which architectures are supported.
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


LoadingInfo = Mapping[str, Collection[str]]  # transformers' missing_keys, unexpected_keys, …


def read_config(folder: Path, options: Mapping[str, object]) -> PreTrainedConfig:
    """Return the config of a folder; `options` are passed to transformers, e.g. `gguf_file`."""
    return AutoConfig.from_pretrained(folder, **options)


def open_folder(folder: Path, dtype: torch.dtype, *, device: str = "cpu", **options: str) -> PreTrainedModel:
    """Return the model of a folder that a stage wrote.

    On a CPU, weights stored in `dtype` stay mapped from their files, whose pages all processes share, until they are
    written to; others are converted into memory of this process. On another device they are read, converted and copied
    one by one, so that host memory never holds a model of this process's own.

    Args:
        folder: Folder of the model.
        dtype: Data type of the weights.
        device: Device of the weights.
        options: Passed to `from_pretrained`.
    """
    where = {} if device == "cpu" else {"device_map": {"": device}}
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, **where, **options
    )


def load_with_info(folder: Path) -> tuple[PreTrainedModel, LoadingInfo]:
    """Return (model, loading info of transformers) of a folder, loaded according to its config."""
    options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    opened: tuple[PreTrainedModel, LoadingInfo] = AutoModelForCausalLM.from_pretrained(folder, **options)
    return opened


def load_base_model(
    folder: Path, config: PreTrainedConfig, options: Mapping[str, object]
) -> tuple[PreTrainedModel, LoadingInfo]:
    """Return (model in its stored dtype, loading info of transformers) of a base model.

    Args:
        folder: Folder of the model.
        config: Its config, with a supported architecture.
        options: `gguf_file`, or empty.
    """
    opened: tuple[PreTrainedModel, LoadingInfo] = model_class(config).from_pretrained(
        folder, config=config, dtype="auto", output_loading_info=True, use_safetensors=True, **options
    )
    return opened


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the model class of transformers for a config with a supported architecture."""
    named: type[PreTrainedModel] = getattr(transformers, ACCEPTED[config.model_type][1])
    return named


def create_model(shape: Mapping[str, object]) -> PreTrainedModel:
    """Return a model of this shape with random weights from torch's global generator."""
    config = AutoConfig.for_model(DEFAULT, **shape)
    return model_class(config)(config)


def plain_copy(opened: PreTrainedModel) -> PreTrainedModel:
    """Return a plain copy of a model loaded from GGUF; transformers 5.24 cannot save or resize the original."""
    stated = opened.config.to_dict()
    config = type(opened.config).from_dict(
        {key: value for key, value in stated.items() if key != "quantization_config" and key[0] != "_"}
    )
    model = type(opened)(config)
    model.load_state_dict(opened.state_dict())
    return model


def backbone(model: PreTrainedModel) -> nn.Module:
    """Return the decoder without the output head: embedding, layers, final norm."""
    decoder: nn.Module = getattr(model, model.base_model_prefix)
    return decoder


def output_head(model: PreTrainedModel) -> nn.Linear:
    """Return the layer that maps `(…, H)` states to `(…, V)` logits; with LoRA, peft's wrapper of it."""
    head: nn.Linear = model.get_output_embeddings()
    return head


class Rotary(Protocol):
    """The rotary module of a loaded model, of any architecture.

    Attributes:
        inv_freq: `(D/2,)`.
        attention_scaling: The attention factor.
    """

    inv_freq: torch.Tensor
    attention_scaling: float


def rotary(model: PreTrainedModel) -> Rotary:
    """Return the rotary module of a loaded model."""
    return cast("Rotary", backbone(model).rotary_emb)


def head_dim(config: PreTrainedConfig) -> int:
    """Return the size of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def measure_frequencies(config: PreTrainedConfig) -> tuple[float, ...]:
    """Return the attention factor and the fp32 frequencies that transformers computes from an unmodified config."""
    module = LlamaRotaryEmbedding(config)
    return (float(module.attention_scaling), *(float(value) for value in module.inv_freq.float()))


@contextmanager
def rope_of(model: PreTrainedModel, parameters: Mapping[str, object] | None = None) -> Iterator[None]:
    """Context manager: use these `rope_parameters` in a model; by default its own, recomputed.

    Equivalent to loading the model with them in its config, but without reading the weights again.
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
