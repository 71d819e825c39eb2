"""One rank of `make bench-train`: loops that train the same rows take turns in one process; writes what each turn took.

    -m benchmarks.train_rank WORKSPACE ROUNDS STEPS FOLDER     (DeepSpeed's launcher starts it, as it starts a training)

Each loop has a thread of its own and runs only while it has the turn, so all share the process, its memory allocator
and whatever else the machine does in those seconds. A turn is a fixed number of optimizer steps between two barriers.
"""

import json
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from ropeway.config.load_params import load_profile
from ropeway.config.params import Profile
from ropeway.config.stages import READS, UNHASHED
from ropeway.data.batches import PAD_MULTIPLE, Row, collate
from ropeway.models.attention import Heads, choose_attention
from ropeway.models.open_model import read_config
from ropeway.runtime.op_build import init_distributed
from ropeway.runtime.progress import Progress
from ropeway.runtime.watchdog import Watchdog
from ropeway.runtime.workspace import Workspace
from ropeway.stages.train import saving
from ropeway.stages.train.deepspeed_config import parse_deepspeed_json, plan_deepspeed
from ropeway.stages.train.loop import train
from ropeway.stages.train.model import open_model
from ropeway.stages.train.rank import open_run
from ropeway.stages.train.training_run import Run

# The first turn of each is not timed: set-up, first touch of memory; of two also the losses that are compared.
WARM_STEPS, SHORT_WARM_STEPS = 6, 2
COMPARED = ("ours", "trainer")
SAVE_STEPS = 5  # often, for a median; a save is taken out of the turn it falls into
WIDE_ROWS = 8  # a micro-batch of the wide ways: padding costs with the rows that wait for the longest
NEVER = 10**9
IGNORED = -100  # transformers' mark of a position that does not count


class DoneError(Exception):
    """Ends a loop whose last turn is over."""


@dataclass
class Turn:
    """What `steps` optimizer steps of one loop took, saves apart; CPU seconds are this rank's."""

    way: str
    steps: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0
    supervised_tokens: int = 0


@dataclass
class Turns:
    """Hands the turn from loop to loop, in the same order on every rank.

    Attributes:
        order: Whose turn it is, one after another.
        steps: Optimizer steps of each turn.
        done: The turns that are over.
        lines: What each loop said of its steps: loss and gradient norm.
        saves: Seconds of each checkpoint, not part of any turn.
    """

    order: Sequence[str]
    steps: Sequence[int]
    done: list[Turn] = field(default_factory=list)
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    saves: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Close every gate but the first loop's."""
        self._gates = {way: threading.Semaphore(0) for way in self.order}
        self._gates[self.order[0]].release()

    def begin(self, way: str) -> None:
        """Wait for the turn and start its clocks."""
        self._gates[way].acquire()
        self._now = Turn(way, self.steps[len(self.done)])
        torch.distributed.barrier()
        self._clocks = (time.perf_counter(), time.process_time())

    def step(self, way: str, line: dict[str, Any]) -> None:
        """Count a step; at the last one of the turn, hand on and wait for the next."""
        self.lines.setdefault(way, []).append(line)
        self._now.tokens += line.get("tokens", 0)
        self._now.supervised_tokens += line.get("supervised_tokens", 0)
        made = sum(turn.steps for turn in self.done if turn.way == way)
        if len(self.lines[way]) < made + self._now.steps:
            return
        torch.distributed.barrier()
        self._now.seconds += time.perf_counter() - self._clocks[0]
        self._now.cpu_seconds += time.process_time() - self._clocks[1]
        self.done.append(self._now)
        left = self.order[len(self.done) :]
        if left:
            self._gates[left[0]].release()
        if way not in left:
            raise DoneError
        self.begin(way)

    def leave_out(self, seconds: float, cpu_seconds: float) -> None:
        """Take a save out of the turn that it fell into."""
        self.saves.append(seconds)
        self._now.seconds -= seconds
        self._now.cpu_seconds -= cpu_seconds


def run_ours(run: Run, way: str, turns: Turns, folder: Path) -> None:
    """Train as a rank does, with its log, its checkpoints and its watchdog; no validation."""
    progress = Progress({}, folder / f"{way}.jsonl", folder / "attempts.jsonl", None, lambda _: None)

    def show(line: dict[str, Any]) -> None:
        if run.rank == 0:
            progress.show(line)
        turns.step(way, {key: line[key] for key in ("loss", "grad_norm", "tokens", "supervised_tokens")})

    def save(lines: list[dict[str, Any]]) -> None:
        began, used = time.perf_counter(), time.process_time()
        saving.save(run, folder / way, lines)
        turns.leave_out(time.perf_counter() - began, time.process_time() - used)

    train(run, [], save=save, stop=lambda: False, show=show)


