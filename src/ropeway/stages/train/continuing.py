"""The fingerprint of a training run, and continuing from another run (`resume_from`).

The other run's checkpoint becomes the first one of this run, and the lineage records it.

.checkpoints/<fingerprint>/step-000200/     hard links to the other run's verified files
.checkpoints/<fingerprint>/continued.json   run, step and changed params; written before the checkpoint

Whatever decides which rows a step reads, or the content of a checkpoint, must be equal. Then the earlier steps are part
of this run: no row is read twice or missed. Only how later steps are computed may change.
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
# More epochs continue where the others ended; the others change how a step is computed, not which rows it reads.
MAY_CHANGE = frozenset((
    "adam_beta1", "adam_beta2", "adam_epsilon", "deterministic", "fused_kernels", "gradient_accumulation_steps",
    "gradient_checkpointing", "learning_rate", "loss_normalisation", "lr_schedule", "max_grad_norm", "num_train_epochs",
    "per_device_eval_batch_size", "per_device_train_batch_size", "resume_from", "sequence_parallel",
    "use_flash_attention", "warmup_steps", "weight_decay",
))  # fmt: skip
_MUST_EQUAL = ("base", "data", "deepspeed")
_REMEDY = "set resume_from to null to train from the beginning"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The identity of a run; number of ranks, eval_steps, save_steps and tracking are not part of it."""

    digest: str  # 16 hex digits, the name of the run's checkpoint folder
    parts: dict[str, str]  # digests of params, data, base, DeepSpeed JSON and code
    params: dict[str, object]  # the parameters themselves


def compute_fingerprint(workspace: Workspace, profile: TrainParams, frozen: FrozenInputs) -> Fingerprint:
    """Return the fingerprint of the run that this workspace trains now.

    Raises:
        DataError: Base or data are incomplete, or changed after they were written.
    """
    base = load_manifest(workspace.base, remedy="Run `dvc repro base`")
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


class RunInfo(TypedDict):
    """run.json: digests and params with which a run was started."""

    parts: dict[str, str]
    params: dict[str, object]


def continue_run(workspace: Workspace, profile: TrainParams, fingerprint: Fingerprint) -> None:
    """Link the checkpoint that `resume_from` names into this run, unless the run already has one of its own.

    Raises:
        ConfigError: The run or step does not exist, or differs in params that must be equal.
        DataError: The checkpoint is damaged.
    """
    folder = workspace.checkpoints / fingerprint.digest
    if profile.resume_from is None or any(step for step, _ in checkpoints.list_steps(folder)):
        return
    name, _, step = profile.resume_from.partition("@")
    source = workspace.checkpoints / name
    info = _read_run_info(source)
    if faults := find_differences(info, fingerprint):
        raise ConfigError(
            "\n".join(
                [f"resume_from: this run cannot continue from run {name}, {_REMEDY}:", *(f"  {one}" for one in faults)]
            )
        )
    checkpoint = _choose_checkpoint(source, int(step) if step else None)
    changed = {key: f"{old} -> {new}" for key, (old, new) in _changed_params(info["params"], fingerprint).items()}
    changed.pop("resume_from", None)
    old, new = (parts["code"][:8] for parts in (info["parts"], fingerprint.parts))
    changed |= {"training code": f"{old} -> {new}"} if old != new else {}
    record = {
        "fingerprint": name,
        "step": checkpoint.step,
        "checkpoint": digest_of(checkpoint.facts),
        "changed": changed,
        "earlier": read_continued_from(source),
    }
    write_json(folder / RECORD, record)
    checkpoints.link_checkpoint(checkpoint, folder)
    summary = ", ".join(f"{key} {values}" for key, values in changed.items())
    print(f"continuing from step {checkpoint.step} of run {name}: {summary or 'nothing changed'}", flush=True)


def read_continued_from(folder: Path) -> dict[str, object]:
    """Return which run and step a run continues from; empty where it started from the base model."""
    path = folder / RECORD
    record: dict[str, object] = json.loads(path.read_bytes()) if path.is_file() else {}
    return record


def find_differences(info: RunInfo, fingerprint: Fingerprint) -> list[str]:
    """Return the differences that forbid continuing: other inputs, or params that decide rows or shapes."""
    faults = [
        f"{part}: sha256 {info['parts'][part][:12]}… in that run, {fingerprint.parts[part][:12]}… in this one"
        for part in _MUST_EQUAL
        if info["parts"][part] != fingerprint.parts[part]
    ]
    changed = _changed_params(info["params"], fingerprint)
    return faults + [
        f"{key}: {old} in that run, {new} in this one" for key, (old, new) in changed.items() if key not in MAY_CHANGE
    ]


def _changed_params(before: Mapping[str, object], fingerprint: Fingerprint) -> dict[str, tuple[object, object]]:
    """Return key -> (old, new) of the params that differ."""
    keys = sorted({*before, *fingerprint.params})
    pairs = {key: (before.get(key), fingerprint.params.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _read_run_info(source: Path) -> RunInfo:
    try:
        info: RunInfo = json.loads((source / checkpoints.RUN_INFO).read_bytes())
    except FileNotFoundError:
        others = sorted(path.parent.name for path in source.parent.glob(f"*/{checkpoints.RUN_INFO}"))
        raise ConfigError(
            f"resume_from: {source} does not exist; existing runs: {', '.join(others) or 'none'}. Copy the "
            f"folder from where the run was trained, or {_REMEDY}"
        ) from None
    except ValueError as error:
        raise DataError(f"{source / checkpoints.RUN_INFO}: not JSON ({error}); {_REMEDY}") from None
    if "params" not in info:
        raise ConfigError(f"{source / checkpoints.RUN_INFO}: has no params, so the runs cannot be compared; {_REMEDY}")
    return info


def _choose_checkpoint(source: Path, step: int | None) -> checkpoints.Checkpoint:
    """Return the checkpoint of a step, the newest valid one by default."""
    if step is None:
        newest = checkpoints.newest_valid(source)
        if newest is None or not newest.step:
            raise ConfigError(f"resume_from: {source} has no valid checkpoint; {_REMEDY}")
        return newest
    steps = [one for one, _ in checkpoints.list_steps(source) if one]
    if step not in steps:
        found = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"resume_from: {source} has no checkpoint of step {step}; existing steps: {found}")
    folder = checkpoints.step_folder(source, step)
    facts = load_manifest(folder, remedy=f"Choose another step; existing steps: {', '.join(map(str, steps))}")
    return checkpoints.Checkpoint(folder, step, facts)


def check_continued(folder: Path, checkpoint: checkpoints.Checkpoint | None, *, total_steps: int) -> None:
    """Check that a run that continues from another neither starts over silently nor has no step left.

    Raises:
        DataError: All its checkpoints are damaged.
        ConfigError: The step to continue from is the last step.
    """
    record = read_continued_from(folder)
    if record and checkpoint is None:
        raise DataError(
            f"{folder}: the run continues from run {record['fingerprint']}, and all its checkpoints are damaged. "
            "Remove the folder; the same command then continues from that run again"
        )
    if checkpoint and checkpoint.facts.get(checkpoints.CONTINUED) and checkpoint.step >= total_steps:
        raise ConfigError(
            f"resume_from: step {checkpoint.step} of run {record['fingerprint']} is the last of {total_steps} steps, "
            "so 0 steps are left. Raise num_train_epochs, or choose an earlier step (FINGERPRINT@STEP)"
        )
