"""Estimates of a run before it starts: steps, memory, disk and hours from params, rows and ranks; without torch."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from ropeway.config.frozen import read_texts
from ropeway.config.params import Profile
from ropeway.config.zero import Zero, read_zero
from ropeway.data.accumulation import accumulation_steps
from ropeway.data.batches import plan_epoch
from ropeway.data.mixture import epoch_count
from ropeway.data.shards import Shards, SourceShards, open_shards
from ropeway.planning.budget import (
    COMMON_GIB,
    MemoryVerdict,
    Speed,
    check_fit,
    count_events,
    name_card,
    plan_cpu_speed,
    plan_disk,
    plan_hours,
    plan_save_hours,
    plan_speed,
    plan_validation_hours,
)
from ropeway.planning.memory import GIB, Load, checkpoint_bytes
from ropeway.planning.phases import certain_bytes, plan_gpu, plan_host, worst_phase
from ropeway.planning.shape import measured_weights, with_shape
from ropeway.runtime.devices import detect_gpus
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.manifest import NAME
from ropeway.runtime.workspace import Workspace, count_bytes, format_bytes

MEMORY_CHECK_VARIABLE = "ROPEWAY_MEMORY_CHECK"  # `off` disables `check_memory`
OTHER_RANKS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The caller's description of the machine; None: detected or assumed.

    Attributes:
        save_gbps: Bandwidth at which checkpoints are written, in GB/s; None: waiting for saves is not counted.
        save_measured: Whether `save_gbps` is of `measure_disk`, else stated.
        cpu_tflops: Of one rank, of `measure_cpu`; for hours where the run trains on a CPU.
    """

    gpu_memory_gib: float | None = None
    card: str | None = None
    mfu: float | None = None
    save_gbps: float | None = None
    save_measured: bool = False
    cpu_tflops: float | None = None


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The estimates of a run.

    Attributes:
        rows: Rows per epoch over all ranks; None if not known yet.
        rows_per_source: The same by source; in the packed layout its sequences.
        tokens_per_source: Tokens per epoch; an expected value if the epoch samples a part; None before prepare.
        tokens: Tokens of all epochs, without padding.
        most_tokens: Tokens of all epochs if every row were full.
        other_ranks: Steps with other numbers of ranks, here and in the published code.
        counted: Whether the weights are those of the stated shape or were counted by stage base; else they are those of
            a Llama with the sizes in the base's config.json.
        gpu_bytes: Parts of the highest peak of the first and the last rank, in the phase that `gpu_peak` names.
        disk_unknown: Parts of the disk space that are not known yet.
        fits: Whether it fits the stated or detected GPU; None if neither is known.
        cards: By memory in GiB: whether it fits, and the changes that make it fit, with their bytes.
        hours: At `speed`: `expected` from tokens and `at_most` from full rows, each with all of `validation` (rows of
            full length) and `saves` that are known.
        validation_passes: Validations during the run.
        saves: Checkpoints during the run.
    """

    profile: str
    ranks: int
    micro_batch_size: int
    accumulation_steps: int
    global_batch_size: int
    rows_per_source: dict[str, int | None]
    tokens_per_source: dict[str, int | None]
    rows: int | None
    tokens: int | None
    most_tokens: int | None
    optimizer_steps: int | None
    other_ranks: dict[int, dict[str, int | str]]
    parameters: int
    counted: bool
    trainable: int
    checkpoint_bytes: int
    gpu_bytes: dict[str, int]
    gpu_peak: str
    host_bytes: dict[str, int]
    disk_bytes: int
    disk_parts: dict[str, int]
    disk_unknown: list[str]
    disk_free_bytes: int
    fits: bool | None
    cards: dict[str, MemoryVerdict]
    speed: Speed
    hours: dict[str, float | None]
    validation_passes: int | None
    saves: int | None
    save_gbps: float | None
    save_measured: bool
    from_data: bool

    def as_json(self) -> str:
        """Return the plan as JSON."""
        facts = asdict(self)
        for name, verdict in self.cards.items():
            facts["cards"][name]["fits"] = verdict.fits
        return json.dumps(facts, indent=1, sort_keys=True)


def plan_run(
    workspace: Workspace,
    profile: Profile,
    *,
    ranks: int,
    request: PlanRequest | None = None,
    counted: "EpochCounts | None" = None,
) -> RunPlan:
    """Return the plan of a run, from the prepared data if it exists, else from `expected_rows` of the sources.

    `counted` replaces what is known of the data.

    Raises:
        ConfigError: The ranks do not divide the batch, or the DeepSpeed JSON, card or MFU is invalid.
    """
    request, stated = request or PlanRequest(), profile.expected_model is not None
    profile = with_shape(workspace, profile)
    named = read_texts(workspace.root, [profile.deepspeed_config], key="deepspeed_config")
    zero = read_zero(named[profile.deepspeed_config], profile.deepspeed_config)
    load = Load.of(profile, zero, ranks=ranks, measured=measured_weights(workspace, profile))
    counted = counted or count_epoch_data(workspace, profile)
    disk, unknown = _plan_disk(workspace, profile, load)
    gpus = detect_gpus() if request.gpu_memory_gib is None or request.card is None else []
    memory = request.gpu_memory_gib
    if memory is None and gpus:
        memory = min(gpu.memory_bytes for gpu in gpus) / GIB
    memory_bytes = None if memory is None else int(memory * GIB)
    rank, phase, _ = worst_phase(load, memory_bytes=memory_bytes)
    cards = {
        f"{size:.4g}": check_fit(load, profile.global_batch_size, int(size * GIB))
        for size in (COMMON_GIB if memory is None else (memory,))
    }
    card = request.card or (name_card(gpus[0].name) if gpus else None)
    if request.cpu_tflops is None:
        speed = plan_speed(card, request.mfu, dtype=profile.dtype)
    else:
        speed = plan_cpu_speed(request.cpu_tflops, request.mfu)
    steps = counted.steps(profile)
    passes = None if steps is None else count_events(steps, profile.eval_steps)
    saves = _count_saves(profile, steps, plan_hours(load, speed, counted.most_tokens))
    return RunPlan(
        profile=workspace.profile,
        ranks=ranks,
        micro_batch_size=profile.per_device_train_batch_size,
        accumulation_steps=accumulation_steps(profile, ranks),
        global_batch_size=profile.global_batch_size,
        rows_per_source=counted.rows_per_source,
        tokens_per_source=counted.tokens_per_source,
        rows=counted.rows,
        tokens=counted.tokens,
        most_tokens=counted.most_tokens,
        optimizer_steps=steps,
        other_ranks=_plan_other_ranks(profile, counted.rows, ranks),
        parameters=load.sizes.parameters,
        counted=stated or load.sizes.measured is not None,
        trainable=load.trainable,
        checkpoint_bytes=checkpoint_bytes(load),
        gpu_bytes=plan_gpu(load, memory_bytes=memory_bytes),
        gpu_peak=f"{phase.replace('_', ' ')} of rank {rank}",
        host_bytes=plan_host(load),
        disk_bytes=sum(disk.values()),
        disk_parts=disk,
        disk_unknown=unknown,
        disk_free_bytes=shutil.disk_usage(workspace.root).free,
        fits=None if memory is None else next(iter(cards.values())).fits,
        cards=cards,
        speed=speed,
        hours=_plan_hours(profile, load, speed, counted, 0 if profile.async_save else saves, request.save_gbps),
        validation_passes=passes,
        saves=saves,
        save_gbps=request.save_gbps,
        save_measured=request.save_measured,
        from_data=counted.from_data,
    )


def _count_saves(profile: Profile, steps: int | None, hours: float | None) -> int | None:
    """Return the checkpoints of a run: by steps or, if more, by `save_minutes` in at most `hours` of training."""
    if steps is None:
        return None
    by_steps = count_events(steps, profile.save_steps)
    if profile.save_minutes is None or hours is None:
        return by_steps
    return max(by_steps, math.ceil(hours * 60 / profile.save_minutes))


def _plan_hours(
    profile: Profile, load: Load, speed: Speed, counted: "EpochCounts", waits: int | None, save_gbps: float | None
) -> dict[str, float | None]:
    """Return the hours by name; see `RunPlan.hours`. `waits`: checkpoints that are not saved in the background."""
    steps, rows = counted.steps(profile), counted.validation_rows
    tokens = None
    if steps is not None and rows is not None:
        tokens = count_events(steps, profile.eval_steps) * rows * profile.max_length
    validation = plan_validation_hours(load, speed, tokens)
    saves = None if waits is None else plan_save_hours(load, waits, save_gbps)
    pauses = (validation or 0.0) + (saves or 0.0)
    hours: dict[str, float | None] = {"validation": validation, "saves": saves}
    for name, count in {"expected": counted.tokens, "at_most": counted.most_tokens}.items():
        training = plan_hours(load, speed, count)
        hours[name] = None if training is None else training + pauses
    return hours


def _plan_disk(workspace: Workspace, profile: Profile, load: Load) -> tuple[dict[str, int], list[str]]:
    folders = {"raw": workspace.raw, "base": workspace.base, "tokens": workspace.tokens, "data": workspace.data}
    found = {name: count_bytes(folder) for name, folder in folders.items() if (folder / NAME).is_file()}
    local = workspace.registry_url.startswith("file:")
    unknown = [name for name in ("raw", "tokens", "data") if name not in found]
    return plan_disk(profile, load, found=found, local_registry=local), unknown


def check_memory(workspace: Workspace, profile: Profile, zero: Zero, *, ranks: int) -> None:
    """Check that the GPUs can hold the model states; on a CPU this does nothing.

    The check counts neither activations nor assumptions, so a run that could fit always starts. If only the estimated
    total is above the GPU's memory, one line is printed.

    Raises:
        ConfigError: Weights, gradients, optimizer and buckets alone exceed the memory of the smallest GPU.
    """
    gpus = detect_gpus()
    if not gpus or os.environ.get(MEMORY_CHECK_VARIABLE) == "off":
        return
    profile = with_shape(workspace, profile)
    load = Load.of(profile, zero, ranks=ranks, measured=measured_weights(workspace, profile))
    memory, certain = min(gpu.memory_bytes for gpu in gpus), certain_bytes(load)
    verdict = check_fit(load, profile.global_batch_size, memory)
    if verdict.fits:
        return
    what = "; ".join(f"{words} ({format_bytes(total)})" for words, total in verdict.remedies) or "a larger GPU"
    if certain > memory:
        raise ConfigError(
            f"GPU memory is {format_bytes(memory)}, but with {ranks} ranks weights, gradients, optimizer and buckets "
            f"alone need {format_bytes(certain)} per GPU. Changes that fit: {what}. `ropeway plan` shows the parts; "
            f"{MEMORY_CHECK_VARIABLE}=off starts the run anyway"
        )
    print(
        f"the run may not fit: it needs about {format_bytes(verdict.needed_bytes)}, a GPU has {format_bytes(memory)}; "
        f"changes that fit: {what}",
        flush=True,
    )


@dataclass(frozen=True, slots=True)
class EpochCounts:
    """Rows and tokens per epoch, and tokens of all epochs."""

    rows_per_source: dict[str, int | None]
    tokens_per_source: dict[str, int | None]
    rows: int | None
    tokens: int | None
    most_tokens: int | None
    validation_rows: int | None
    from_data: bool

    def steps(self, profile: Profile) -> int | None:
        """Return the optimizer steps of the whole run."""
        return None if self.rows is None else self.rows // profile.global_batch_size * profile.num_train_epochs


def count_epoch_data(workspace: Workspace, profile: Profile) -> EpochCounts:
    """Return the rows and tokens of a run, from the prepared data if it exists, else from `expected_rows`."""
    shards = open_shards(workspace.data, verify=False) if (workspace.data / NAME).is_file() else None
    sizes = {source.name: len(source.train) for source in shards.sources} if shards else _expected_sizes(profile)
    rows = {
        name: None if (size := sizes[name]) is None else epoch_count(size, options, name=name)
        for name, options in profile.mixture
    }
    tokens: dict[str, int | None] = dict.fromkeys(rows)
    if shards:
        tokens = {part.name: _count_tokens(part, rows[part.name] or 0, profile) for part in shards.sources}
    total = _sum(rows)
    if profile.layout == "packed":  # the number of packed rows depends on the sequences' lengths
        total = plan_epoch(shards, profile, epoch=0).rows if shards else None
    epochs, read = profile.num_train_epochs, _sum(tokens)
    return EpochCounts(
        rows_per_source=rows,
        tokens_per_source=tokens,
        rows=total,
        tokens=None if read is None else read * epochs,
        most_tokens=None if total is None else total * profile.max_length * epochs,
        validation_rows=_count_validation(profile, shards),
        from_data=shards is not None,
    )


def _sum(counts: Mapping[str, int | None]) -> int | None:
    known = [count for count in counts.values() if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _expected_sizes(profile: Profile) -> dict[str, int | None]:
    """Return the expected training sequences by source: `expected_rows` without the validation split."""
    split = profile.val_split
    return {
        name: None if source.expected_rows is None else source.expected_rows - math.ceil(split * source.expected_rows)
        for name, source in profile.sources.items()
    }


def _count_validation(profile: Profile, shards: Shards | None) -> int | None:
    """Return the validation rows of all sources: of the prepared data, else expected ones."""
    if shards:
        return sum(len(source.validation) for source in shards.sources)
    most = {name: options.max_val_set for name, options in profile.mixture}
    return _sum(
        {
            name: None
            if source.expected_rows is None
            else min(math.ceil(profile.val_split * source.expected_rows), most.get(name) or source.expected_rows)
            for name, source in profile.sources.items()
        }
    )


def _count_tokens(source: SourceShards, rows: int, profile: Profile) -> int:
    """Return a source's tokens per epoch; packed documents count in full, other sequences up to `max_length`."""
    lengths = source.lengths[source.train].astype(np.int64)
    if not (profile.layout == "packed" and source.is_document):
        lengths = np.minimum(lengths, profile.max_length)
    return round(float(lengths.mean()) * rows) if len(lengths) else 0


def _plan_other_ranks(profile: Profile, rows: int | None, ranks: int) -> dict[int, dict[str, int | str]]:
    """Return the steps with other numbers of ranks."""
    return (
        {}
        if rows is None
        else {count: _plan_rank_count(profile, rows, count) for count in OTHER_RANKS if count != ranks}
    )


def _plan_rank_count(profile: Profile, rows: int, ranks: int) -> dict[str, int | str]:
    """Return the steps with `ranks` ranks: here (same batch) and in the published code (fixed accumulation)."""
    original = rows // (profile.per_device_train_batch_size * ranks * profile.gradient_accumulation_steps)
    original *= profile.num_train_epochs
    groups, alone = divmod(ranks, profile.sequence_parallel)
    if alone:
        return {"refused": f"{ranks} is no multiple of sequence_parallel", "original": original}
    rows_per_pass = profile.per_device_train_batch_size * groups
    if profile.global_batch_size % rows_per_pass:
        return {
            "refused": f"{profile.global_batch_size} rows are not divisible by {rows_per_pass}",
            "original": original,
        }
    return {
        "accumulation_steps": profile.global_batch_size // rows_per_pass,
        "optimizer_steps": rows // profile.global_batch_size * profile.num_train_epochs,
        "original": original,
    }
