"""Saving the engine's state over all ranks, and resuming from the newest checkpoint."""

import platform
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import deepspeed
import torch

from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.manifest import FileFacts, describe_files, digest_of
from ropeway.stages.train import checkpoints
from ropeway.stages.train.disk import explain_failed_save
from ropeway.stages.train.stop import Line
from ropeway.stages.train.training_run import Run, learning_rate

Result = TypeVar("Result")


class CheckpointViewError(DataError):
    """The ranks do not all see the checkpoint that was verified before they started; every rank raises it."""


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide rounding and the content of a checkpoint."""
    return {"torch": torch.__version__, "deepspeed": deepspeed.__version__}


@dataclass(frozen=True, slots=True)
class PendingSave:
    """A save whose files this rank may still be writing; the same on every rank, apart from `files`."""

    step: int
    facts: dict[str, object]  # for the manifest, as of this step
    files: "Future[dict[str, FileFacts]]"  # entries of the files that this rank wrote, once they are on disk


def save(run: Run, folder: Path, log: list[Line]) -> Path:
    """Save a checkpoint after the last step of `log`; return its folder once it is complete.

    Raises:
        TemporaryError: The disk is full; earlier checkpoints are intact.
        ConfigError: The folder cannot be written.
    """
    return finish_save(run, folder, begin_save(run, folder, log))


def begin_save(run: Run, folder: Path, log: list[Line]) -> PendingSave:
    """Start to save a checkpoint after the last step of `log`; all ranks call this at the same step.

    With `async_save` the states are copied to host memory, and a thread writes them. Otherwise this writes them.

    Raises:
        TemporaryError: The disk is full; earlier checkpoints are intact.
        ConfigError: The folder cannot be written.
    """
    step, writer = len(log), run.engine.checkpoint_engine
    partial = checkpoints.partial_folder(folder, step)
    with _explained(folder, step):
        if run.rank == 0:
            checkpoints.clear_partial(folder)
            partial.mkdir(parents=True)
            checkpoints.write_log(folder, step, log)
        torch.distributed.barrier()
        writer.is_copying = run.profile.async_save
        run.engine.save_checkpoint(str(partial), tag=checkpoints.STATE, save_latest=False)
        names = _assign_files(run, partial)

    def write() -> dict[str, FileFacts]:
        writer.write_copies()
        return describe_files(partial, names, sync=True)

    facts = {"ranks": run.world_size, "rewinds": [asdict(rewind) for rewind in run.rewinds], **versions()}
    return PendingSave(step, facts, _in_thread(write))


def _in_thread(work: Callable[[], Result]) -> "Future[Result]":
    """Return the future of `work` in a thread of its own, which does not keep a process that ends from ending."""
    future: Future[Result] = Future()

    def go() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=go, name="checkpoint", daemon=True).start()
    return future


def is_written(run: Run, pending: PendingSave) -> bool:
    """Return whether every rank has its files of this save on disk; a collective."""
    done = torch.tensor(float(pending.files.done()), device=run.device)
    torch.distributed.all_reduce(done, op=torch.distributed.ReduceOp.MIN)
    return bool(done)


def finish_save(run: Run, folder: Path, pending: PendingSave) -> Path:
    """Wait until every rank has written its files, publish the checkpoint and remove old ones; return its folder.

    Raises:
        TemporaryError: The disk is full; earlier checkpoints are intact.
        ConfigError: The folder cannot be written.
    """
    described: list[dict[str, FileFacts]] = [{}] * run.world_size
    with _explained(folder, pending.step):
        torch.distributed.all_gather_object(described, pending.files.result())
        if run.rank == 0:
            files = {name: facts for part in described for name, facts in part.items()}
            checkpoints.publish(folder, pending.step, pending.facts, files)
        torch.distributed.barrier()
        saved = checkpoints.step_folder(folder, pending.step)
        checkpoints.mark_verified(saved)
        if run.rank == 0:
            checkpoints.rotate(folder, keep=run.profile.save_total_limit, saved=pending.step)
        torch.distributed.barrier()
    return saved


@contextmanager
def _explained(folder: Path, step: int) -> Iterator[None]:
    """Raise TemporaryError or ConfigError where the disk makes a save fail."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        explained = explain_failed_save(error, folder, step)
        if explained is None:
            raise
        raise explained from error


