"""One rank of a training run: `-m ropeway.stages.train.rank ROOT PROFILE FINGERPRINT [STEP]`, started by the launcher.

STEP is the checkpoint that the stage has verified, 0 for none; without it, rank 0 looks for the newest valid one.
"""

import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import TrainParams
from ropeway.config.stages import READS, UNHASHED
from ropeway.config.zero import PARTITIONED_STAGE, read_zero
from ropeway.data.accumulation import accumulation_steps
from ropeway.data.shards import REMEDY, open_shards
from ropeway.models.architectures import SDPA, VARIABLE_LENGTH, check_proof
from ropeway.models.attention import Attention, Heads, choose_attention
from ropeway.models.base_rope import scaling_from_json
from ropeway.models.fused import apply_liger, check_fused, liger_version
from ropeway.models.open_model import DTYPES, read_config
from ropeway.models.sequence_parallel import check_shareable, join_sequence_group
from ropeway.models.supervised_loss import SupervisedLoss
from ropeway.planning.budget import CARDS, name_card
from ropeway.planning.memory import DTYPE_BYTES, stored_bytes
from ropeway.runtime.code_digests import CODE, check_code
from ropeway.runtime.devices import cpu_model_name
from ropeway.runtime.errors import ConfigError, RopewayError, TemporaryError, TrainingError
from ropeway.runtime.grace import StopFiles, StopTimes, stated_seconds
from ropeway.runtime.launcher import adopt_device, adopt_slurm
from ropeway.runtime.manifest import digest_of, load_manifest
from ropeway.runtime.op_build import collective_timeout, init_distributed
from ropeway.runtime.progress import Progress
from ropeway.runtime.stage_log import label_rank_output
from ropeway.runtime.tracking import TrackedRun, Tracker, describe_tracking, open_tracker
from ropeway.runtime.watchdog import Watchdog
from ropeway.runtime.workspace import Workspace
from ropeway.stages.train import checkpoints, rewind, saving
from ropeway.stages.train.checkpoint_writer import CheckpointWriter
from ropeway.stages.train.continuing import check_continued
from ropeway.stages.train.deepspeed_config import (
    check_optimizer,
    parse_deepspeed_json,
    plan_deepspeed,
    without_compiler,
)
from ropeway.stages.train.disk import DiskSpaceError, check_disk
from ropeway.stages.train.export import export_model
from ropeway.stages.train.loop import FaultError, train
from ropeway.stages.train.model import check_rope, check_rows, count_parameters, open_model, trainable_parameters
from ropeway.stages.train.rank_check import check_ranks
from ropeway.stages.train.stop import Line
from ropeway.stages.train.stop_request import StopRequest
from ropeway.stages.train.training_run import Run
from ropeway.stages.train.warm_up import check_isolation, run_worst_step

SKIP_WARM_UP = "ROPEWAY_SKIP_WARM_UP"  # 1: no warm-up step before step 1
_PREFLIGHT = {"disk": "disk", "tried": "warm-up step"}  # key of an attempt's record -> printed name


