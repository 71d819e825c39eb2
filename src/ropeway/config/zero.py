"""What a DeepSpeed JSON says about memory: ZeRO stage, offload, buckets. Training checks the whole of it."""

import json
from dataclasses import dataclass
from typing import TypedDict

from ropeway.runtime.errors import ConfigError

PARTITIONED_STAGE = 3  # from here on weights are cut over the ranks, and stand in no checkpoint beside their masters


class Offload(TypedDict, total=False):
    """`offload_optimizer` or `offload_param`, as far as it is read here."""

    device: str


class ZeroSection(TypedDict, total=False):
    """`zero_optimization` of a DeepSpeed JSON, as far as it is read here."""

    stage: int
    offload_optimizer: Offload | None
    offload_param: Offload | None
    overlap_comm: bool | None
    reduce_bucket_size: float
    stage3_max_live_parameters: float
    stage3_prefetch_bucket_size: float
    sub_group_size: float


@dataclass(frozen=True, slots=True)
class Zero:
    """How DeepSpeed spreads a model's states over ranks."""

    stage: int  # 0 nothing, 1 optimizer, 2 and gradients, 3 and weights are partitioned
    offload_optimizer: bool  # Fp32 weights and moments live in host memory (or on NVMe), and Adam runs there
    offload_parameters: bool  # at stage 3 the 16-bit weights live there too
    bucket_elements: int  # gradients reduced at once
    overlap: bool  # gradients are reduced during backward, from a second bucket
    live_elements: int  # at stage 3, the weights that may be gathered at one time
    prefetch_elements: int  # at stage 3, the weights gathered ahead
    sub_group_elements: int  # at stage 3, the weights whose step is made at one time


def read_zero(text: str, path: str) -> Zero:
    """Return what the JSON that `deepspeed_config` names says about memory; ConfigError unless it is an object."""
    try:
        named = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(named, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(named).__name__}")
    return parse_zero_section(named.get("zero_optimization", {}))


def parse_zero_section(section: ZeroSection) -> Zero:
    """Return a section `zero_optimization` as an object. Source of the defaults: deepspeed 0.19.8, zero/config.py.

    >>> parse_zero_section({"stage": 3}).overlap, parse_zero_section({"stage": 2}).bucket_elements
    (True, 500000000)
    """
    stage = int(section.get("stage", 0))
    overlap = section.get("overlap_comm")
    return Zero(
        stage=stage,
        offload_optimizer=_offloads(section.get("offload_optimizer")),
        offload_parameters=stage == PARTITIONED_STAGE and _offloads(section.get("offload_param")),
        bucket_elements=int(section.get("reduce_bucket_size", 5e8)),
        overlap=stage == PARTITIONED_STAGE if overlap is None else bool(overlap),
        live_elements=int(section.get("stage3_max_live_parameters", 1e9)),
        prefetch_elements=int(section.get("stage3_prefetch_bucket_size", 5e7)),
        sub_group_elements=int(section.get("sub_group_size", 1e9)),
    )


def _offloads(section: Offload | None) -> bool:
    return (section or {}).get("device", "none") in ("cpu", "nvme")