class Saver:
    """Saves the checkpoints of a training, one at a time; with `async_save` the training goes on meanwhile.

    Every rank calls the same methods at the same steps.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        *,
        report: Callable[[int, float, float | None], None],
        deadline: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Prepare.

        Args:
            run: The run.
            folder: Its folder of checkpoints.
            report: Called on rank 0 with the step of each complete checkpoint, the seconds that training waited for it,
                and with `async_save` the seconds from its beginning to its end.
            deadline: Context manager that extends the watchdog's deadline while training waits.
        """
        self._run, self._folder, self._report, self._deadline = run, folder, report, deadline
        self._pending: PendingSave | None = None
        self._began = self._waited = 0.0

    def save(self, log: list[Line]) -> None:
        """Save a checkpoint, after the one in progress; raises what `begin_save` raises."""
        self.wait()
        self._began, self._waited = time.perf_counter(), 0.0
        with self._waiting():
            self._pending = begin_save(self._run, self._folder, log)
        if not self._run.profile.async_save:
            self.wait()

    def poll(self) -> None:
        """Complete the save in progress if every rank has written its files; raises what `finish_save` raises."""
        if self._pending is None:
            return
        if self._pending.files.done() and self._pending.files.exception():
            self.wait()  # raises it; the launcher ends the other ranks
        if is_written(self._run, self._pending):
            self.wait()

    def wait(self) -> None:
        """Complete the save in progress, if there is one; raises what `finish_save` raises."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with self._waiting():
            finish_save(self._run, self._folder, pending)
        if self._run.rank == 0:
            seconds = time.perf_counter() - self._began
            self._report(pending.step, self._waited, seconds if self._run.profile.async_save else None)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Count the time as time that training waits, with an extended deadline."""
        began = time.perf_counter()
        with self._deadline():
            yield
        self._waited += time.perf_counter() - began


def _assign_files(run: Run, partial: Path) -> list[str]:
    """Return the files of a partial folder that this rank hashes and flushes to disk."""
    mine = [path.relative_to(partial).as_posix() for path in run.engine.checkpoint_engine.written]
    written: list[list[str]] = [[]] * run.world_size
    torch.distributed.all_gather_object(written, mine)
    shares: list[list[list[str]]] = [checkpoints.assign_files(partial, written) if run.rank == 0 else []]
    torch.distributed.broadcast_object_list(shares)
    return shares[0][run.rank]


def find_checkpoint(folder: Path, *, rank: int, verified: int | None) -> checkpoints.Checkpoint | None:
    """Return the checkpoint to resume from; the same on every rank.

    Args:
        folder: The folder of the run.
        rank: This rank.
        verified: Step of the newest valid checkpoint, which the stage has verified before it started the ranks; 0:
            there is none. None: a rank that was started without the stage; rank 0 verifies while the others wait.

    Raises:
        CheckpointViewError: A rank does not see the verified checkpoint, or sees another one.
    """
    if verified is None:
        if rank == 0:
            checkpoints.clear_unfinished(folder)
        newest = [checkpoints.newest_valid(folder) if rank == 0 else None]
        torch.distributed.broadcast_object_list(newest)
        return newest[0]
    checkpoint, fault = None, ""
    try:
        checkpoint = checkpoints.open_verified(folder, verified) if verified else None
    except DataError as error:
        fault = f"rank {rank} on {platform.node()}: {error}"
    seen: list[tuple[str, str]] = [("", "")] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(seen, (fault, digest_of(checkpoint.facts) if checkpoint else ""))
    if fault := next((fault for fault, _ in seen if fault), ""):
        raise CheckpointViewError(fault)
    if len({digest for _, digest in seen}) > 1:
        raise CheckpointViewError(
            f"{checkpoints.step_folder(folder, verified)}: ranks see manifests with different content; give all hosts "
            "the same file system under this path"
        )
    return checkpoint


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
