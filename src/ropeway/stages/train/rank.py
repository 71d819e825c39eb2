"""One rank of a training run, as the launcher starts it: `-m ropeway.stages.train.rank ROOT PROFILE FINGERPRINT`."""

import os
import platform
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import TrainParams
from ropeway.config.stages import READS, UNHASHED
from ropeway.data.accumulation import accumulation_steps
from ropeway.data.shards import REMEDY, open_shards
from ropeway.models.attention import Attention, choose_attention
from ropeway.models.rope import scaling_from_json
from ropeway.planning.budget import CARDS, name_card
from ropeway.planning.memory import DTYPE_BYTES, stored_bytes
from ropeway.runtime.code_digests import CODE, check_code
from ropeway.runtime.devices import name_cpu
from ropeway.runtime.errors import ConfigError, RopewayError, TemporaryError, TrainingError
from ropeway.runtime.launcher import adopt_slurm
from ropeway.runtime.manifest import digest_of, load_manifest
from ropeway.runtime.op_build import init_distributed
from ropeway.runtime.progress import Progress
from ropeway.runtime.tracking import About, Tracker, describe_mirror, open_tracker
from ropeway.runtime.watchdog import Watchdog
from ropeway.runtime.workspace import Workspace
from ropeway.stages.train import checkpoints, rewind, saving
from ropeway.stages.train.continuing import check_taken_over
from ropeway.stages.train.deepspeed_config import parse_deepspeed_json, plan_deepspeed
from ropeway.stages.train.disk import check_disk
from ropeway.stages.train.export import export_model
from ropeway.stages.train.loop import FaultError, train
from ropeway.stages.train.loss import SupervisedLoss
from ropeway.stages.train.model import check_rope, count_weights, learning, open_model
from ropeway.stages.train.running import Run
from ropeway.stages.train.stop import Line
from ropeway.stages.train.warm_up import check_isolation, try_worst_step

UNTRIED = "ROPEWAY_UNTRIED"  # 1: no trial step before step 1


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
    workspace = Workspace(root, name)
    frozen = FrozenInputs.load(root)
    check_code(frozen.value("code-train"), workspace.work / CODE, "train")  # put back later, nothing else would show it
    profile = frozen.profile("train")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    deepspeed.utils.logger.setLevel("ERROR")  # 0.19.8 warns of its own scheduler's first call
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # deepspeed 0.19.8 on torch 2.13
    cuda = get_accelerator().device_name() == "cuda"
    if profile.dtype == "fp16" and not get_accelerator().is_fp16_supported():
        raise ConfigError("dtype: fp16 does not train on a CPU; use bf16 or fp32, or run this profile on GPUs")
    attention = choose_attention(profile, cuda=cuda)
    init_distributed()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    folder = workspace.checkpoints / fingerprint
    checkpoint = saving.find(folder, rank=torch.distributed.get_rank())
    universal = saving.is_universal(checkpoint, ranks=torch.distributed.get_world_size())
    run = open_run(workspace, profile, attention, universal=universal)
    watchdog = Watchdog(limit_seconds=profile.stop.hang_seconds)
    run.beat = watchdog.beat
    with watchdog.slowly(_state_bytes(run)):
        rewind.recall(run, folder, checkpoint)
        check_taken_over(folder, checkpoint, total_steps=run.total_steps)
        log = saving.resume(run, checkpoint)
        facts = {"resumed_from_step": len(log), **_try_out(run, folder, log), **_describe(run, attention)}
    stop = Stop()  # before this there is nothing to save: TERM ends the rank at once
    tracker = _track(run, workspace, fingerprint)
    progress = Progress(
        facts,
        workspace.progress("train"),
        folder / "attempts.jsonl",
        _peak(run),
        tracker.log if tracker else lambda _: None,
    )
    ended = "failed"
    try:
        finished = _train(run, log, folder, stop=stop, progress=progress, watchdog=watchdog)
        ended = "finished" if finished else "stopped"
    finally:
        watchdog.end()
        if tracker:
            mirrored = tracker.finish()
            progress.write(ended=ended, more={"wandb": mirrored})
            if mirrored["mode"] != "off" or mirrored["trouble"]:
                print(describe_mirror(mirrored), flush=True)
    if not finished:
        raise TrainingStoppedError(f"stopped after step {len(log)}. {checkpoints.name_last_good(folder)}")
    export_model(run, workspace, fingerprint=fingerprint, log=log)
    torch.distributed.barrier()
    if tracker and tracker.is_stuck:
        sys.stdout.flush()
        os._exit(0)  # W&B's exit hook would wait for what hangs


class TrainingStoppedError(TemporaryError):
    """The ranks agreed to stop."""


def _train(run: Run, log: list[Line], folder: Path, *, stop: Stop, progress: Progress, watchdog: Watchdog) -> bool:
    def save(lines: list[Line]) -> None:
        began = time.perf_counter()
        with watchdog.slowly(_state_bytes(run)):
            saving.save(run, folder, lines)
        if run.rank == 0:
            progress.saved(len(lines), time.perf_counter() - began)

    def show(line: Line) -> None:
        if run.rank == 0:
            progress.show(line)

    while True:
        try:
            with progress.printer:
                return train(run, log, save=save, stop=stop, show=show)
        except FaultError as error:
            with watchdog.slowly(_state_bytes(run)):
                earlier = rewind.go_back(run, folder, error.fault)
            if earlier is None:
                used = rewind.count_used(error.fault, run.rewinds, allowed=run.profile.stop.rewinds)
                raise TrainingError(f"{error}.\n{used}{checkpoints.name_last_good(folder)}") from None
            log[:] = earlier
            progress.rewinds += 1
        except TrainingError as error:
            raise TrainingError(f"{error}.\n{checkpoints.name_last_good(folder)}") from None