def dataset_of(run: Run, steps: int) -> list[dict[str, torch.Tensor]]:
    """Return the rows of the first steps, in the order in which accelerate deals them out to the ranks again."""
    size, dealt = run.profile.per_device_train_batch_size, []
    for step in range(1, steps + 1):
        epoch, positions = run.rows(step)
        by_rank = [positions[rank :: run.world_size] for rank in range(run.world_size)]
        for begin in range(0, len(by_rank[0]), size):
            dealt += [run.plan(epoch).row(place) for mine in by_rank for place in mine[begin : begin + size]]
    return [pretokenise(row, run) for row in dealt]


def pretokenise(row: Row, run: Run) -> dict[str, torch.Tensor]:
    """Return a row as Trainer takes it: `(T,)` ids, and labels that its model shifts by one itself."""
    batch = collate([row], run.shards, run.profile, pad_to_multiple_of=None)
    ids, mask = torch.from_numpy(batch.input_ids[0]), torch.from_numpy(batch.loss_mask[0])
    if bool(mask[-1]):
        raise ValueError("the last position of a row counts; labels that are shifted cannot say so")
    labels = torch.full_like(ids, IGNORED)
    labels[1:] = torch.where(mask[:-1], torch.from_numpy(batch.targets[0])[:-1], IGNORED)
    return {"input_ids": ids, "labels": labels, "position_ids": torch.from_numpy(batch.position_ids[0])}


def pad(rows: Sequence[dict[str, torch.Tensor]], padding: int) -> dict[str, torch.Tensor]:
    """Return `(B, T)` tensors, as wide as ours."""
    longest = max(len(row["input_ids"]) for row in rows)
    width = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    ids = torch.full((len(rows), width), padding)
    labels = torch.full((len(rows), width), IGNORED)
    for number, row in enumerate(rows):
        ids[number, : len(row["input_ids"])] = row["input_ids"]
        labels[number, : len(row["labels"])] = row["labels"]
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(width).expand(len(rows), width)}


def run_trainer(run: Run, way: str, turns: Turns, open_base: Callable[[], Any], place: tuple[Path, Path]) -> None:
    """Train with transformers' Trainer, which gets the DeepSpeed configuration that our engine got.

    It logs in the warm-up alone, whereas our loop logs every step: Trainer at its cheapest.
    """
    profile, (named, folder) = run.profile, place
    steps = sum(count for one, count in zip(turns.order, turns.steps, strict=True) if one == way)
    config = plan_deepspeed(
        profile,
        parse_deepspeed_json(named.read_text(), named.name),
        ranks=run.world_size,
        accumulation_steps=run.accumulation_steps,
        total_steps=run.total_steps,
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / way), deepspeed=config, use_cpu=True, ddp_backend=torch.distributed.get_backend(),
        per_device_train_batch_size=profile.per_device_train_batch_size,
        gradient_accumulation_steps=run.accumulation_steps, max_steps=steps + 1, seed=0,
        learning_rate=profile.learning_rate, warmup_steps=profile.warmup_steps,
        lr_scheduler_type="constant_with_warmup", adam_beta1=profile.adam_beta1, adam_beta2=profile.adam_beta2,
        adam_epsilon=profile.adam_epsilon, weight_decay=profile.weight_decay, max_grad_norm=profile.max_grad_norm,
        bf16=profile.dtype == "bf16", train_sampling_strategy="sequential", remove_unused_columns=False,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip

    class Gate(transformers.TrainerCallback):
        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:  # noqa: ANN401
            if state.global_step == WARM_STEPS:
                state.logging_steps = NEVER
            if not control.should_log:  # else the line comes with on_log
                turns.step(way, {})

        def on_log(self, _: Any, __: Any, ___: Any, logs: dict[str, Any], **____: Any) -> None:  # noqa: ANN401
            turns.step(way, {"loss": float(logs["loss"]), "grad_norm": float(logs["grad_norm"])})

    padding = int(run.shards.special["pad"])
    trainer = transformers.Trainer(
        model=open_base(), args=arguments, train_dataset=dataset_of(run, steps + 1),
        data_collator=lambda rows: pad(rows, padding), callbacks=[Gate()],
    )  # fmt: skip
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()


