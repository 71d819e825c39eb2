"""The parts of `make bench-gpu`, one per process: `-m benchmarks.gpu_parts PART small|full FILE` writes a JSON file.

`small` is the dry run: the same lines on the CPU. A figure that only a GPU has is null there.
"""

import copy
import hashlib
import json
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PUBLISHED = "llama2_13b_orca_8k"
PACKAGES = (
    "torch", "transformers", "deepspeed", "flash_attn", "flash_attn_3", "liger-kernel", "triton", "peft", "numpy",
    "tokenizers", "safetensors", "pydantic", "ruamel.yaml", "psutil", "accelerate",
)  # fmt: skip
Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scale:
    """The shapes of a part: those of a GPU, or small ones."""

    device: torch.device
    dtype: str  # of params.yaml
    tokens: int  # row length
    small: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of tensors."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]


SCALES = {
    "small": Scale(torch.device("cpu"), "bf16", 64, small=True),
    "full": Scale(torch.device("cuda"), "fp16", 8192, small=False),
}


def versions(scale: Scale) -> Facts:
    """Versions of packages, driver, compiler and card."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    facts: Facts = {"python": sys.version.split()[0], "packages": found, "cuda": torch.version.cuda}
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    facts["nvcc"] = _last_line([nvcc, "--version"]) if nvcc else None
    facts["driver"] = _last_line(
        ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    )
    if scale.device.type == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts["card"] = card.name
        facts["memory_gib"] = round(card.total_memory / 2**30, 1)
        facts["capability"] = f"sm{card.major}{card.minor}"
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts


def _last_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().rpartition("\n")[2]


def kernels(scale: Scale) -> Facts:
    """Every flash kernel that is installed: faults, error against fp32, equal bytes of two backward passes, time."""
    from ropeway.models import attention
    from ropeway.models.attention import Heads, kernel_fault

    rows: list[Facts] = []
    absent: dict[str, str] = {}
    candidates = [("SDPA per sequence", lambda **_: ("SDPA per sequence", attention.attend_each))]
    for name, load in (*candidates, *(() if scale.small else attention.FLASH_KERNELS)):
        try:
            label, kernel = load(deterministic=False)
            _, exact_kernel = load(deterministic=True)
        except ImportError as error:
            absent[name] = str(error)
            continue
        for dtype in (torch.float16, torch.bfloat16):
            for heads in (Heads(40, 40, 128), Heads(32, 8, 128)):
                fault = kernel_fault(kernel, heads, dtype, scale.device)
                row: Facts = {"kernel": label, "dtype": str(dtype).removeprefix("torch."), "heads": str(heads)}
                if fault:
                    rows.append({**row, "fault": fault})
                    continue
                for layout, lengths in _layouts(scale):
                    measured = _measure_kernel(kernel, exact_kernel, heads, dtype, scale, lengths)
                    rows.append({**row, "layout": layout, **measured})
    return {"kernels": rows, "not_usable": absent}


def _layouts(scale: Scale) -> Iterator[tuple[str, list[int]]]:
    yield "packed", [scale.tokens // 2, scale.tokens // 4, scale.tokens // 8, scale.tokens // 8]
    yield "padded", [scale.tokens] * 2


def _measure_kernel(
    kernel: Any, exact_kernel: Any, heads: Any, dtype: torch.dtype, scale: Scale, lengths: list[int]
) -> Facts:
    tokens = sum(lengths)
    torch.manual_seed(0)
    shapes = [(tokens, count, heads.size) for count in (heads.query, heads.key_value, heads.key_value)]
    inputs = [torch.randn(shape, device=scale.device, dtype=dtype, requires_grad=True) for shape in shapes]
    upstream = torch.randn_like(inputs[0])
    ends = torch.tensor([0, *lengths], device=scale.device).cumsum(0).to(torch.int32)

    def gradients(chosen: Any) -> list[torch.Tensor]:
        query, key, value = inputs
        return list(torch.autograd.grad(chosen(query, key, value, ends, max(lengths), None), inputs, upstream))

    def equal(chosen: Any) -> bool:
        return all(torch.equal(one, other) for one, other in zip(gradients(chosen), gradients(chosen), strict=True))

    plain = equal(kernel)
    torch.use_deterministic_algorithms(mode=True)
    exact = equal(exact_kernel)
    exact_ms = _milliseconds(lambda: gradients(exact_kernel), scale)
    torch.use_deterministic_algorithms(mode=False)
    return {
        "forward_backward_ms": _milliseconds(lambda: gradients(kernel), scale),
        "deterministic_ms": exact_ms,
        "same_bytes_twice": plain,
        "same_bytes_twice_deterministic": exact,
        "host_syncs": _count_syncs(lambda: gradients(kernel), scale),
    }


def _milliseconds(work: Callable[[], object], scale: Scale, *, repeats: int = 5) -> float:
    times = []
    for _ in range(2 if scale.small else repeats + 2):
        _synchronize(scale)
        began = time.perf_counter()
        work()
        _synchronize(scale)
        times.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(times[1:]), 3)


def _synchronize(scale: Scale) -> None:
    if scale.device.type == "cuda":
        torch.cuda.synchronize()


def _count_syncs(work: Callable[[], object], scale: Scale) -> int | None:
    if scale.device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        work()
    torch.cuda.set_sync_debug_mode("default")
    return len(found)


def fused(scale: Scale) -> Facts:
    """Liger's kernels on two layers of the published shape: agreement, and the time of a step with and without them."""
    from ropeway.models.fused import apply_liger, check_fused, liger_version

    config = model_config(PUBLISHED_SHAPE if not scale.small else SMALL_SHAPE, layers=2)
    if scale.small:
        check_fused(config, scale.torch_dtype, scale.device, lambda _: None)
        return {"liger": None, "agrees": None}
    try:
        check_fused(config, scale.torch_dtype, scale.device)
    except Exception as error:  # noqa: BLE001 - a finding, not a fault of the bench
        return {"liger": liger_version(), "agrees": str(error)}
    times = {}
    for way in ("plain", "liger"):  # the RoPE function stays replaced in this process: plain goes first
        model = random_model(config, scale)
        if way == "liger":
            apply_liger(model)
        times[way] = _milliseconds(lambda model=model: _step(model, scale), scale)  # type: ignore[misc]
    return {"liger": liger_version(), "agrees": True, "layers": 2, "forward_backward_ms": times}


