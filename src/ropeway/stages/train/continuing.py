"""What determines a training run, and continuing from another one (`resume_from`).

The other's checkpoint becomes this run's first one, and the lineage says so.

.checkpoints/<fingerprint>/step-000200/     hard links to the other run's, whose every byte was verified
.checkpoints/<fingerprint>/continued.json   which run and step, and what was changed since; written before it

What decides which rows a step reads, and what a checkpoint holds, must be as it was: then the steps so far are a part
of this run, no row is read twice and none is left out. What may change is how steps are made from there on.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import TrainParams
from ropeway.config.stages import READS
from ropeway.data.shards import REMEDY
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.manifest import digest_of, load_manifest, write_json
from ropeway.runtime.workspace import Workspace
from ropeway.stages.train import checkpoints

RECORD = "continued.json"
# More epochs go on where the others ended; the rest says how a step is made, not of which rows.
MAY_CHANGE = frozenset((
    "adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "gradient_checkpointing",
    "learning_rate", "loss_normalisation", "lr_schedule", "max_grad_norm", "num_train_epochs",
    "per_device_eval_batch_size", "per_device_train_batch_size", "resume_from", "use_flash_attention", "warmup_steps",
    "weight_decay",
))  # fmt: skip
_MUST_EQUAL = ("base", "data", "deepspeed")
_REMEDY = "set resume_from to null to train from the beginning"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The hash and its parts; ranks, cadence and tracking are not among them."""

    digest: str  # 16 hex digits, the name of the run's checkpoint folder
    parts: dict[str, str]  # digests of params, data, base, DeepSpeed JSON and code
    params: dict[str, object]  # the parameters themselves


def take_fingerprint(workspace: Workspace, profile: TrainParams, frozen: FrozenInputs) -> Fingerprint:
    """Return the fingerprint of the run that this workspace would train now.

    Raises:
        DataError: Base or data are unfinished or changed after they were written.
    """
    base = load_manifest(workspace.base, remedy="Run `dvc checkout`, or `dvc repro base`")
    data = load_manifest(workspace.data, remedy=REMEDY)
    dumped = profile.model_dump(mode="json", include=set(READS["train"]))
    parts = {
        "params": digest_of(dumped),
        "base": digest_of(base),
        "data": digest_of(data),
        "deepspeed": frozen.digest("deepspeed"),
        "code": frozen.digest("code-train"),
    }
    return Fingerprint(digest_of(parts)[:16], parts, dumped)


class Begun(TypedDict):
    """What a run was begun with, as its folder says."""

    parts: dict[str, str]
    params: dict[str, object]


def go_on(workspace: Workspace, profile: TrainParams, fingerprint: Fingerprint) -> None:
    """Take over the checkpoint that `resume_from` names, unless this run has one of its own already.

    Raises:
        ConfigError: There is no such run or step, or it differs in more than may change.
        DataError: The checkpoint is not whole.
    """
    folder = workspace.checkpoints / fingerprint.digest
    if profile.resume_from is None or any(step for step, _ in checkpoints.list_steps(folder)):
        return
    name, _, step = profile.resume_from.partition("@")
    source = workspace.checkpoints / name
    begun = _read_begun(source)
    if faults := find_differences(begun, fingerprint):
        raise ConfigError(
            "\n".join(
                [f"resume_from: run {name} cannot go on as this one, {_REMEDY}:", *(f"  {one}" for one in faults)]
            )
        )
    checkpoint = _choose(source, int(step) if step else None)
    changed = {key: f"{old} -> {new}" for key, (old, new) in _changed(begun["params"], fingerprint).items()}
    changed.pop("resume_from", None)
    old, new = (parts["code"][:8] for parts in (begun["parts"], fingerprint.parts))
    changed |= {"training code": f"{old} -> {new}"} if old != new else {}
    record = {
        "fingerprint": name,
        "step": checkpoint.step,
        "checkpoint": digest_of(checkpoint.facts),
        "changed": changed,
        "earlier": read_record(source),
    }
    write_json(folder / RECORD, record)
    checkpoints.take_over(checkpoint, folder)
    words = ", ".join(f"{key} {values}" for key, values in changed.items())
    print(f"going on from step {checkpoint.step} of run {name}: {words or 'nothing changed'}", flush=True)


