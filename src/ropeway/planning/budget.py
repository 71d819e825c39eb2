"""Estimates of GPU memory fit with remedies, disk space and hours of a run. Pure functions, without torch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

from ropeway.config.params import Profile
from ropeway.config.sections import ScratchBase
from ropeway.config.zero import PARTITIONED_STAGE
from ropeway.models.architectures import can_split_heads
from ropeway.planning.memory import DTYPE_BYTES, Load, checkpoint_bytes
from ropeway.planning.phases import plan_gpu
from ropeway.runtime.errors import ConfigError

# Dense peak with 16-bit inputs and fp32 accumulation, in TFLOPS. Source: NVIDIA's data sheets of each card.
CARDS = {"a100": 312.0, "h100": 989.0, "h100-pcie": 756.0, "h200": 989.0, "l40s": 362.0, "v100": 125.0}
ASSUMED_CARD = "a100"
ASSUMED_MFU = 0.4  # of GPUs not measured here; SmolLM2-135M on a CPU, all weights: 0.38 (docs/runs.md)
CPU = "cpu"  # `card` of a run that trains on this machine's CPU
_MOST_CHANGES = 3  # in one remedy; three only if no two fit
COMMON_GIB = (40.0, 80.0)  # used if no GPU is known: the two sizes of an A100


@dataclass(frozen=True, slots=True)
class MemoryVerdict:
    """Whether a run fits a GPU.

    Attributes:
        memory_bytes: Memory of the GPU.
        needed_bytes: Total of the plan.
        remedies: If it does not fit: (changes that make it fit, their total in bytes), fewest changes first.
    """

    memory_bytes: int
    needed_bytes: int
    remedies: tuple[tuple[str, int], ...]

    @property
    def fits(self) -> bool:
        """Whether the plan's total is at most the GPU's memory."""
        return self.needed_bytes <= self.memory_bytes


def check_fit(load: Load, global_batch_size: int, memory_bytes: int) -> MemoryVerdict:
    """Return whether a load fits a GPU, and which changes make it fit, by planning again with each change."""
    needed = plan_gpu(load, memory_bytes=memory_bytes)["total"]
    remedies: tuple[tuple[str, int], ...] = ()
    if needed > memory_bytes:
        remedies = tuple(_find_remedies(load, global_batch_size, memory_bytes))
    return MemoryVerdict(memory_bytes, needed, remedies)


def _find_remedies(load: Load, global_batch_size: int, memory_bytes: int) -> Iterator[tuple[str, int]]:
    """Yield the minimal sets of one or two changes that fit; of three only if there are no smaller ones.

    Changes of one kind are ordered by cost, so only the cheapest one that fits is listed.
    """
    changes = plan_changes(load, global_batch_size)
    found: list[frozenset[str]] = []
    for size in range(1, _MOST_CHANGES + 1):
        if size == _MOST_CHANGES and found:
            return
        for chosen in combinations(changes, size):
            kinds = frozenset(change.kind for change in chosen)
            if len(kinds) < size or any(known <= kinds for known in found):
                continue
            changed = load
            for change in chosen:
                changed = change.make(changed)
            total = plan_gpu(changed, memory_bytes=memory_bytes)["total"]
            if total <= memory_bytes and _divides_batch(changed, global_batch_size):
                found.append(kinds)
                yield " + ".join(change.words for change in chosen), total


@dataclass(frozen=True, slots=True)
class Change:
    """A possible change of a load; a remedy contains at most one of each kind."""

    kind: str
    words: str
    make: Callable[[Load], Load]


def plan_changes(load: Load, global_batch_size: int) -> list[Change]:
    """Return the possible changes of a load."""
    zero, changes = load.zero, []
    if not load.checkpointing:
        words = "gradient_checkpointing: true"
        changes.append(Change("checkpointing", words, lambda load: replace(load, checkpointing=True)))
    if load.micro_batch_size > 1:
        words = "per_device_train_batch_size: 1"
        changes.append(Change("rows", words, lambda load: replace(load, micro_batch_size=1)))
    changes += [
        Change("stage", f"ZeRO stage {stage}", partial(_with_stage, stage=stage))
        for stage in range(max(zero.stage + 1, 2), 4)
    ]
    changes += [
        Change("ranks", f"{ranks} ranks", partial(replace, ranks=ranks))
        for ranks in (load.ranks * factor for factor in (2, 4, 8, 16))
        if _divides_batch(replace(load, ranks=ranks, micro_batch_size=1), global_batch_size)
    ]
    changes += [
        Change("sequence", f"sequence_parallel: {shared}", partial(replace, sequence_parallel=shared))
        for shared in range(load.sequence_parallel + 1, load.ranks + 1)
        if load.ranks % shared == 0 and can_split_heads(load.sizes.heads, load.sizes.key_value_heads, shared)
    ]
    if not zero.offload_optimizer:
        words = "offload_optimizer to cpu"
        changes.append(
            Change("offload", words, lambda load: replace(load, zero=replace(load.zero, offload_optimizer=True)))
        )
    if zero.stage == PARTITIONED_STAGE and not zero.offload_parameters:
        words = "offload_param to cpu"
        changes.append(
            Change("parameters", words, lambda load: replace(load, zero=replace(load.zero, offload_parameters=True)))
        )
    return changes


def _with_stage(load: Load, *, stage: int) -> Load:
    return replace(load, zero=replace(load.zero, stage=stage))


def _divides_batch(load: Load, global_batch_size: int) -> bool:
    groups, alone = divmod(load.ranks, load.sequence_parallel)
    return not alone and global_batch_size % (load.micro_batch_size * groups) == 0


def plan_disk(profile: Profile, load: Load, *, found: Mapping[str, int], local_registry: bool) -> dict[str, int]:
    """Return bytes on disk by part: checkpoints with the one being written, stage outputs and their copies.

    Args:
        profile: The profile of the run.
        load: The load of one rank.
        found: Bytes of existing stage folders; they replace estimates (only `base` has one).
        local_registry: Whether the registry is on this disk.
    """
    weights = load.sizes.parameters
    stored = DTYPE_BYTES["fp32"] if isinstance(profile.base, ScratchBase) else 2  # published weights are 16-bit
    parts = {
        "checkpoints": (profile.save_total_limit + 1) * checkpoint_bytes(load),
        "raw": found.get("raw", 0),
        "base": found.get("base", weights * stored),
        "tokens": found.get("tokens", 0),
        "data": found.get("data", 0),
        "model": weights * load.number_bytes,
        "package": weights * DTYPE_BYTES[profile.package.dtype],
    }
    parts["dvc_cache"] = sum(parts.values()) - parts["checkpoints"]  # copies, unless the file system has reflinks
    parts["registry"] = parts["package"] if local_registry else 0
    return parts


@dataclass(frozen=True, slots=True)
class Speed:
    """Assumed training speed.

    Attributes:
        card: Name of the GPU, `stated`, or `cpu`.
        peak_tflops: Peak of one GPU, or of one rank's part of a CPU; None if it is not known for this dtype.
        mfu: Model FLOPs utilization, as a fraction of the peak; recomputed layers do not count.
    """

    card: str
    peak_tflops: float | None
    mfu: float


def plan_speed(card: str | None, mfu: float | None, *, dtype: str) -> Speed:
    """Return the speed of a known GPU or of a peak in TFLOPS; raise ConfigError for an unknown GPU or invalid MFU."""
    mfu = _check_mfu(mfu)
    name = ASSUMED_CARD if card is None else card.lower()
    if name in CARDS:
        return Speed(name.upper(), CARDS[name] if dtype != "fp32" else None, mfu)
    try:
        peak = float(name)
    except ValueError:
        peak = 0.0
    if not 0 < peak < float("inf"):
        raise ConfigError(f"--card: expected {', '.join(CARDS)}, {CPU}, or a peak in TFLOPS; found {card!r}")
    return Speed("stated", peak, mfu)


def plan_cpu_speed(tflops: float, mfu: float | None) -> Speed:
    """Return the speed of a CPU of which one rank has these measured TFLOPS; raise ConfigError for an invalid MFU."""
    return Speed(CPU, tflops, _check_mfu(mfu))


def _check_mfu(mfu: float | None) -> float:
    if mfu is None:
        return ASSUMED_MFU
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu: expected more than 0 and at most 1, found {mfu:g}")
    return mfu


def name_card(found: str) -> str | None:
    """Return the key of `CARDS` for a GPU name of the driver; None if it is not listed.

    >>> name_card("NVIDIA H100 PCIe"), name_card("NVIDIA A100-SXM4-80GB"), name_card("NVIDIA T4")
    ('h100-pcie', 'a100', None)
    """
    words = found.lower()
    keys = sorted(CARDS, key=len, reverse=True)
    return next((key for key in keys if all(part in words for part in key.split("-"))), None)


def token_flops(load: Load) -> float:
    """Return the FLOPs of forward and backward for one token, without recomputation.

    4 per weight in a matrix product (the input embedding is a lookup), 2 more per trained weight, and 6 L H T for
    causal attention, half of the 12 L H T of full attention. Source: Chowdhery et al. 2022, arXiv:2204.02311, app. B.
    """
    sizes, frozen = load.sizes, load.parameters - load.trainable
    multiplying = load.parameters - (0 if sizes.tied else sizes.embedding_parameters)
    trained = max(0, multiplying - frozen)
    return 4.0 * multiplying + 2.0 * trained + 6.0 * sizes.layers * sizes.hidden * load.row_tokens


def plan_hours(load: Load, speed: Speed, tokens: int | None) -> float | None:
    """Return the hours of training on `tokens`; None if tokens or peak are not known."""
    if tokens is None or speed.peak_tflops is None:
        return None
    per_second = load.ranks * speed.peak_tflops * 1e12 * speed.mfu
    return tokens * token_flops(load) / per_second / 3600


def plan_validation_hours(load: Load, speed: Speed, tokens: int | None) -> float | None:
    """Return the hours of forward passes over `tokens` of validation rows; None if tokens or peak are not known.

    A forward pass has 2 FLOPs per weight in a matrix product and 2 L H T for causal attention: a third of `token_flops`
    if all weights are trained.
    """
    if tokens is None or speed.peak_tflops is None:
        return None
    sizes = load.sizes
    multiplying = load.parameters - (0 if sizes.tied else sizes.embedding_parameters)
    per_token = 2.0 * multiplying + 2.0 * sizes.layers * sizes.hidden * load.row_tokens
    return tokens * per_token / (load.ranks * speed.peak_tflops * 1e12 * speed.mfu) / 3600


def count_events(steps: int, every: int) -> int:
    """Return how often something happens every `every` steps and after the last one.

    >>> count_events(3319, 200), count_events(400, 200)
    (17, 2)
    """
    return -(-steps // every)


def plan_save_hours(load: Load, saves: int, gigabytes_per_second: float | None) -> float | None:
    """Return the hours in which training waits for checkpoints to be written; None if the bandwidth is not known."""
    if gigabytes_per_second is None:
        return None
    return saves * checkpoint_bytes(load) / (gigabytes_per_second * 1e9) / 3600
