"""What a run will do and cost, before anything is spent: arithmetic over params, rows and ranks. No torch here."""

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
from ropeway.data.shards import SourceShards, open_shards
from ropeway.planning.budget import (
    COMMON_GIB,
    MemoryVerdict,
    Speed,
    gib,
    judge,
    name_card,
    plan_disk,
    plan_hours,
    plan_speed,
)
from ropeway.planning.memory import GIB, Load, certain_bytes, checkpoint_bytes, plan_gpu, plan_host
from ropeway.runtime.devices import detect_gpus
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.manifest import NAME
from ropeway.runtime.workspace import Workspace, count_bytes

UNCHECKED = "ROPEWAY_MEMORY_CHECK"  # `off` lets a run start that the plan says cannot fit
OTHER_RANKS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the caller states about the machine; None is found out or assumed."""

    gpu_memory_gib: float | None = None
    card: str | None = None
    mfu: float | None = None


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run will do.

    Attributes:
        rows: Rows an epoch reads over all ranks; None where nothing states them yet.
        rows_per_source: The same by source; in the packed layout its sequences.
        tokens_per_source: Tokens an epoch reads; a mean where it draws a part; None before prepare.
        most_tokens: The same if every row were full.
        other_ranks: Steps that other rank counts would make here, and would have made in the original.
        disk_unknown: Parts of the disk's need that nothing states yet.
        fits: Whether it fits the stated or found card; None where neither is known.
        cards: For each memory in GiB: whether it fits, and what would make it fit with the bytes it then takes.
        hours: `expected` from tokens and `at_most` from full rows, at `speed`.
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
    trainable: int
    checkpoint_bytes: int
    gpu_bytes: dict[str, int]
    host_bytes: dict[str, int]
    disk_bytes: int
    disk_parts: dict[str, int]
    disk_unknown: list[str]
    disk_free_bytes: int
    fits: bool | None
    cards: dict[str, MemoryVerdict]
    speed: Speed
    hours: dict[str, float | None]
    from_data: bool

    def as_json(self) -> str:
        """Return the plan for programs."""
        facts = asdict(self)
        for name, verdict in self.cards.items():
            facts["cards"][name]["fits"] = verdict.fits
        return json.dumps(facts, indent=1, sort_keys=True)


def plan_run(workspace: Workspace, profile: Profile, *, ranks: int, asked: PlanRequest | None = None) -> RunPlan:
    """Return the plan of a run: from the data where it is prepared, else from `expected_rows` of the sources.

    Raises:
        ConfigError: Ranks do not divide the batch, or the DeepSpeed JSON or a stated figure cannot be read.
    """
    asked = asked or PlanRequest()
    named = read_texts(workspace.root, [profile.deepspeed_config], key="deepspeed_config")
    load = Load.of(profile, read_zero(named[profile.deepspeed_config], profile.deepspeed_config), ranks=ranks)
    counted = count_epoch_data(workspace, profile)
    disk, unknown = _plan_disk(workspace, profile, load)
    gpus = detect_gpus() if asked.gpu_memory_gib is None or asked.card is None else []
    memory = asked.gpu_memory_gib
    if memory is None and gpus:
        memory = min(gpu.memory_bytes for gpu in gpus) / GIB
    cards = {
        f"{size:.4g}": judge(load, profile.global_batch_size, int(size * GIB))
        for size in (COMMON_GIB if memory is None else (memory,))
    }
    speed = plan_speed(asked.card or (name_card(gpus[0].name) if gpus else None), asked.mfu, dtype=profile.dtype)
    reading = {"expected": counted.tokens, "at_most": counted.most_tokens}
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
        optimizer_steps=counted.steps(profile),
        other_ranks=_plan_elsewhere(profile, counted.rows, ranks),
        parameters=load.sizes.parameters,
        trainable=load.trainable,
        checkpoint_bytes=checkpoint_bytes(load),
        gpu_bytes=plan_gpu(load),
        host_bytes=plan_host(load),
        disk_bytes=sum(disk.values()),
        disk_parts=disk,
        disk_unknown=unknown,
        disk_free_bytes=shutil.disk_usage(workspace.root).free,
        fits=None if memory is None else next(iter(cards.values())).fits,
        cards=cards,
        speed=speed,
        hours={name: plan_hours(load, speed, count) for name, count in reading.items()},
        from_data=counted.from_data,
    )


def _plan_disk(workspace: Workspace, profile: Profile, load: Load) -> tuple[dict[str, int], list[str]]:
    folders = {"raw": workspace.raw, "base": workspace.base, "tokens": workspace.tokens, "data": workspace.data}
    found = {name: count_bytes(folder) for name, folder in folders.items() if (folder / NAME).is_file()}
    local = workspace.registry_url.startswith("file:")
    unknown = [name for name in ("raw", "tokens", "data") if name not in found]
    return plan_disk(profile, load, found=found, local_registry=local), unknown


def check_memory(profile: Profile, zero: Zero, *, ranks: int) -> None:
    """Refuse to start ranks on cards that cannot hold the run's states, whatever its rows are; on a CPU nothing.

    Activations and every assumption are left out of that figure, so that only what is certain is refused. A plan whose
    total is above the card is said in one line.

    Raises:
        ConfigError: Weights, gradients, optimizer and buckets alone are more than the smallest card has.
    """
    gpus = detect_gpus()
    if not gpus or os.environ.get(UNCHECKED) == "off":
        return
    load = Load.of(profile, zero, ranks=ranks)
    memory, certain = min(gpu.memory_bytes for gpu in gpus), certain_bytes(load)
    verdict = judge(load, profile.global_batch_size, memory)
    if verdict.fits:
        return
    what = "; ".join(f"{words} ({gib(total)})" for words, total in verdict.remedies) or "a larger card"
    if certain > memory:
        raise ConfigError(
            f"a GPU has {gib(memory)}, but on {ranks} ranks weights, gradients, optimizer and buckets alone take "
            f"{gib(certain)}. What would fit: {what}. `ropeway plan` shows the parts; {UNCHECKED}=off starts it anyway"
        )
    print(f"the plan asks for {gib(verdict.needed_bytes)} of a GPU's {gib(memory)}; what would fit: {what}", flush=True)


@dataclass(frozen=True, slots=True)
class EpochCounts:
    """What an epoch reads, and the tokens of all epochs."""

    rows_per_source: dict[str, int | None]
    tokens_per_source: dict[str, int | None]
    rows: int | None
    tokens: int | None
    most_tokens: int | None
    from_data: bool

    def steps(self, profile: Profile) -> int | None:
        """Return the optimizer steps of the whole run."""
        return None if self.rows is None else self.rows // profile.global_batch_size * profile.num_train_epochs


def count_epoch_data(workspace: Workspace, profile: Profile) -> EpochCounts:
    """Return what a run reads."""
    shards = open_shards(workspace.data, verify=False) if (workspace.data / NAME).is_file() else None
    sizes = {source.name: len(source.train) for source in shards.sources} if shards else _expected_sizes(profile)
    rows = {
        name: None if (size := sizes[name]) is None else epoch_count(size, options, name=name)
        for name, options in profile.mixture
    }
    tokens: dict[str, int | None] = dict.fromkeys(rows)
    if shards:
        tokens = {part.name: _tokens(part, rows[part.name] or 0, profile) for part in shards.sources}
    total = _sum(rows)
    if profile.layout == "packed":  # how many rows the sequences fill is known once they are counted
        total = plan_epoch(shards, profile, epoch=0).rows if shards else None
    epochs, read = profile.num_train_epochs, _sum(tokens)
    return EpochCounts(
        rows_per_source=rows,
        tokens_per_source=tokens,
        rows=total,
        tokens=None if read is None else read * epochs,
        most_tokens=None if total is None else total * profile.max_length * epochs,
        from_data=shards is not None,
    )


def _sum(counts: Mapping[str, int | None]) -> int | None:
    known = [count for count in counts.values() if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _expected_sizes(profile: Profile) -> dict[str, int | None]:
    """Return the training parts that the sources' `expected_rows` leave after the split."""
    split = profile.val_split
    return {
        name: None if source.expected_rows is None else source.expected_rows - math.ceil(split * source.expected_rows)
        for name, source in profile.sources.items()
    }