def read_record(folder: Path) -> dict[str, object]:
    """Return from which run a run went on; nothing where it began at its base."""
    path = folder / RECORD
    record: dict[str, object] = json.loads(path.read_bytes()) if path.is_file() else {}
    return record


def find_differences(begun: Begun, fingerprint: Fingerprint) -> list[str]:
    """Return in words what keeps a run from going on as another: its inputs, or params that decide rows or shapes."""
    faults = [
        f"{part}: sha256 {begun['parts'][part][:12]}… there, {fingerprint.parts[part][:12]}… here"
        for part in _MUST_EQUAL
        if begun["parts"][part] != fingerprint.parts[part]
    ]
    changed = _changed(begun["params"], fingerprint)
    return faults + [f"{key}: {old} there, {new} here" for key, (old, new) in changed.items() if key not in MAY_CHANGE]


def _changed(before: Mapping[str, object], fingerprint: Fingerprint) -> dict[str, tuple[object, object]]:
    """Return key -> (there, here) of the params that differ."""
    keys = sorted({*before, *fingerprint.params})
    pairs = {key: (before.get(key), fingerprint.params.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _read_begun(source: Path) -> Begun:
    try:
        begun: Begun = json.loads((source / checkpoints.OWNER).read_bytes())
    except FileNotFoundError:
        others = sorted(path.parent.name for path in source.parent.glob(f"*/{checkpoints.OWNER}"))
        raise ConfigError(
            f"resume_from: {source} does not exist; runs here: {', '.join(others) or 'none'}. Copy that folder from "
            f"where it was trained, or {_REMEDY}"
        ) from None
    except ValueError as error:
        raise DataError(f"{source / checkpoints.OWNER}: not JSON ({error}); {_REMEDY}") from None
    if "params" not in begun:
        raise ConfigError(f"{source / checkpoints.OWNER}: does not say with which params it was begun; {_REMEDY}")
    return begun


def _choose(source: Path, step: int | None) -> checkpoints.Checkpoint:
    """Return the checkpoint of a step, the newest valid one by default."""
    if step is None:
        newest = checkpoints.newest_valid(source)
        if newest is None or not newest.step:
            raise ConfigError(f"resume_from: {source} holds no checkpoint that is whole; {_REMEDY}")
        return newest
    steps = [one for one, _ in checkpoints.list_steps(source) if one]
    if step not in steps:
        found = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"resume_from: {source} has no checkpoint of step {step}; there are: {found}")
    folder = checkpoints.step_folder(source, step)
    facts = load_manifest(folder, remedy=f"Name another step; there are: {', '.join(map(str, steps))}")
    return checkpoints.Checkpoint(folder, step, facts)


def check_taken_over(folder: Path, checkpoint: checkpoints.Checkpoint | None, *, total_steps: int) -> None:
    """Raise where a run that went on from another would silently begin anew, or make no step at all.

    Raises:
        DataError: Its checkpoints are damaged.
        ConfigError: What it took over is its last step.
    """
    record = read_record(folder)
    if record and checkpoint is None:
        raise DataError(
            f"{folder}: it went on from run {record['fingerprint']}, and none of its checkpoints is whole. Remove the "
            "folder; the same command then takes that run's checkpoint over again"
        )
    if checkpoint and checkpoint.facts.get(checkpoints.TAKEN_OVER) and checkpoint.step >= total_steps:
        raise ConfigError(
            f"resume_from: step {checkpoint.step} of run {record['fingerprint']} is the last of {total_steps}, so no "
            "step would be made. Raise num_train_epochs, or name an earlier step (FINGERPRINT@STEP)"
        )
