"""Memory settings of a DeepSpeed JSON: ZeRO stage, offload, buckets. Training validates the whole file."""

from dataclasses import dataclass
from typing import TypedDict

from ropeway.runtime.errors import ConfigError
from ropeway.runtime.json_text import parse_json

PARTITIONED_STAGE = 3  # from this stage on, weights are partitioned; checkpoints hold only the fp32 copies


class Offload(TypedDict, total=False):
    """The keys of `offload_optimizer` or `offload_param` that are read here."""

    device: str


class ZeroSection(TypedDict, total=False):
    """The keys of `zero_optimization` that are read here."""

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
    """How DeepSpeed partitions model states over ranks."""

    stage: int  # partitions 0: nothing, 1: optimizer states, 2: also gradients, 3: also weights
    offload_optimizer: bool  # fp32 weights and moments are in host memory (or on NVMe), and Adam runs there
    offload_parameters: bool  # stage 3: the 16-bit weights are there too
    bucket_elements: int  # elements per gradient reduction
    overlap: bool  # reduce gradients during backward, with a second bucket
    live_elements: int  # stage 3: maximum of gathered weights
    prefetch_elements: int  # stage 3: weights prefetched
    sub_group_elements: int  # stage 3: weights per optimizer sub-step


def read_zero(text: str, path: str) -> Zero:
    """Return the memory settings of a DeepSpeed JSON; raise ConfigError unless it is a JSON object."""
    try:
        named = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}. Correct the file") from None
    if not isinstance(named, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(named).__name__}. Correct the file")
    return parse_zero_section(named.get("zero_optimization", {}))


def parse_zero_section(section: ZeroSection) -> Zero:
    """Return the settings of a section `zero_optimization`. Source of the defaults: deepspeed 0.19.8, zero/config.py.

    >>> parse_zero_section({"stage": 3}).overlap, parse_zero_section({"stage": 2}).bucket_elements
    (True, 500000000)
    """
    stage = int(section.get("stage", 0))
    overlap = section.get("overlap_comm")
    return Zero(
        stage=stage,
        offload_optimizer=_is_offloaded(section.get("offload_optimizer")),
        offload_parameters=stage == PARTITIONED_STAGE and _is_offloaded(section.get("offload_param")),
        bucket_elements=int(section.get("reduce_bucket_size", 5e8)),
        overlap=stage == PARTITIONED_STAGE if overlap is None else bool(overlap),
        live_elements=int(section.get("stage3_max_live_parameters", 1e9)),
        prefetch_elements=int(section.get("stage3_prefetch_bucket_size", 5e7)),
        sub_group_elements=int(section.get("sub_group_size", 1e9)),
    )


def _is_offloaded(section: Offload | None) -> bool:
    return (section or {}).get("device", "none") in ("cpu", "nvme")