def _step(model: Any, scale: Scale) -> None:
    ids = torch.randint(0, model.config.vocab_size, (1, scale.tokens), device=scale.device)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    hidden.float().square().mean().backward()
    model.zero_grad()


PUBLISHED_SHAPE: Facts = {
    "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 40, "vocab_size": 32016,
}  # fmt: skip
# TinyLlama-1.1B's shape.
ONE_BILLION: Facts = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000,
}  # fmt: skip
SMALL_SHAPE: Facts = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip


def model_config(shape: Facts, *, layers: int | None = None) -> Any:
    """Return a Llama config of this shape that reaches 8,192 positions by linear scaling, as the published run."""
    from transformers import LlamaConfig

    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    chosen = {**shape, "num_hidden_layers": layers or shape["num_hidden_layers"]}
    return LlamaConfig(**chosen, max_position_embeddings=8192, rope_parameters=rope, use_cache=False)


def random_model(config: Any, scale: Scale, implementation: str = "sdpa") -> Any:
    """Return a model with random weights, created on the device in the scale's dtype."""
    from transformers import LlamaForCausalLM

    usual = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(scale.torch_dtype)
    config = copy.deepcopy(config)
    config._attn_implementation = implementation  # noqa: SLF001 - as `from_pretrained(attn_implementation=…)` sets it
    try:
        with torch.device(scale.device):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(usual)


