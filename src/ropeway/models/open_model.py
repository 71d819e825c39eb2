"""Load and create causal models of transformers, and access their parts.

Stages get the backbone, the logits and the RoPE frequencies of a model from here. `ropeway.models.proofs` decides
whether a model can be trained.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError  # of configs of transformers; not a ValueError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from ropeway.models.architectures import DEFAULT, check_architecture
from ropeway.models.rope import FULL, OwnFrequencies, RopeScaling, frequency_faults, has_layer_types, main_parameters
from ropeway.models.template_limits import check_limits
from ropeway.models.weight_files import NAMED_ELSEWHERE, check_weight_files, check_weights_name
from ropeway.runtime.errors import ConfigError, RopewayError
from ropeway.runtime.terminal import escape_controls

_DROPOUT = re.compile(r"dropout|pdrop|drop_prob")  # names of probabilities
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


LoadingInfo = Mapping[str, Collection[str]]  # transformers' missing_keys, unexpected_keys, …


def read_config(folder: Path, options: Mapping[str, object]) -> PreTrainedConfig:
    """Return the config of a folder; `options` are passed to transformers, e.g. `gguf_file`.

    The code that an `auto_map` names is never run, and the config that is returned has none: a package holds no code.

    Raises:
        ConfigError: This version of transformers cannot read it, or only with code of the model's author.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
    except (KeyError, ValueError, TypeError, RecursionError, StrictDataclassError) as error:
        reason = str(error).strip().partition(". ")[0]
        raise ConfigError(
            f"{folder}: transformers {transformers.__version__} cannot read its config.json: {reason}. Models that "
            "bring code of their own are not supported; for a newer architecture upgrade transformers"
        ) from error
    if named := vars(config).pop("auto_map", None):  # e.g. Phi-3, whose architecture transformers has by now
        names = escape_controls(", ".join(sorted(named)))
        print(f"{folder}: the code that auto_map names is not run ({names}): transformers has its own")
    for part in (config, config.get_text_config()):  # the live ones: `attribute_map` in the file can rename any setting
        check_weights_name(getattr(part, NAMED_ELSEWHERE, None), where=f"{folder / 'config.json'}")
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return a folder's tokenizer as transformers loads it, after each of its chat templates was rendered in limits.

    Raises:
        ConfigError: A chat template needs too much time or memory.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    stated = tokenizer.chat_template or {}
    for name, jinja in (stated if isinstance(stated, dict) else {"default": stated}).items():
        check_rendering(tokenizer, jinja, f"{folder}: {name}")
    return tokenizer


def check_rendering(tokenizer: PreTrainedTokenizerBase, jinja: str, name: str) -> None:
    """Raise ConfigError if a template of somebody else needs too much time or memory for a short conversation."""

    def render() -> None:
        talk = [{"role": role, "content": "Hi."} for role in ("user", "assistant", "user")]
        for messages in ([{"role": "system", "content": "Be kind."}, *talk], talk):  # some refuse a system message
            for asks in (True, False):
                try:
                    tokenizer.apply_chat_template(
                        messages, chat_template=jinja, add_generation_prompt=asks, tokenize=False
                    )
                except MemoryError:
                    raise
                except Exception:  # noqa: BLE001, S112 - a template may raise anything; a later use says what
                    continue

    check_limits(jinja, name, render)


def open_folder(folder: Path, dtype: torch.dtype, *, device: str = "cpu", **options: str) -> PreTrainedModel:
    """Return the model of a folder that a stage wrote, or of a package.

    On a CPU, weights stored in `dtype` stay mapped from their files, whose pages all processes share, until they are
    written to; others are converted into memory of this process. On another device they are read, converted and copied
    one by one, so that host memory never holds a model of this process's own.

    Args:
        folder: Folder of the model.
        dtype: Data type of the weights.
        device: Device of the weights.
        options: Passed to `from_pretrained`.

    Raises:
        DataError, ConfigError: transformers would read weights from other files than the safetensors of the folder.
    """
    where = {} if device == "cpu" else {"device_map": {"": device}}
    return _open(folder, dtype=dtype, **where, **options)


def load_with_info(folder: Path) -> tuple[PreTrainedModel, LoadingInfo]:
    """Return (model, loading info of transformers) of a folder, loaded according to its config."""
    opened: tuple[PreTrainedModel, LoadingInfo] = _open(folder, output_loading_info=True)
    return opened