def main(root: Path, name: str, fingerprint: str, verified: int | None) -> None:
    """Train, save checkpoints and export the model. Exit code 75 means that the same command resumes."""
    adopt_slurm(os.environ)
    label_rank_output(int(os.environ.get("RANK", "0")))
    workspace = Workspace(root, name)
    frozen = FrozenInputs.load(root)
    # Here too, not only at the end of the stage: an edit that is reverted before then would go unnoticed.
    check_code(frozen.value("code-train"), workspace.work / CODE, "train")
    profile = frozen.profile("train")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    deepspeed.utils.logger.setLevel("ERROR")  # 0.19.8 warns about its own scheduler's first call
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # deepspeed 0.19.8 on torch 2.13
    device = _init_device(workspace, profile)
    attention = _choose_attention(workspace, profile, device)
    folder = workspace.checkpoints / fingerprint
    checkpoint = saving.find_checkpoint(folder, rank=torch.distributed.get_rank(), verified=verified)
    universal = saving.needs_universal(checkpoint, ranks=torch.distributed.get_world_size())
    run = open_run(workspace, profile, attention, universal=universal)
    watchdog = Watchdog(limit_seconds=profile.stop.hang_seconds)
    run.heartbeat = watchdog.heartbeat
    times = StopTimes.estimate(_state_bytes(run), saves=2 if profile.async_save else 1)
    with watchdog.extended_deadline(_state_bytes(run)):
        rewind.load_rewinds(run, folder, checkpoint)
        check_continued(folder, checkpoint, total_steps=run.total_steps)
        log = saving.resume(run, checkpoint)
        facts = {
            "resumed_from_step": len(log),
            **_run_preflight(run, folder, log, times),
            **_describe_attempt(run, attention),
        }
    # Not earlier: with nothing to save, SIGTERM ends the rank at once.
    stop = StopRequest(times, StopFiles(workspace.work, "train") if run.rank == 0 else None, stated=stated_seconds())
    tracker = _open_tracker(run, workspace, fingerprint)
    progress = Progress(
        facts,
        workspace.progress("train"),
        folder / "attempts.jsonl",
        _peak_flops(run),
        tracker.log if tracker else lambda _: None,
    )
    ended = "failed"
    try:
        finished = _train(run, log, folder, stop=stop, progress=progress, watchdog=watchdog)
        ended = "finished" if finished else "stopped"
    finally:
        watchdog.stop()
        if tracker:
            mirrored = tracker.finish()
            progress.write(ended=ended, more={"wandb": mirrored})
            if mirrored["mode"] != "off" or mirrored["trouble"]:
                print(describe_tracking(mirrored), flush=True)
    if not finished:
        raise TrainingStoppedError(f"stopped after step {len(log)}. {checkpoints.describe_last_good(folder)}")
    export_model(run, workspace, fingerprint=fingerprint, log=log)
    torch.distributed.barrier()
    if tracker and tracker.is_stuck:
        sys.stdout.flush()
        os._exit(0)  # W&B's exit hook would wait for the thread that hangs


def _init_device(workspace: Workspace, profile: TrainParams) -> torch.device:
    """Compare the ranks' devices, initialize their communication and the kernels of `deterministic`; return the device.

    Raises:
        ConfigError: A setting needs a GPU, or the ranks' machines differ.
    """
    accelerator = get_accelerator().device_name()
    cuda = bool(accelerator == "cuda")
    if cuda:
        torch.cuda.set_device(adopt_device(os.environ, visible=torch.cuda.device_count()))
    check_ranks(workspace.work, accelerator, os.environ)
    if profile.dtype == "fp16" and not get_accelerator().is_fp16_supported():
        raise ConfigError("dtype: fp16 cannot be trained on a CPU; set bf16 or fp32, or run on GPUs")
    if profile.fused_kernels and not cuda:
        raise ConfigError("fused_kernels: Liger's kernels need a GPU; set it to false, or run on GPUs")
    if profile.deterministic and cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Source: cuBLAS, "Results reproducibility"
        torch.use_deterministic_algorithms(mode=True)
    init_distributed()
    return torch.device("cuda" if cuda else "cpu")


class TrainingStoppedError(TemporaryError):
    """Training stopped on a signal; every rank raises it."""


def _train(
    run: Run, log: list[Line], folder: Path, *, stop: StopRequest, progress: Progress, watchdog: Watchdog
) -> bool:
    @contextmanager
    def wait() -> Iterator[None]:
        with watchdog.extended_deadline(_state_bytes(run)), stop.waiting():
            yield

    def report(step: int, waited: float, background: float | None) -> None:
        stop.saved(waited if background is None else background)
        progress.saved(step, waited, background)

    saver = saving.Saver(run, folder, report=report, deadline=wait)

    def show(line: Line) -> None:
        if run.rank == 0:
            progress.show(line)

    while True:
        try:
            with progress.printer:
                finished = train(run, log, save=saver.save, poll_save=saver.poll, stop=stop, show=show)
                saver.wait()
                return finished
        except FaultError as error:
            saver.wait()
            with watchdog.extended_deadline(_state_bytes(run)):
                earlier = rewind.rewind_run(run, folder, error.fault)
            if earlier is None:
                rewinds_left = rewind.describe_rewinds_left(error.fault, run.rewinds, allowed=run.profile.stop.rewinds)
                raise TrainingError(f"{error}.\n{rewinds_left}{checkpoints.describe_last_good(folder)}") from None
            log[:] = earlier
            progress.rewinds += 1
        except TrainingError as error:
            saver.wait()
            raise TrainingError(f"{error}.\n{checkpoints.describe_last_good(folder)}") from None


def _run_preflight(run: Run, folder: Path, log: list[Line], times: StopTimes) -> dict[str, object]:
    """Check disk, memory and weights before the first step; return the results for the attempt's record."""
    results: dict[str, object] = {}
    disk = _check_disk(run, folder)
    if run.rank == 0:
        results["disk"] = disk
    if not log and os.environ.get(SKIP_WARM_UP) != "1":

        def save() -> Path:
            with times.measure_save():
                return saving.save(run, folder, [])

        results["tried"] = run_worst_step(run, save)
    if run.rank == 0:
        for name, text in results.items():
            print(f"{_PREFLIGHT[name]}: {text}", flush=True)
    return results