def start_engine(scale: Scale, shape: Facts, *, ranks: int = 1, rank: int = 0, liger: bool = False) -> Any:
    """Return (DeepSpeed engine with the published configuration, inputs of one micro-batch, attention)."""
    import deepspeed

    from ropeway.config.load_params import load_profile
    from ropeway.models.attention import Heads, choose_attention, register_attention
    from ropeway.models.fused import apply_liger
    from ropeway.models.supervised_loss import SupervisedLoss
    from ropeway.stages.train.deepspeed_config import check_optimizer, parse_deepspeed_json, plan_deepspeed
    from ropeway.stages.train.model import enable_checkpointing, trainable_parameters

    join_group(rank, ranks, scale)
    whole = load_profile(ROOT / "params.yaml", PUBLISHED)[1]
    profile = whole.model_copy(update={"dtype": scale.dtype, "layout": "packed"})
    config = model_config(shape)
    attention = choose_attention(profile, Heads.of(config), scale.device)
    assert attention.kernel is not None  # noqa: S101 - packed rows always have one
    register_attention(attention.kernel)
    model = random_model(config, scale, attention.implementation)
    if liger:
        apply_liger(model)
    enable_checkpointing(model)
    wrapped = SupervisedLoss(model)
    path = whole.deepspeed_config
    named = parse_deepspeed_json((ROOT / path).read_text(), path)
    if scale.device.type == "cuda":
        check_optimizer(named, path)
    if scale.small:  # 1e9 numbers of buckets are for 13B
        named["zero_optimization"] |= {"reduce_bucket_size": 10**5, "allgather_bucket_size": 10**5}
    planned = plan_deepspeed(profile, named, ranks=ranks, accumulation_steps=2, total_steps=100)
    engine, *_ = deepspeed.initialize(model=wrapped, model_parameters=trainable_parameters(wrapped), config=planned)
    rows = profile.per_device_train_batch_size
    positions = torch.arange(scale.tokens, device=scale.device).repeat(rows)[None]
    ids = torch.randint(0, config.vocab_size, positions.shape, device=scale.device)
    given = {"input_ids": ids, "position_ids": positions, "targets": ids, "loss_mask": torch.ones_like(ids).bool()}
    return engine, given, attention.effective


def join_group(rank: int, ranks: int, scale: Scale) -> None:
    """Become a rank of a group whose other ranks do not exist: collectives return at once."""
    import deepspeed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
    if scale.device.type == "cuda":
        torch.cuda.set_device(0)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    if scale.device.type == "cpu":  # the shared-memory op would wait for the other ranks
        from deepspeed.comm import torch as backend

        backend.build_shm_op = lambda: None
    deepspeed.init_distributed("fake", verbose=False)


def two_steps(engine: Any, given: Facts, scale: Scale) -> Facts:
    """Return the seconds of a step and the peaks of two optimizer steps of two micro-batches by phase."""
    from ropeway.stages.train.loss import micro_batch_loss

    peaks: dict[str, float | None] = {}
    seconds = []

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        if scale.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        yield
        if scale.device.type == "cuda":
            peaks[name] = max(peaks.get(name) or 0.0, round(torch.cuda.max_memory_allocated() / 2**30, 2))
        else:
            peaks[name] = None

    applied = []
    for _ in range(3):
        _synchronize(scale)
        began = time.perf_counter()
        for _ in range(engine.gradient_accumulation_steps()):
            with phase("forward_gib"):
                loss = micro_batch_loss(engine(**given))
            with phase("backward_gib"):
                engine.backward(loss)
            with phase("optimizer_step_gib"):
                engine.step()
        _synchronize(scale)
        seconds.append(time.perf_counter() - began)
        applied.append(int(engine.was_step_applied()))
    reserved = round(torch.cuda.max_memory_reserved() / 2**30, 2) if scale.device.type == "cuda" else None
    return {**peaks, "reserved_gib": reserved, "step_seconds": round(min(seconds[1:]), 4), "applied": applied}


