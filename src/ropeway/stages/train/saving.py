"""Saving the engine's state over all ranks, and resuming from the newest checkpoint."""

from dataclasses import asdict
from pathlib import Path

import deepspeed
import torch

from ropeway.runtime.errors import ConfigError
from ropeway.stages.train import checkpoints
from ropeway.stages.train.disk import explain_failed_save
from ropeway.stages.train.stop import Line
from ropeway.stages.train.training_run import Run, learning_rate


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide rounding and the content of a checkpoint."""
    return {"torch": torch.__version__, "deepspeed": deepspeed.__version__}


def save(run: Run, folder: Path, log: list[Line]) -> Path:
    """Save a checkpoint after the last step of `log`; return its folder once it is complete.

    Raises:
        TemporaryError: The disk is full; earlier checkpoints are intact.
        ConfigError: The folder cannot be written.
    """
    try:
        return _save(run, folder, log)
    except (OSError, RuntimeError) as error:
        explained = explain_failed_save(error, folder, len(log))
        if explained is None:
            raise
        raise explained from error


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


def find_checkpoint(folder: Path, *, rank: int) -> checkpoints.Checkpoint | None:
    """Return the newest valid checkpoint of a run, found by rank 0 and broadcast."""
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.clear_partial(folder)
        if (step_0 := checkpoints.step_folder(folder, 0)).exists():
            checkpoints.remove(step_0)  # left by an attempt that was interrupted in its warm-up step
    found = [checkpoints.newest_valid(folder) if rank == 0 else None]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def needs_universal(checkpoint: checkpoints.Checkpoint | None, *, ranks: int) -> bool:
    """Return whether a checkpoint was written by another number of ranks, so that its universal form is loaded."""
    return checkpoint is not None and checkpoint.facts["ranks"] != ranks


def resume(run: Run, checkpoint: checkpoints.Checkpoint | None) -> list[Line]:
    """Load a checkpoint into the engine and return its log.

    Raises:
        ConfigError: It was written by other library versions, or DeepSpeed cannot find its state.
    """
    if checkpoint is None:
        return []
    checkpoints.check_resumable(checkpoint, ranks=run.world_size, now=versions())
    universal = needs_universal(checkpoint, ranks=run.world_size)
    folder = checkpoints.universal_folder(checkpoint) if universal else checkpoint.folder
    path, _ = run.engine.load_checkpoint(str(folder), tag=checkpoints.STATE)
    if path is None:
        raise ConfigError(f"{folder}: DeepSpeed found no state; remove the folder to resume from an older checkpoint")
    log = checkpoint.log()
    _apply_params(run, log)
    if run.rank == 0:
        print(f"resuming after step {checkpoint.step} of {run.total_steps} ({checkpoint.folder})", flush=True)
    return log


def _apply_params(run: Run, log: list[Line]) -> None:
    """Set the optimizer's hyperparameters from params again: DeepSpeed restores those of the checkpoint.

    They differ only in a run that continues from another one. Source: deepspeed 0.19.8, `load_state_dict`.
    """
    profile, optimizer = run.profile, run.engine.optimizer
    rate = learning_rate(profile, log[-1]["applied_steps"], total_steps=run.total_steps)
    for group in optimizer.param_groups:
        group["betas"] = (profile.adam_beta1, profile.adam_beta2)
        group |= {"eps": profile.adam_epsilon, "weight_decay": profile.weight_decay, "lr": rate}
    if hasattr(
        optimizer, "clip_grad"
    ):  # optimizers of ZeRO and 16 bit; otherwise the engine clips, by its configuration
        optimizer.clip_grad = profile.max_grad_norm