def _tokens(source: SourceShards, rows: int, profile: Profile) -> int:
    """Return the tokens an epoch reads of a source; packed documents are read whole, all else up to `max_length`."""
    lengths = source.lengths[source.train].astype(np.int64)
    if not (profile.layout == "packed" and source.is_document):
        lengths = np.minimum(lengths, profile.max_length)
    return round(float(lengths.mean()) * rows) if len(lengths) else 0


def _plan_elsewhere(profile: Profile, rows: int | None, ranks: int) -> dict[int, dict[str, int | str]]:
    """Return what other rank counts would do."""
    return {} if rows is None else {count: _elsewhere(profile, rows, count) for count in OTHER_RANKS if count != ranks}


def _elsewhere(profile: Profile, rows: int, ranks: int) -> dict[str, int | str]:
    """Return what another rank count does here (equal steps), and did in the original (accumulation fixed)."""
    rows_per_pass = profile.per_device_train_batch_size * ranks
    original = rows // (rows_per_pass * profile.gradient_accumulation_steps) * profile.num_train_epochs
    if profile.global_batch_size % rows_per_pass:
        return {"refused": f"{profile.global_batch_size} rows do not divide by {rows_per_pass}", "original": original}
    return {
        "accumulation_steps": profile.global_batch_size // rows_per_pass,
        "optimizer_steps": rows // profile.global_batch_size * profile.num_train_epochs,
        "original": original,
    }
