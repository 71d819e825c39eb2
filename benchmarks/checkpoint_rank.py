"""One rank of `make bench-checkpoint`: trains a random model and saves it in each way in turns.

    -m benchmarks.checkpoint_rank FOLDER ROUNDS STEPS HIDDEN     (DeepSpeed's launcher starts it)

A save of each way is followed by STEPS steps. It costs the seconds of both, less what the steps take without a save.
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch

from ropeway.models.open_model import create_model
from ropeway.runtime.manifest import NAME, sync_file, write_manifest
from ropeway.runtime.op_build import init_distributed
from ropeway.stages.train import checkpoints
from ropeway.stages.train.checkpoint_store import StoredRun
from ropeway.stages.train.checkpoint_writer import CheckpointWriter
from ropeway.stages.train.saving import Saver
from ropeway.storage import FileStore

LAYERS, VOCABULARY, TOKENS = 8, 16_000, 128
WARM_STEPS = 4
UPLOADED, STORE, PREFIX = "uploaded", "store", "bench/run/"  # folders of the way that uploads, and of its store
_POLL_SECONDS = 0.05


def open_engine(hidden: int) -> Any:  # noqa: ANN401 - DeepSpeed's engine has no types
    """Return an engine with a random model in fp32 under ZeRO-2, and the checkpoint engine of a training."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": LAYERS,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 512,
    }  # fmt: skip
    model = create_model(shape)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "steps_per_print": 2**31,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    engine.checkpoint_engine = CheckpointWriter(engine.checkpoint_engine)
    return engine


def save_by_rank_0(run: Any, folder: Path, step: int) -> None:  # noqa: ANN401
    """Save as Ropeway did before: rank 0 flushes every file, one after another, then hashes them in threads."""
    partial = checkpoints.partial_folder(folder, step)
    if run.rank == 0:
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    run.engine.checkpoint_engine.is_copying = False
    run.engine.save_checkpoint(str(partial), tag=checkpoints.STATE, save_latest=False)
    torch.distributed.barrier()
    if run.rank == 0:
        checkpoints.write_log(folder, step, [])
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                sync_file(path)
        write_manifest(partial, {"step": step})
        partial.rename(checkpoints.step_folder(folder, step))
    torch.distributed.barrier()


class Bench:
    """The engine, its steps and the saves measured so far."""

    def __init__(self, folder: Path, steps: int, hidden: int) -> None:
        """Open the engine and measure steps without a save."""
        self.folder, self.steps, self.saves = folder, steps, list[dict[str, Any]]()
        profile = SimpleNamespace(save_total_limit=1, async_save=False)
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.run = SimpleNamespace(
            rank=rank, world_size=ranks, rewinds=(), profile=profile, engine=open_engine(hidden), device="cpu"
        )
        self.train(WARM_STEPS, lambda: None)
        self.step_seconds = 0.0
        self.step_seconds = statistics.median(self.train(1, lambda: None) for _ in range(2 * steps))

    def train(self, steps: int, poll: Callable[[], None]) -> float:
        """Run optimizer steps; return their seconds."""
        torch.distributed.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            ids = torch.randint(VOCABULARY, (1, TOKENS))
            self.run.engine.backward(self.run.engine(input_ids=ids, labels=ids).loss)
            self.run.engine.step()
            poll()
        return time.perf_counter() - began

    def save(self, way: str) -> str:
        """Save once in this way, with steps after it; return the sha256 of all state files."""
        step = len(self.saves) + 1
        waited, complete = 0.0, 0.0

        def report(_step: int, seconds: float, whole: float | None) -> None:
            nonlocal waited, complete
            waited, complete = seconds, seconds if whole is None else whole

        self.run.profile.async_save = way == "background"
        folder = self.folder / UPLOADED if way == UPLOADED else self.folder  # the launching process watches that one
        folder.mkdir(exist_ok=True)
        saver = Saver(self.run, folder, report=report, deadline=nullcontext)
        torch.distributed.barrier()
        began = time.perf_counter()
        if way == "rank_0":
            save_by_rank_0(self.run, self.folder, step)
            waited = complete = time.perf_counter() - began
        else:
            saver.save([{}] * step)
        self.train(self.steps, saver.poll)
        saver.wait()
        lost = time.perf_counter() - began - self.steps * self.step_seconds
        if way == UPLOADED:
            stored = StoredRun(FileStore(self.folder / STORE), PREFIX)
            while self.run.rank == 0 and step not in dict(stored.steps()):
                time.sleep(_POLL_SECONDS)
            complete = time.perf_counter() - began
        self.saves.append({"way": way, "waited": waited, "lost": lost, "complete": complete})
        torch.distributed.barrier()
        return self._take(checkpoints.step_folder(folder, step))

    def _take(self, saved: Path) -> str:
        """Return the digests of a checkpoint's state and remove it."""
        files = json.loads((saved / NAME).read_bytes())["files"]
        torch.distributed.barrier()
        if self.run.rank == 0:
            self.bytes = sum(one["bytes"] for one in files.values())
            shutil.rmtree(saved)
        torch.distributed.barrier()
        return json.dumps({name: one["sha256"] for name, one in sorted(files.items()) if name.startswith("state/")})


def main(folder: Path, rounds: int, steps: int, hidden: int) -> None:
    """Save in turns and write the figures."""
    init_distributed()
    deepspeed.utils.logger.setLevel("ERROR")
    bench = Bench(folder, steps, hidden)
    ways = ("rank_0", "all_ranks", "background", UPLOADED)
    for number in range(rounds):
        for way in ways if number % 2 == 0 else reversed(ways):
            bench.save(way)
    bench.steps = 0  # no step lies between these, so all have the same state
    digests = {bench.save(way) for way in ways}
    if bench.run.rank == 0:
        facts = {
            "saves": bench.saves[: -len(ways)],
            "step_seconds": bench.step_seconds,
            "checkpoint_bytes": bench.bytes,
            "same_sha256": len(digests) == 1,
        }
        (folder / "figures.json").write_text(json.dumps(facts))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