def _check_disk(run: Run, folder: Path) -> str:
    """Check the disk on rank 0; raise its DiskSpaceError on every rank, so that none starts to save."""
    result: list[str | DiskSpaceError] = [""]
    if run.rank == 0:
        try:
            result[0] = check_disk(
                folder,
                checkpoint_bytes=_state_bytes(run),
                keep=run.profile.save_total_limit,
                export_bytes=count_parameters(run.engine.module) * DTYPE_BYTES[run.profile.dtype],
            )
        except DiskSpaceError as error:
            result[0] = error
    torch.distributed.broadcast_object_list(result)
    if isinstance(result[0], DiskSpaceError):
        raise result[0]
    return result[0]


def _state_bytes(run: Run) -> int:
    """Return the size of one checkpoint of this run, in bytes."""
    return stored_bytes(
        count_parameters(run.engine.module),
        count_parameters(run.engine.module, trainable_only=True),
        number_bytes=DTYPE_BYTES[run.profile.dtype],
        stage=run.engine.zero_optimization_stage(),
    )


def _open_tracker(run: Run, workspace: Workspace, fingerprint: str) -> Tracker | None:
    """Return the W&B tracker on rank 0, None on others; its config holds params and digests."""
    if run.rank != 0:
        return None
    config = run.profile.model_dump(mode="json", include={*READS["train"], *UNHASHED})
    data = load_manifest(workspace.data, remedy=REMEDY, verify=False)
    digests = {"fingerprint": fingerprint, "data": digest_of(data), "ranks": run.world_size}
    name = f"{workspace.profile}-{run.profile.log_dir}-finetuned"  # as Open-Assistant's trainer names its runs
    return open_tracker(TrackedRun(workspace.work, name, fingerprint, {**config, **digests}))


def _peak_flops(run: Run) -> float | None:
    """Return the peak throughput of all GPUs, FLOP/s; None for a CPU, fp32 (which may be TF32) or an unknown GPU."""
    card = name_card(torch.cuda.get_device_name()) if run.device.type == "cuda" else None
    return None if card is None or run.profile.dtype == "fp32" else CARDS[card] * 1e12 * run.world_size


def open_run(workspace: Workspace, profile: TrainParams, attention: Attention, *, universal: bool) -> Run:
    """Return the run with its engine before the first step, checked against params.

    Raises:
        ConfigError: The run would have no step, or model, DeepSpeed JSON or the ranks' batch plans do not match params.
    """
    ranks = torch.distributed.get_world_size()
    accumulation = accumulation_steps(profile, ranks)
    torch.manual_seed(profile.rng_seed)
    sequence = join_sequence_group(profile.sequence_parallel, timeout=collective_timeout())
    shards = open_shards(workspace.data, verify=False)
    run = Run(profile, shards, None, torch.distributed.get_rank(), ranks, accumulation, sequence=sequence)
    if not run.total_steps:
        raise ConfigError(
            f"an epoch has {run.plan(0).rows} rows, fewer than global_batch_size {profile.global_batch_size}: the run "
            "would have 0 steps; lower global_batch_size or add data"
        )
    text = FrozenInputs.load(workspace.root).text("deepspeed", profile.deepspeed_config)
    named = parse_deepspeed_json(text, profile.deepspeed_config)
    if get_accelerator().device_name() == "cuda":
        check_optimizer(named, profile.deepspeed_config)
    stage = read_zero(text, profile.deepspeed_config).stage
    device = _opening_device(stage)
    model = open_model(workspace.base, profile, attention, device=device, sequence=sequence)
    if profile.fused_kernels:
        check_fused(model.config, DTYPES[profile.dtype], torch.device("cuda"))
        apply_liger(model)
    model = SupervisedLoss(model, sequence, equal_chunks=stage == PARTITIONED_STAGE)
    config = plan_deepspeed(profile, named, ranks=ranks, accumulation_steps=accumulation, total_steps=run.total_steps)
    if universal:
        config["checkpoint"] = {"load_universal": True}
    with without_compiler(named):
        run.engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable_parameters(model), config=config)
    run.engine.checkpoint_engine = CheckpointWriter(run.engine.checkpoint_engine)
    base = load_manifest(workspace.base, remedy="Run `dvc repro base`", verify=False)
    check_proof(base["proofs"], SDPA if attention.kernel is None else VARIABLE_LENGTH, where=base["model"]["name"])
    check_rope(run.engine.module.model, scaling_from_json(base["rope"]))
    _check_same_plan(run)
    isolation = check_isolation(run)
    if isolation is not None and run.rank == 0:
        print(
            f"packed rows: each sequence's losses equal those without packing to {isolation.packed:.1e} nats (ignored "
            f"boundaries would differ by {isolation.joined:.1e})",
            flush=True,
        )
    return run


