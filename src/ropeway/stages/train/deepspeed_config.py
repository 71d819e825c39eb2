"""The DeepSpeed configuration: a pure function of params, number of ranks and the DeepSpeed JSON, without "auto"."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypedDict

from ropeway.config.params import TrainParams
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.json_text import parse_json

# Set by params.yaml; the DeepSpeed JSON must not have them, since the two could disagree.
_OWNED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "bf16", "scheduler", "fp16.enabled", "optimizer.params.lr", "optimizer.params.betas", "optimizer.params.eps",
    "optimizer.params.weight_decay", "checkpoint", "data_types",
)  # fmt: skip


_COMPILED = ("adam", "adamw", "lamb", "lion")
_NO_COMPILER = "TORCHDYNAMO_DISABLE"  # of torch, read at each torch.compile


class OptimizerJson(TypedDict, total=False):
    """`optimizer` of a DeepSpeed JSON."""

    type: str
    params: dict[str, object]


class DeepSpeedJson(TypedDict, total=False):
    """The JSON file that `deepspeed_config` names, with every key it may have."""

    fp16: dict[str, object]
    optimizer: OptimizerJson
    zero_optimization: dict[str, object]
    activation_checkpointing: dict[str, object]
    communication_data_type: str


def parse_deepspeed_json(text: str, path: str) -> DeepSpeedJson:
    """Return the parsed JSON of `deepspeed_config`.

    Raises:
        ConfigError: It is not JSON, contains "auto", or has a key that is unknown or set by params.yaml.
    """
    try:
        named: DeepSpeedJson = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    allowed = tuple(DeepSpeedJson.__annotations__)
    faults = [f"{path}: {key}: set by params.yaml; remove it here" for key in _OWNED if _holds(named, key)]
    faults += [f"{path}: {key}: unknown key; allowed are {', '.join(allowed)}" for key in named if key not in allowed]
    if '"auto"' in json.dumps(named):
        faults.append(f'{path}: "auto" is not supported; remove such keys, they are set from params.yaml')
    if faults:
        raise ConfigError("\n".join(faults))
    return named


def check_optimizer(named: DeepSpeedJson, path: str) -> None:
    """Raise ConfigError if DeepSpeed would compile the optimizer for this GPU and there is no CUDA compiler.

    DeepSpeed builds its own optimizers (FusedAdam, FusedLamb, FusedLion) at the first start with the nvcc of torch's
    CUDA version; torch's fused AdamW needs none. With the optimizer offloaded a C++ compiler is enough.
    Source: deepspeed 0.19.8, runtime/engine.py and ops/op_builder/builder.py.
    """
    optimizer = named.get("optimizer", OptimizerJson(type="AdamW"))
    offloaded = _holds(named, "zero_optimization.offload_optimizer")
    compiled = optimizer.get("type", "").lower() in _COMPILED and not optimizer.get("params", {}).get("torch_adam")
    if not compiled or offloaded:
        return
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or shutil.which("nvcc", path=f"{CUDA_HOME}/bin") is None:
        raise ConfigError(
            f"{path}: DeepSpeed compiles optimizer {optimizer.get('type')} with nvcc, which was not found. Set "
            '`"torch_adam": true, "fused": true` in optimizer.params to use torch\'s fused AdamW, or install the CUDA '
            "toolkit and set CUDA_HOME"
        )


@contextmanager
def without_compiler(named: DeepSpeedJson) -> Iterator[None]:
    """Turn torch.compile off during `deepspeed.initialize`, unless the optimizer is Muon or the variable is set.

    DeepSpeed imports Muon to check any optimizer, and Muon's decorators import torch's compiler: 1 to 2 s of processor
    time at each start of each rank. Source: deepspeed 0.19.8, runtime/zero/utils.py, `is_zero_supported_optimizer`.
    """
    if _NO_COMPILER in os.environ or "muon" in named.get("optimizer", OptimizerJson()).get("type", "").lower():
        yield
        return
    os.environ[_NO_COMPILER] = "1"
    try:
        yield
    finally:
        del os.environ[_NO_COMPILER]


def _holds(tree: Mapping[str, object], dotted: str) -> bool:
    here: object = tree
    for part in dotted.split("."):
        if not isinstance(here, Mapping) or part not in here:
            return False
        here = here[part]
    return True


def plan_deepspeed(
    profile: TrainParams, named: DeepSpeedJson, *, ranks: int, accumulation_steps: int, total_steps: int
) -> dict[str, object]:
    """Return the complete configuration for `deepspeed.initialize`."""
    optimizer = named.get("optimizer", OptimizerJson(type="AdamW"))
    params = {
        **optimizer.get("params", {}),
        "lr": profile.learning_rate,
        "betas": [profile.adam_beta1, profile.adam_beta2],
        "eps": profile.adam_epsilon,
        "weight_decay": profile.weight_decay,
    }
    return {
        **{key: value for key, value in named.items() if key not in ("optimizer", "fp16")},
        "train_batch_size": profile.per_device_train_batch_size * accumulation_steps * ranks,
        "train_micro_batch_size_per_gpu": profile.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": profile.max_grad_norm,
        "fp16": {"enabled": profile.dtype == "fp16", **named.get("fp16", {})},
        "bf16": {"enabled": profile.dtype == "bf16"},
        "optimizer": {**optimizer, "params": params},
        "scheduler": _scheduler(profile, total_steps),
        "steps_per_print": 2**31,  # `ropeway.runtime.progress` prints the steps
    }


def _scheduler(profile: TrainParams, total_steps: int) -> dict[str, object]:
    if not profile.warmup_steps and profile.lr_schedule == "constant":
        rate = profile.learning_rate  # the lowest rate of the warm-up, which DeepSpeed always has
        return {"type": "WarmupLR", "params": {"warmup_min_lr": rate, "warmup_max_lr": rate}}
    warmup = {"warmup_num_steps": max(profile.warmup_steps, 1), "warmup_type": "linear"}
    if profile.lr_schedule == "cosine":
        return {"type": "WarmupCosineLR", "params": {"total_num_steps": total_steps, "cos_min_ratio": 0.0, **warmup}}
    rates = {"warmup_min_lr": 0.0, "warmup_max_lr": profile.learning_rate, **warmup}
    if profile.lr_schedule == "linear":
        return {"type": "WarmupDecayLR", "params": {"total_num_steps": total_steps, **rates}}
    return {"type": "WarmupLR", "params": rates}