def throughput(engine: Any, given: Facts, step_seconds: float, scale: Scale) -> Facts:
    """Return tokens/s and model FLOPs utilization of one GPU, without communication."""
    from ropeway.data.batches import Piece
    from ropeway.planning.budget import CARDS, name_card
    from ropeway.stages.train.model import step_flops, token_flops

    tokens = given["input_ids"].numel() * engine.gradient_accumulation_steps()
    piece = Piece(source=0, sequence=0, begin=0, end=scale.tokens)
    model = engine.module.model
    flops = step_flops(token_flops(model), model.config, [(piece,)] * (tokens // scale.tokens))
    card = name_card(torch.cuda.get_device_name()) if scale.device.type == "cuda" else None
    mfu = flops / step_seconds / (CARDS[card] * 1e12) if card else None
    return {"tokens_per_second": round(tokens / step_seconds, 1), "mfu": mfu and round(mfu, 4)}


def engine(scale: Scale) -> Facts:
    """What DeepSpeed's engine does to a small model: RoPE's dtype, the optimizer, a step that is applied."""
    started, given, attention = start_engine(scale, SMALL_SHAPE)
    steps = two_steps(started, given, scale)
    inner = started.optimizer.optimizer
    return {
        "attention": attention,
        "rope_dtype": str(started.module.model.model.rotary_emb.inv_freq.dtype),
        "optimizer": f"{type(inner).__module__}.{type(inner).__name__}",
        "fused": inner.param_groups[0].get("fused"),
        "zero": type(started.optimizer).__name__,
        "applied": steps["applied"],
    }


def published_rank(scale: Scale) -> Facts:
    """The last of 8 ranks of the published run on this card: memory by phase, time of a step, MFU; with Liger too."""
    from ropeway.config.load_params import load_profile
    from ropeway.config.zero import read_zero
    from ropeway.planning.memory import Load
    from ropeway.planning.phases import plan_phases

    profile = load_profile(ROOT / "params.yaml", PUBLISHED)[1].model_copy(update={"layout": "packed"})
    zero = read_zero((ROOT / profile.deepspeed_config).read_text(), profile.deepspeed_config)
    phases = plan_phases(Load.of(profile, zero, ranks=8), rank=7)
    planned = {f"{phase}_gib": round(sum(parts.values()) / 2**30, 2) for phase, parts in phases.items()}
    return {"ways": _ways("published_way", scale), "planned": planned}


def speed(scale: Scale) -> Facts:
    """A model of 1.1 billion weights on one card at 8,192 tokens: tokens/s and MFU, with and without Liger."""
    return {"ways": _ways("speed_way", scale)}


def _ways(part: str, scale: Scale) -> list[Facts]:
    """Run a part without and with Liger, each in a process of its own, for memory that nothing was allocated in."""
    rows = []
    for liger in (False, True):
        target = Path(os.environ["BENCH_FILE"]).with_suffix(f".{int(liger)}.json")
        command = [sys.executable, "-m", "benchmarks.gpu_parts", part, "small" if scale.small else "full", str(target)]
        done = subprocess.run(
            command, check=False, env={**os.environ, "BENCH_LIGER": str(int(liger))}, stderr=subprocess.PIPE, text=True
        )
        row = json.loads(target.read_text()) if done.returncode == 0 else {"failed": done.stderr.strip()[-500:]}
        rows.append({"liger": liger, **row})
    return rows


def published_way(scale: Scale) -> Facts:
    """One way of `published_rank`."""
    shape = SMALL_SHAPE if scale.small else PUBLISHED_SHAPE
    return _measure_way(scale, shape, ranks=8, rank=7)


def speed_way(scale: Scale) -> Facts:
    """One way of `speed`."""
    return _measure_way(scale, SMALL_SHAPE if scale.small else ONE_BILLION, ranks=1, rank=0)


def _measure_way(scale: Scale, shape: Facts, *, ranks: int, rank: int) -> Facts:
    liger = os.environ["BENCH_LIGER"] == "1" and not scale.small  # Liger has no CPU kernels
    started, given, attention = start_engine(scale, shape, ranks=ranks, rank=rank, liger=liger)
    start_gib = round(torch.cuda.max_memory_allocated() / 2**30, 2) if scale.device.type == "cuda" else None
    steps = two_steps(started, given, scale)
    return {
        "liger": liger,
        "attention": attention,
        "engine_start_gib": start_gib,
        **steps,
        **throughput(started, given, steps["step_seconds"], scale),
    }


# 30 steps of the real stage train on Python's own documentation.
PROFILE = """
gpu_bench:
  <<: *published
  dtype: {dtype}
  layout: {layout}
  deterministic: {deterministic}
  learning_rate: 1e-3
  model_name: scratch
  max_length: 256
  warmup_steps: 2
  gradient_accumulation_steps: 2
  per_device_train_batch_size: 2
  per_device_eval_batch_size: 8
  eval_steps: 20
  save_steps: 3
  save_total_limit: 2
  global_batch_size: 4
  superhot_config: {{type: linear, scale: 2}}
  datasets:
    - docstrings: {{max_val_set: 8, size: 70}}
    - topics: {{max_chunk_size: 400, max_val_set: 8, size: 50}}
  sources:
    docstrings: {{kind: python_docs, part: docstrings, expected_rows: null}}
    topics: {{kind: python_docs, part: topics, expected_rows: null}}
  base: {{kind: scratch}}
  expected_model: {{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2,
    num_key_value_heads: 1, vocab_size: 2000, max_position_embeddings: 128, rope_theta: 10000.0,
    rms_norm_eps: 1e-5, tie_word_embeddings: false}}
  stop: {{max_skipped_in_row: 20, spike_window_steps: 100, spike_ratio: 5.0, max_spikes_in_row: 5, rewinds: 0,
    hang_seconds: null}}
  duplicates: {{exact: count, near: count, threshold: 0.8, permutations: 128, ngram: 5}}
  contamination: {{ngram: 13, action: count, prompts: [configs/prompts.jsonl]}}
  evaluation:
    prompts: configs/prompts.jsonl
    sampling: configs/sampling.json
    max_new_tokens: 4
    positions: {{rows: 2, row_tokens: 96, bucket_tokens: 32}}
    passkey: {{lengths: [384], depths: [0.5], repeats: 1}}
    long_context: null
    tasks: []
  gate: {{max_loss_increase_nats: 0.01, min_gain_over_base_nats: 0.1,
    max_accuracy_decrease: null, max_position_loss_increase_nats: null, max_passkey_decrease: null,
    min_passkey_accuracy: null, max_long_context_decrease: null, max_task_decrease_errors: null, drift: null}}
  package: {{dtype: fp32, max_shard_bytes: 5000000000}}
  card: {{license: apache-2.0, license_name: Apache License 2.0, license_link: "https://www.apache.org/licenses/",
    base_model: null, upstream_datasets: [], developers: [], sponsored_by: null, thanks: null}}
"""


def lay_small_workspace(root: Path, *, dtype: str, layout: str, deterministic: bool) -> None:
    """Run the stages before train of the profile above in a new workspace."""
    from benchmarks.train import lay_workspace

    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    block = PROFILE.format(dtype=dtype, layout=layout, deterministic=str(deterministic).lower())
    lay_workspace(root, "gpu_bench", block)


def training(scale: Scale) -> Facts:
    """The real stage train on one GPU: padded and packed, killed and resumed; equal weights with `deterministic`."""
    place = Path(os.environ["BENCH_FILE"]).with_suffix("")
    shutil.rmtree(place, ignore_errors=True)
    rows = []
    for layout in ("padded", "packed"):
        lay_small_workspace(place / layout / "whole", dtype=scale.dtype, layout=layout, deterministic=True)
        shutil.copytree(place / layout / "whole", place / layout / "resumed")
        whole = _train(place / layout / "whole", kill=False)
        resumed = _train(place / layout / "resumed", kill=True)
        rows.append({"layout": layout, **whole[1], "killed_and_resumed_equal": whole[0] == resumed[0]})
    return {"trainings": rows}


def _train(root: Path, *, kill: bool) -> tuple[str, Facts]:
    """Run the stage train on one rank; `kill`: kill it after its first checkpoint and run it again.

    Returns (sha256 of the weights, facts).
    """
    environment = {**os.environ, "ROPEWAY_RANKS": "1", "WANDB_MODE": "disabled"}
    run = root / "runs" / "gpu_bench"
    program = "from pathlib import Path; from ropeway.orchestration.stage_process import execute_stage; "
    command = [sys.executable, "-c", f"{program}execute_stage(Path({str(root)!r}), 'train')"]
    began = time.monotonic()
    if kill:
        with subprocess.Popen(command, cwd=root, env=environment, start_new_session=True) as process:
            while process.poll() is None and not list((root / ".checkpoints").glob("*/step-*/manifest.json")):
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
    subprocess.run(command, cwd=root, env=environment, check=True)
    weights = hashlib.sha256(b"".join(sorted(path.read_bytes() for path in run.glob("model/*.safetensors"))))
    log = [line.split(",") for line in (run / "steps.csv").read_text().splitlines()]
    losses = [float(line[log[0].index("loss")]) for line in log[1:]]
    attempt = json.loads((run / "provenance.json").read_text())["attempts"][-1]
    return weights.hexdigest(), {
        "steps": len(losses),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "attention": attempt["attention"],
        "seconds": round(time.monotonic() - began, 1),
    }


def isolation(scale: Scale) -> Facts:
    """Packed against alone, joined against alone, and rounding, at the depth of the published model."""
    from ropeway.config.load_params import load_profile
    from ropeway.data.shards import open_shards
    from ropeway.models.attention import Heads, choose_attention, register_attention
    from ropeway.models.supervised_loss import SupervisedLoss
    from ropeway.runtime.workspace import Workspace
    from ropeway.stages.train.training_run import Run
    from ropeway.stages.train.warm_up import measure_isolation

    root = Path(os.environ["BENCH_FILE"]).with_suffix("")
    lay_small_workspace(root, dtype=scale.dtype, layout="packed", deterministic=False)
    profile, shards = load_profile(root / "params.yaml", "gpu_bench")[1], open_shards(Workspace(root, "gpu_bench").data)
    rows = []
    for dtype in ("fp16", "bf16"):
        chosen = Scale(scale.device, dtype, scale.tokens, scale.small)
        shape = {**(SMALL_SHAPE if scale.small else PUBLISHED_SHAPE), "vocab_size": 32016}
        config = model_config(shape)
        attention = choose_attention(profile.model_copy(update={"dtype": dtype}), Heads.of(config), scale.device)
        assert attention.kernel is not None  # noqa: S101 - packed rows always have one
        register_attention(attention.kernel)
        model = SupervisedLoss(random_model(config, chosen, attention.implementation))
        stand_in = SimpleNamespace(module=model, device=scale.device)
        run = Run(profile, shards, stand_in, 0, 1, 1)
        row = next(row for row in run.plan(0).packed or () if len(row) > 1)
        with torch.no_grad():
            found = measure_isolation(run, row)
        rows.append({"dtype": dtype, "layers": config.num_hidden_layers, "packed": found.packed, "joined": found.joined,
                     "rounding": found.rounding, "allowed": found.allowed})  # fmt: skip
        del model, stand_in, run
        if scale.device.type == "cuda":
            torch.cuda.empty_cache()
    return {"isolation": rows}


def shard(scale: Scale) -> Facts:
    """Write, sync and hash a rank's share of a checkpoint of the published run: 19.5 GB."""
    numbers = 10**6 if scale.small else 19_500_000_000 // 4
    tensor = torch.ones(numbers, dtype=torch.float32)
    path = Path(os.environ["BENCH_FILE"]).with_suffix(".pt")
    began = time.perf_counter()
    torch.save(tensor, path)
    wrote = time.perf_counter()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    synced = time.perf_counter()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    hashed = time.perf_counter()
    gigabytes = path.stat().st_size / 1e9
    path.unlink()
    return {
        "gigabytes": round(gigabytes, 3),
        "write_gb_per_second": round(gigabytes / (wrote - began), 3),
        "sync_seconds": round(synced - wrote, 3),
        "hash_gb_per_second": round(gigabytes / (hashed - synced), 3),
        "sha256": digest[:12],
    }


def main() -> None:
    """Run the part that the command line names and write its result."""
    name, scale, target = sys.argv[1:]
    os.environ["BENCH_FILE"] = target
    for noisy in ("transformers", "DeepSpeed", "deepspeed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    result = {"part": name, **globals()[name](SCALES[scale])}
    path = Path(target)
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(result))
    draft.replace(path)
    if torch.distributed.is_initialized():
        os._exit(0)  # the other ranks of the group do not exist: its shutdown would wait for them


if __name__ == "__main__":
    main()