def _open(folder: Path, **options: object) -> Any:  # noqa: ANN401 - a model, with its loading info if that is asked
    check_weight_files(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        config=read_config(folder, {}),
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        **options,
    )


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
        folder,
        config=config,
        dtype="auto",
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
        **options,
    )
    return opened


def is_finite(weight: Tensor) -> bool:
    """Return whether no value is NaN or infinite; 40 times as fast as `torch.isfinite(weight).all()` on a CPU.

    >>> is_finite(torch.tensor([1.0, -2.0])), is_finite(torch.tensor([1.0, torch.nan])), is_finite(torch.empty(0))
    (True, False, True)
    """
    return not weight.numel() or all(bool(torch.isfinite(one)) for one in torch.aminmax(weight))  # NaN goes through


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return transformers' causal language model for a config.

    Raises:
        ConfigError: transformers has none, or the architecture is one that this project cannot train.
    """
    check_architecture(config.to_dict(), where=f"model_type {config.model_type}")
    named: type[PreTrainedModel] | None = AutoModelForCausalLM._model_mapping.get(type(config), None)  # noqa: SLF001
    if named is None:
        raise ConfigError(
            f"model_type {config.model_type}: this version of transformers has no causal language model for it"
        )
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


def compute_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return `(N, V)` logits of `(N, H)` states of the decoder, as the model's own forward computes them.

    Some families scale or cap what the head returns. Their forward runs here with the given states in place of the
    decoder's output, so no family has to be known.
    """
    prefix = model.base_model_prefix
    decoder = model._modules[prefix]  # noqa: SLF001 - `setattr` would do the same and more slowly
    model._modules[prefix] = _GivenStates(hidden[None], decoder)  # noqa: SLF001
    try:
        logits: Tensor = model.forward(inputs_embeds=hidden[None], use_cache=False).logits
    finally:
        model._modules[prefix] = decoder  # noqa: SLF001
    return logits[0]


class _Output(BaseModelOutputWithPast):
    """A decoder's output; what a family adds to it, e.g. the scores of a router, is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _GivenStates(nn.Module):
    """Stands for the decoder of a model and returns these last states; settings are those of the decoder."""

    def __init__(self, hidden: Tensor, decoder: nn.Module | None) -> None:
        super().__init__()
        self.output = _Output(last_hidden_state=hidden)
        self._settings = vars(decoder) if decoder is not None else {}

    def forward(self, *_: object, **__: object) -> BaseModelOutputWithPast:
        return self.output

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever a family's decoder has
        settings = self.__dict__.get("_settings", {})
        return settings[name] if name in settings else super().__getattr__(name)


def disable_dropout(model: nn.Module) -> dict[str, float]:
    """Turn off the dropout that a base's config states; return what was turned off: name -> probability.

    `residual_dropout: 0.0` of params.yaml is for all of it: a resumed run draws nothing, and packed rows are exact. The
    config is not changed, so that the export states what the base does.
    """
    found: dict[str, float] = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p:
            found["dropout"], module.p = float(module.p), 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and value and _DROPOUT.search(name):
                found[name] = value
                setattr(module, name, 0.0)
    return dict(sorted(found.items()))


def rotary(model: PreTrainedModel) -> Any:  # noqa: ANN401 - each family has a class of its own
    """Return the rotary module of a loaded model; raise ConfigError if it has none."""
    module = getattr(backbone(model), "rotary_emb", None)
    if module is None:
        raise ConfigError(
            f"model_type {model.config.model_type}: the decoder has no module `rotary_emb` that all layers share, on "
            "which RoPE could be checked. Models with RoPE elsewhere, or with other or no positions, cannot be trained"
        )
    return module


def live_frequencies(module: nn.Module) -> OwnFrequencies:
    """Return what a rotary module computes: buffer -> (attention factor, fp32 frequencies).

    Families with another RoPE per layer type have several buffers, e.g. `sliding_attention_inv_freq`.
    """
    found = {}
    for name, buffer in module.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            factor = getattr(module, name.removesuffix("inv_freq") + "attention_scaling")
            found[name] = (float(factor), *(float(value) for value in buffer.detach().float().cpu()))
    return found


def head_dim(config: PreTrainedConfig) -> int:
    """Return the size of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", "norm_eps")