def _opening_device(zero_stage: int) -> str:
    """Return where weights are opened: on the card if it holds all of them anyway, else in host memory.

    With ZeRO-3 a card holds a part in the end, but DeepSpeed 0.19.8 moves the whole model to the card before it
    partitions it, so the model must fit a card without optimizer states.
    """
    if get_accelerator().device_name() != "cuda" or zero_stage >= PARTITIONED_STAGE:
        return "cpu"
    return f"cuda:{torch.cuda.current_device()}"


def _choose_attention(workspace: Workspace, profile: TrainParams, device: torch.device) -> Attention:
    """Return the attention backend, which must be the same on every rank; rank 0 prints the kernels that do not work.

    Raises:
        ConfigError: As `choose_attention`, or the ranks chose different kernels.
    """
    config = read_config(workspace.base, {})
    heads = Heads.of(config)
    check_shareable(config, profile)
    check_rows(config, profile)
    attention = choose_attention(profile, heads, device)
    chosen = _gather(attention.effective)
    if len(set(chosen)) != 1:
        raise ConfigError(
            f"ranks use different attention kernels ({', '.join(sorted(set(chosen)))}); install the same versions on "
            "all machines"
        )
    if torch.distributed.get_rank() == 0:
        for reason in attention.rejected:
            print(f"attention kernel not used: {reason}", flush=True)
    return attention


def _check_same_plan(run: Run) -> None:
    """Raise ConfigError unless all ranks have the same plan of the first epoch."""
    digests = _gather(run.plan(0).digest)
    if len(set(digests)) != 1:
        raise ConfigError(
            f"ranks have different rows in epoch 0 (digests {digests}); give all ranks the same data and params"
        )


def _gather(value: str) -> list[str]:
    """Return the value of every rank."""
    values: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return [value or "" for value in values]


def _describe_attempt(run: Run, attention: Attention) -> dict[str, object]:
    """Return ranks, hardware and library versions of this attempt for its provenance; rank 0 prints a summary."""
    facts = {
        "ranks": run.world_size,
        "threads_per_rank": torch.get_num_threads(),
        "attention": attention.effective,
        "asked_flash_attention": attention.requested_flash,
        "fused_kernels": f"Liger {liger_version()}" if run.profile.fused_kernels else None,
        "sequence_parallel": run.sharing_ranks,
        "deterministic": run.profile.deterministic or run.device.type == "cpu",
        "host": platform.node(),
        "accelerator": run.device.type,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model_name(),
        "kernels": torch.backends.cpu.get_cpu_capability(),  # e.g. AVX512; sums round differently with another
        "python": platform.python_version(),
        "transformers": transformers.__version__,
        **saving.versions(),
    }
    if run.rank == 0:
        parameters = count_parameters(run.engine.module)
        print(
            f"{parameters:,} parameters, {run.total_steps} steps of {run.profile.global_batch_size} rows, "
            f"{run.world_size} ranks x {run.accumulation_steps} micro-batches of "
            f"{run.profile.per_device_train_batch_size}, {run.profile.dtype}, attention: {attention.effective}"
            f"{f', {run.sharing_ranks} ranks share each row' if run.sequence else ''}",
            flush=True,
        )
    return facts


def _fail(error: RopewayError) -> NoReturn:
    """Print the error and end this rank; the launcher ends ranks that wait for it in a collective."""
    # Every rank raises these; rank 0 prints them once.
    shared = TrainingError | TrainingStoppedError | DiskSpaceError | rewind.RestartError | saving.CheckpointViewError
    is_shared = isinstance(error, shared)
    if not is_shared or os.environ.get("RANK", "0") == "0":
        print(f"{error}", file=sys.stderr, flush=True)
    if is_shared:
        torch.distributed.barrier()  # else the launcher could end rank 0 before it has printed
    os._exit(error.exit_code)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]) if sys.argv[4:] else None)
    except RopewayError as error:
        _fail(error)
