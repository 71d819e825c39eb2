"""Liger's fused GPU kernels for RMSNorm, RoPE and the gated MLP, checked against the model's own layers before use.

Logits and loss stay this project's own (`models/supervised_loss.py`).
"""

import copy
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ropeway.runtime.errors import ConfigError

# Liger uses those that it has for the model's type. Source: liger-kernel 0.8.5, transformers/monkey_patch.py.
_KERNELS = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
_NOT_USED = {"cross_entropy": False, "fused_linear_cross_entropy": False}
_PROBE_LAYERS, _PROBE_VOCABULARY, _PROBE_TOKENS = 2, 512, 64


def apply_liger(model: PreTrainedModel) -> None:
    """Replace the forward methods of a model's layers, and transformers' RoPE function in this process.

    Raises:
        ConfigError: liger-kernel is not installed, or has no kernels for this type of model.
    """
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise ConfigError(
            f"fused_kernels: liger-kernel cannot be imported ({error}). Install it with `make setup EXTRAS=gpu`, or "
            "set fused_kernels: false"
        ) from None
    _apply_liger_kernel_to_instance(model=model, **_KERNELS, **_NOT_USED)
    if not any(_is_liger(module) for module in model.modules()):
        raise ConfigError(
            f"fused_kernels: liger-kernel {liger_version()} has no kernels for model_type {model.config.model_type}. "
            "Set fused_kernels: false"
        )


def liger_version() -> str:
    """Return the version of liger-kernel."""
    try:
        return version("liger-kernel")
    except PackageNotFoundError:
        return "of unknown version"


def _is_liger(module: torch.nn.Module) -> bool:
    return str(getattr(module.forward, "__module__", "")).startswith("liger_kernel")


def check_fused(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    apply: Callable[[PreTrainedModel], None] = apply_liger,
) -> None:
    """Compare loss and gradients of a two-layer model of this shape with and without fused kernels.

    Both are compared with fp32: the fused kernels may be at most twice as far from it as the model's own layers.

    Raises:
        ConfigError: A loss or gradient is farther away.
    """
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = _PROBE_LAYERS, _PROBE_VOCABULARY
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:_PROBE_LAYERS]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        exact = AutoModelForCausalLM.from_config(small, trust_remote_code=False, dtype=torch.float32).to(
            dtype
        )  # weights that dtype can hold
        tokens = torch.randint(0, _PROBE_VOCABULARY, (2, _PROBE_TOKENS)).to(device)
    exact.to(device)
    plain, fused = copy.deepcopy(exact), copy.deepcopy(exact)
    expected, own = _measure(exact.float(), tokens), _measure(plain, tokens)
    apply(fused)
    for name, found in _measure(fused, tokens).items():
        distance, allowed = _distance(found, expected[name]), 2 * _distance(own[name], expected[name]) + 1e-5
        if not distance <= allowed:
            raise ConfigError(
                f"fused_kernels: the {name} with fused kernels is {distance:.2g} from fp32 (relative), expected at "
                f"most {allowed:.2g}, twice the distance of the model's own layers. Set fused_kernels: false"
            )


def _measure(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Return the loss and the gradient of every weight, by name."""
    model.train()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    gradients = {f"gradient of {name}": part.grad for name, part in model.named_parameters() if part.grad is not None}
    return {"loss": loss.detach(), **gradients}


def _distance(found: Tensor, expected: Tensor) -> float:
    """Return the relative distance of two tensors in the L2 norm."""
    return float((found.float() - expected).norm() / expected.norm().clamp_min(1e-12))