def read_shape(config: PreTrainedConfig) -> dict[str, object]:
    """Return a model's shape under the names of `expected_model`; None for what its config does not state."""
    stated = config.to_dict()
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings", "tie_word_embeddings",
    )  # fmt: skip
    shape: dict[str, object] = {name: stated.get(name) for name in names}
    shape["num_key_value_heads"] = shape["num_key_value_heads"] or shape["num_attention_heads"]
    shape["head_dim"] = head_dim(config)
    shape["rope_theta"] = main_parameters(getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    shape["rms_norm_eps"] = next((stated[name] for name in _EPSILONS if name in stated), None)
    return shape


def layer_weights(model: PreTrainedModel) -> list[list[int]]:
    """Return the elements of each weight of each layer, in the model's order."""
    return [[weight.numel() for weight in layer.parameters()] for layer in decoder_layers(model)]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of the decoder; raise ConfigError if it has no list of layers."""
    layers = next((part for part in backbone(model).children() if isinstance(part, nn.ModuleList)), None)
    if layers is None:
        raise ConfigError(f"model_type {model.config.model_type}: the decoder has no list of layers")
    return layers


def check_dense(model: PreTrainedModel) -> None:
    """Raise ConfigError if a live model routes tokens to experts, whatever its config says."""
    routers = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in ("experts", "router")]
    if routers:
        raise ConfigError(
            f"model_type {model.config.model_type} is a mixture of experts ({routers[0]}); choose a dense decoder"
        )


@contextmanager
def refused_by_name(what: str) -> Iterator[None]:
    """Context manager: an error of a family's own code, or of a proof that does not fit, refuses the model by name."""
    try:
        yield
    except (RopewayError, OSError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ConfigError(
            f"{what}: it cannot be proved that this project computes what the model's own code does: "
            f"{type(error).__name__}: {reason}. Choose another base, or report this family"
        ) from error


def rotary_dim(config: PreTrainedConfig) -> int:
    """Return how many dimensions of a head RoPE turns: all, or the `partial_rotary_factor` of some families."""
    stated = main_parameters(config.rope_parameters or {}).get("partial_rotary_factor")
    return head_dim(config) if stated is None else int(head_dim(config) * stated)


def measure_frequencies(config: PreTrainedConfig) -> OwnFrequencies:
    """Return the frequencies that transformers computes from an unmodified config, by name of the buffer."""
    with torch.device("meta"):
        module = rotary(model_class(config)(deepcopy(config)))
    return live_frequencies(type(module)(config))


def reads_flat_scaling(config: PreTrainedConfig) -> bool:
    """Return whether a family applies a `rope_scaling` without layer types to its layers with full attention.

    Gemma 3 and OLMo 3 do, whose config.json for transformers 4 states it so; other families lose the layer types.
    """
    if not has_layer_types(config.rope_parameters):
        return False
    flat = {"rope_type": "linear", "factor": 2.0, "rope_theta": 12345.0}  # unlike any family's own
    try:
        read = type(config).from_dict({**deepcopy(config.to_dict()), "rope_scaling": flat}).rope_parameters
    except (KeyError, ValueError, TypeError, AttributeError, StrictDataclassError):
        return False
    return bool({**config.rope_parameters, FULL: flat} == read)


def set_rope(config: PreTrainedConfig, rope: RopeScaling) -> PreTrainedConfig:
    """Return the config with a RoPE scaling.

    Raises:
        ConfigError: transformers computes something else from it, read as the exported config.json states it.
    """
    stated = {**deepcopy(config.to_dict()), "max_position_embeddings": rope.stated_positions}
    if "original_max_position_embeddings" in stated and not rope.kept:
        stated["original_max_position_embeddings"] = rope.original  # of Phi-3, which prefers it to rope_parameters
    where = f"model_type {config.model_type}: {rope.kind} RoPE scaling"
    try:
        exported = type(config).from_dict(stated | deepcopy(rope.to_config_keys()))
        faults = list(frequency_faults(measure_frequencies(exported), rope.expected(rotary_dim(config))))
    except (KeyError, ValueError, TypeError, RecursionError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where} is refused by transformers {transformers.__version__}: {reason}") from error
    if _without_type(exported.rope_parameters) != _without_type(rope.to_config()):
        faults.append(f"  rope_parameters: expected {rope.to_config()}, found {exported.rope_parameters}")
    if faults:
        raise ConfigError("\n".join([f"{where}: transformers {transformers.__version__} reads it otherwise:", *faults]))
    return type(config).from_dict(stated | {"rope_parameters": rope.to_config()})


def _without_type(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_parameters` without `type`, the name of `rope_type` in transformers before 4.43."""
    return {
        name: _without_type(value) if isinstance(value, Mapping) else value
        for name, value in parameters.items()
        if name != "type"
    }


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