def _try_out(run: Run, folder: Path, log: list[Line]) -> dict[str, object]:
    """Find out before step 1 what would end the run later: a full disk, too little memory, broken weights."""
    found: dict[str, object] = {}
    if run.rank == 0:
        found["disk"] = check_disk(
            folder,
            one_bytes=_state_bytes(run),
            keep=run.profile.save_total_limit,
            export_bytes=count_weights(run.engine.module) * DTYPE_BYTES[run.profile.dtype],
        )
    if not log and os.environ.get(UNTRIED) != "1":
        found["tried"] = try_worst_step(run, lambda: saving.save(run, folder, []))
    if run.rank == 0:
        for name, text in found.items():
            print(f"{name}: {text}", flush=True)
    return found


def _state_bytes(run: Run) -> int:
    """Return the bytes of one checkpoint of this run."""
    return stored_bytes(
        count_weights(run.engine.module),
        count_weights(run.engine.module, learning_only=True),
        number_bytes=DTYPE_BYTES[run.profile.dtype],
        stage=run.engine.zero_optimization_stage(),
    )


def _track(run: Run, workspace: Workspace, fingerprint: str) -> Tracker | None:
    """Open the mirror on rank 0; it gets parameters and digests."""
    if run.rank != 0:
        return None
    config = run.profile.model_dump(mode="json", include={*READS["train"], *UNHASHED})
    data = load_manifest(workspace.data, remedy=REMEDY, verify=False)
    digests = {"fingerprint": fingerprint, "data": digest_of(data), "ranks": run.world_size}
    name = f"{workspace.profile}-{run.profile.log_dir}-finetuned"  # as the original named its runs
    return open_tracker(About(workspace.work, name, fingerprint, {**config, **digests}))


def _peak(run: Run) -> float | None:
    """Return what all cards together can do, FLOP/s; None for a CPU, fp32 (which may be TF32) or a card not listed."""
    card = name_card(torch.cuda.get_device_name()) if run.device.type == "cuda" else None
    return None if card is None or run.profile.dtype == "fp32" else CARDS[card] * 1e12 * run.world_size


def open_run(workspace: Workspace, profile: TrainParams, attention: Attention, *, universal: bool) -> Run:
    """Return the run with its engine, held to what params say, before its first step.

    Raises:
        ConfigError: No step would be made, or model, DeepSpeed JSON or the ranks' plans disagree with params.
    """
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
    model = SupervisedLoss(open_model(workspace.base, profile, attention))
    text = FrozenInputs.load(workspace.root).text("deepspeed", profile.deepspeed_config)
    named = parse_deepspeed_json(text, profile.deepspeed_config)
    config = plan_deepspeed(profile, named, ranks=ranks, accumulation_steps=accumulation, total_steps=run.total_steps)
    if universal:
        config["checkpoint"] = {"load_universal": True}
    run.engine, *_ = deepspeed.initialize(model=model, model_parameters=learning(model), config=config)
    base = load_manifest(workspace.base, remedy="Run `dvc checkout`, or `dvc repro base`", verify=False)
    check_rope(run.engine.module.model, scaling_from_json(base["rope"]))
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


def _describe(run: Run, attention: Attention) -> dict[str, object]:
    """Return what this attempt runs on, for the provenance; rank 0 prints the gist."""
    facts = {
        "ranks": run.world_size,
        "threads_per_rank": torch.get_num_threads(),
        "attention": attention.effective,
        "asked_flash_attention": attention.asked_flash,
        "host": platform.node(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else name_cpu(),
        "kernels": torch.backends.cpu.get_cpu_capability(),  # e.g. AVX512: it decides how sums are rounded
        "python": platform.python_version(),
        "transformers": transformers.__version__,
        **saving.versions(),
    }
    if run.rank == 0:
        parameters = count_weights(run.engine.module)
        print(
            f"{parameters:,} weights, {run.total_steps} steps of {run.profile.global_batch_size} rows, "
            f"{run.world_size} ranks x {run.accumulation_steps} micro-batches of "
            f"{run.profile.per_device_train_batch_size}, {run.profile.dtype}, attention: {attention.effective}",
            flush=True,
        )
    return facts


def _fail(error: RopewayError) -> NoReturn:
    """Say what happened and end this rank; the launcher ends those that wait for it in a collective."""
    agreed = isinstance(
        error, TrainingError | TrainingStoppedError | rewind.RestartError
    )  # every rank raises the same: once is enough
    if not agreed or os.environ.get("RANK", "0") == "0":
        print(f"{error}", file=sys.stderr, flush=True)
    if agreed:
        torch.distributed.barrier()  # else the launcher, told by another rank, ends this one before it has spoken
    os._exit(error.exit_code)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    except RopewayError as error:
        _fail(error)