def filled(run: Run) -> float:
    """Return which share of the positions that an epoch computes holds a token, on this rank."""
    batches = [batch for step in range(1, run.epoch_steps[0] + 1) for batch in run.batches(run.rank_rows(step))]
    return float(sum((batch.sources >= 0).sum() for batch in batches) / sum(batch.sources.size for batch in batches))


def plan_turns(ways: Sequence[str], rounds: int, steps: int) -> tuple[list[str], list[int]]:
    """Return whose turn it is, and how many steps it makes: one untimed turn each, then rounds, every second backwards.

    Steps of the other ways hold several times the tokens, so they make half as many.
    """
    order = list(ways)
    for number in range(rounds):
        order += reversed(ways) if number % 2 else ways
    warm = [WARM_STEPS if way in COMPARED else SHORT_WARM_STEPS for way in ways]
    return order, warm + [steps if way in COMPARED else max(1, steps // 2) for way in order[len(ways) :]]


def in_thread(act: Callable[[], None], turns: Turns, way: str) -> threading.Thread:
    """Start a loop that waits for its first turn; its failure ends the process, since the others wait for it."""

    def go() -> None:
        try:
            turns.begin(way)
            act()
        except DoneError:
            pass
        except BaseException:  # noqa: BLE001 - told and passed on as the exit code
            traceback.print_exc()
            os._exit(1)

    thread = threading.Thread(target=go, name=way)
    thread.start()
    return thread


def main(root: Path, rounds: int, steps: int, folder: Path) -> None:
    """Train in turns and write the figures."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel("ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    name, whole = load_profile(root / "params.yaml")
    workspace, profile = Workspace(root, name), whole.reading((*READS["train"], *UNHASHED))
    # Trainer divides by the step's supervised tokens over all ranks; ours does the same when told so.
    profile = profile.model_copy(update={"loss_normalisation": "token", "eval_steps": NEVER, "save_steps": SAVE_STEPS})
    padded = profile.model_copy(update={"save_steps": NEVER})
    wide = {"per_device_train_batch_size": WIDE_ROWS, "global_batch_size": WIDE_ROWS * int(os.environ["WORLD_SIZE"])}
    packed = padded.model_copy(update={"layout": "packed"})
    init_distributed()
    watchdog = Watchdog(limit_seconds=None)
    runs: dict[str, Run] = {}
    heads, device = Heads.of(read_config(workspace.base, {})), torch.device("cpu")

    def ours(way: str, chosen: Profile) -> Callable[[], None]:
        def act() -> None:
            runs[way] = open_run(workspace, chosen, choose_attention(chosen, heads, device), universal=False)
            runs[way].heartbeat = watchdog.heartbeat
            run_ours(runs[way], way, turns, folder)

        return act

    def theirs() -> None:
        place = (root / profile.deepspeed_config, folder)
        attention = choose_attention(profile, heads, device)
        run_trainer(runs["ours"], "trainer", turns, lambda: open_model(workspace.base, profile, attention), place)

    loops = {
        "ours": ours("ours", profile),
        "trainer": theirs,
        "packed": ours("packed", packed),
        "padded_wide": ours("padded_wide", padded.model_copy(update=wide)),
        "packed_wide": ours("packed_wide", packed.model_copy(update=wide)),
    }
    turns = Turns(*plan_turns(tuple(loops), rounds, steps))
    for thread in [in_thread(act, turns, way) for way, act in loops.items()]:
        thread.join()
    watchdog.stop()
    if torch.distributed.get_rank() == 0:
        facts = {
            "turns": [asdict(turn) for turn in turns.done[len(loops) :]],
            "first": {way: turns.lines[way][:WARM_STEPS] for way in COMPARED},
            "saves": turns.saves,
            "save_steps": whole.save_steps,
            "dtype": profile.dtype,
            "threads_per_rank": torch.get_num_threads(),
            "micro_batch_rows": {way: run.profile.per_device_train_batch_size for way, run in runs.items()},
            "rows_per_step": {way: run.profile.global_batch_size for way, run in runs.items()},
            "filled": {way: filled(run) for way, run in runs.items()},
        }
        (folder / "figures.json").write_text(json.dumps(facts))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
