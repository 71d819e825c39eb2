"""One rank of a training run, as DeepSpeed's launcher starts it: `-m ropeway.train.rank ROOT PROFILE FINGERPRINT`."""

import json
import os
import platform
import signal
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator

from ropeway.accumulation import accumulation_steps
from ropeway.errors import ConfigError, RopewayError, TemporaryError
from ropeway.params import READS, UNHASHED, load_profile
from ropeway.shards import open_shards
from ropeway.train import checkpoints
from ropeway.train.attention import Attention, choose_attention
from ropeway.train.config import load_deepspeed_json, plan_deepspeed
from ropeway.train.export import export_model
from ropeway.train.launch import adopt_slurm
from ropeway.train.loop import Line, Run, check_isolation, train
from ropeway.train.loss import SupervisedLoss
from ropeway.train.model import check_rope, count_weights, learning, open_model
from ropeway.workspace import Workspace


@dataclass
class Attempt:
    """One start of a run: how it went, for the provenance; never part of what determines the model."""

    path: Path
    facts: dict[str, Any]
    began: float = field(default_factory=time.time)
    tokens: int = 0
    step_seconds: float = 0.0
    save_seconds: float = 0.0

    def write(self, *, ended: str) -> None:
        """Append this attempt's record to the run's list."""
        record = {
            **self.facts,
            "began": self.began,
            "seconds": time.time() - self.began,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / self.step_seconds if self.step_seconds else None,
            "checkpoint_seconds": self.save_seconds,
            "ended": ended,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class Stop:
    """Set by SIGTERM or SIGINT; ranks agree on it at the end of a step."""

    def __init__(self) -> None:
        """Take the two signals over; the supervisor sends them to every rank."""
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def __call__(self) -> bool:
        """Return whether this rank was asked to stop."""
        return self.asked


def main(root: Path, name: str, fingerprint: str) -> None:
    """Train, checkpoint, export. Exit code 75 means "start me again, I resume"."""
    adopt_slurm(os.environ)
    stop = Stop()
    workspace = Workspace(root, name)
    profile = load_profile(root / "params.yaml", name)[1].reading((*READS["train"], *UNHASHED))
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    deepspeed.utils.logger.setLevel("ERROR")  # 0.19.8 warns of its own scheduler's first call
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # deepspeed 0.19.8 on torch 2.13
    cuda = get_accelerator().device_name() == "cuda"
    if profile.dtype == "fp16" and not get_accelerator().is_fp16_supported():
        raise ConfigError("dtype: fp16 does not train on a CPU; use bf16 or fp32, or run this profile on GPUs")
    attention = choose_attention(profile, cuda=cuda)
    deepspeed.init_distributed(get_accelerator().communication_backend_name(), verbose=False)
    run = _open_run(workspace, profile, attention, cuda=cuda)
    folder = workspace.checkpoints / fingerprint
    log = _resume(run, folder)
    attempt = _attempt(run, folder, attention, resumed_from=len(log))

    def save(lines: list[Line]) -> None:
        began = time.perf_counter()
        _save(run, folder, lines)
        attempt.save_seconds += time.perf_counter() - began

    def show(line: Line) -> None:
        attempt.tokens += line["tokens"]
        attempt.step_seconds += line["seconds"]
        if run.rank == 0:
            _show(line, workspace.work / "progress.jsonl")

    finished = train(run, log, save=save, stop=stop, show=show)
    if run.rank == 0:
        attempt.write(ended="finished" if finished else "stopped")
    if not finished:
        raise TemporaryError(
            f"stopped after step {len(log)}, which is saved in {folder}; the same command resumes there"
        )
    export_model(run, workspace, fingerprint=fingerprint, log=log)
    torch.distributed.barrier()


def _open_run(workspace: Workspace, profile: Any, attention: Attention, *, cuda: bool) -> Run:  # noqa: ANN401
    ranks = torch.distributed.get_world_size()
    accumulation = accumulation_steps(profile, ranks)
    torch.manual_seed(profile.rng_seed)
    run = Run(
        profile, open_shards(workspace.data, verify=False), None, torch.distributed.get_rank(), ranks, accumulation
    )
    if not run.total_steps:
        raise ConfigError(
            f"{run.plan(0).rows} rows an epoch are fewer than global_batch_size {profile.global_batch_size}: no step "
            "would be made; lower global_batch_size or add data"
        )
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    model = SupervisedLoss(open_model(workspace.base, profile, attention))
    named = load_deepspeed_json(workspace.root / profile.deepspeed_config)
    config = plan_deepspeed(profile, named, ranks=ranks, accumulation_steps=accumulation, total_steps=run.total_steps)
    run.engine, *_ = deepspeed.initialize(model=model, model_parameters=learning(model), config=config)
    check_rope(run.engine.module.model, profile)
    _check_same_plan(run)
    apart = check_isolation(run)
    if apart is not None and run.rank == 0:
        print(f"packed rows keep sequences apart: losses equal those alone to {apart:.1e} nats", flush=True)
    return run


def _check_same_plan(run: Run) -> None:
    """Compare the first epoch's plan across ranks before step 1: a rank with other rows would train another mixture."""
    digests: list[str | None] = [None] * run.world_size
    torch.distributed.all_gather_object(digests, run.plan(0).digest)
    if len(set(digests)) != 1:
        raise ConfigError(f"ranks disagree about the rows of epoch 0: {digests}; they read other data or other params")


def _resume(run: Run, folder: Path) -> list[Line]:
    """Load the newest valid checkpoint; all ranks take the one that rank 0 finds."""
    if run.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.clear_partial(folder)
    found = [checkpoints.newest_valid(folder) if run.rank == 0 else None]
    torch.distributed.broadcast_object_list(found)
    checkpoint = found[0]
    if checkpoint is None:
        return []
    if checkpoint.facts["ranks"] != run.world_size:
        raise ConfigError(
            f"{checkpoint.folder} was written by {checkpoint.facts['ranks']} ranks, this start has {run.world_size}; "
            f"set ROPEWAY_RANKS={checkpoint.facts['ranks']}, or remove {folder} to train from the beginning"
        )
    path, _ = run.engine.load_checkpoint(str(checkpoint.folder), tag=checkpoints.STATE)
    if path is None:
        raise ConfigError(
            f"{checkpoint.folder}: DeepSpeed found no state in it; remove the folder to resume from an older one"
        )
    if run.rank == 0:
        print(f"resuming after step {checkpoint.step} of {run.total_steps} ({checkpoint.folder})", flush=True)
    return checkpoint.log()


def _save(run: Run, folder: Path, log: list[Line]) -> None:
    partial = checkpoints.partial_folder(folder, len(log))
    if run.rank == 0:
        checkpoints.clear_partial(folder)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    run.engine.save_checkpoint(str(partial), tag=checkpoints.STATE, save_latest=False)
    torch.distributed.barrier()
    if run.rank == 0:
        facts = {"ranks": run.world_size, "torch": torch.__version__, "deepspeed": deepspeed.__version__}
        checkpoints.commit(folder, len(log), log, facts)
        checkpoints.rotate(folder, keep=run.profile.save_total_limit)
    torch.distributed.barrier()


def _attempt(run: Run, folder: Path, attention: Attention, *, resumed_from: int) -> Attempt:
    facts = {
        "resumed_from_step": resumed_from,
        "ranks": run.world_size,
        "threads_per_rank": torch.get_num_threads(),
        "attention": attention.effective,
        "asked_flash_attention": attention.asked_flash,
        "host": platform.node(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else (platform.processor() or platform.machine()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deepspeed": deepspeed.__version__,
    }
    if run.rank == 0:
        parameters = count_weights(run.engine.module)
        print(
            f"{parameters:,} weights, {run.total_steps} steps of {run.profile.global_batch_size} rows, "
            f"{run.world_size} ranks x {run.accumulation_steps} micro-batches of "
            f"{run.profile.per_device_train_batch_size}, {run.profile.dtype}, attention: {attention.effective}",
            flush=True,
        )
    return Attempt(folder / "attempts.jsonl", facts)


def _show(line: Line, progress: Path) -> None:
    """Print one line per step, and leave it where the flow reads it."""
    rest = (line["total_steps"] - line["step"]) * line["seconds"]
    validation = "".join(
        f"  validation {key.removeprefix('validation_')} {value:.3f}"
        for key, value in line.items()
        if key.startswith("validation_") and value is not None
    )
    print(
        f"step {line['step']}/{line['total_steps']}  loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  "
        f"norm {line['grad_norm']:.2f}{'' if line['applied'] else '  SKIPPED'}  "
        f"{line['tokens'] / line['seconds']:,.0f} tokens/s  {rest:.0f} s left{validation}",
        flush=True,
    )
    with progress.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    except RopewayError as error:
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, TemporaryError):
            print(f"{error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)  # other ranks may be inside a collective; the launcher ends them
