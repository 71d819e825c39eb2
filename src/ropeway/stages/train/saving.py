"""Checkpoints of a live engine: saving one over all ranks, resuming from the newest."""

from dataclasses import asdict
from pathlib import Path

import deepspeed
import torch

from ropeway.runtime.errors import ConfigError
from ropeway.stages.train import checkpoints
from ropeway.stages.train.disk import explain_failed_save
from ropeway.stages.train.running import Run, learning_rate
from ropeway.stages.train.stop import Line


def versions() -> dict[str, str]:
    """Return the libraries whose version decides how a step rounds and what a checkpoint holds."""
    return {"torch": torch.__version__, "deepspeed": deepspeed.__version__}


def save(run: Run, folder: Path, log: list[Line]) -> Path:
    """Save the state after the last line of `log`; return its folder once it is whole.

    Raises:
        TemporaryError: The disk is full; what was saved before is untouched.
        ConfigError: The folder cannot be written.
    """
    try:
        return _save(run, folder, log)
    except (OSError, RuntimeError) as error:
        told = explain_failed_save(error, folder, len(log))
        if told is None:
            raise
        raise told from error


def _save(run: Run, folder: Path, log: list[Line]) -> Path:
    partial = checkpoints.partial_folder(folder, len(log))
    if run.rank == 0:
        checkpoints.clear_partial(folder)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    run.engine.save_checkpoint(str(partial), tag=checkpoints.STATE, save_latest=False)
    torch.distributed.barrier()
    if run.rank == 0:
        facts = {"ranks": run.world_size, "rewinds": [asdict(rewind) for rewind in run.rewinds], **versions()}
        checkpoints.commit(folder, len(log), log, facts)
        checkpoints.rotate(folder, keep=run.profile.save_total_limit, saved=len(log))
    torch.distributed.barrier()
    return checkpoints.step_folder(folder, len(log))


def find(folder: Path, *, rank: int) -> checkpoints.Checkpoint | None:
    """Return the newest valid checkpoint of a run; all ranks get the one that rank 0 finds."""
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.clear_partial(folder)
        if (probe := checkpoints.step_folder(folder, 0)).exists():
            checkpoints.remove(probe)  # of an attempt that ended while it tried its first step
    found = [checkpoints.newest_valid(folder) if rank == 0 else None]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def is_universal(checkpoint: checkpoints.Checkpoint | None, *, ranks: int) -> bool:
    """Return whether the state comes from other ranks, hence from the converted folder."""
    return checkpoint is not None and checkpoint.facts["ranks"] != ranks


def resume(run: Run, checkpoint: checkpoints.Checkpoint | None) -> list[Line]:
    """Load a checkpoint and return its log.

    Raises:
        ConfigError: It was written by other library versions, or DeepSpeed finds nothing in it.
    """
    if checkpoint is None:
        return []
    checkpoints.check_resumable(checkpoint, ranks=run.world_size, now=versions())
    universal = is_universal(checkpoint, ranks=run.world_size)
    folder = checkpoints.universal_folder(checkpoint) if universal else checkpoint.folder
    path, _ = run.engine.load_checkpoint(str(folder), tag=checkpoints.STATE)
    if path is None:
        raise ConfigError(f"{folder}: DeepSpeed found no state in it; remove the folder to resume from an older one")
    log = checkpoint.log()
    _impose(run, log)
    if run.rank == 0:
        print(f"resuming after step {checkpoint.step} of {run.total_steps} ({checkpoint.folder})", flush=True)
    return log


def _impose(run: Run, log: list[Line]) -> None:
    """Let params speak again: DeepSpeed restores the optimizer's numbers from the checkpoint, over what params say now.

    In a run that goes on as itself they are the same. (What it restores: 0.19.8, `load_state_dict` of its optimizers.)
    """
    profile, optimizer = run.profile, run.engine.optimizer
    rate = learning_rate(profile, log[-1]["applied_steps"], total_steps=run.total_steps)
    for group in optimizer.param_groups:
        group["betas"] = (profile.adam_beta1, profile.adam_beta2)
        group |= {"eps": profile.adam_epsilon, "weight_decay": profile.weight_decay, "lr": rate}
    if hasattr(optimizer, "clip_grad"):  # ZeRO's and the half precisions'; else the engine clips, by its configuration
        optimizer.clip_grad = profile.max_grad_norm
