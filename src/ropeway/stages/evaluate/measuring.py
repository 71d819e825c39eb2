"""What one model comes to on everything it is asked, by one process or shared out among several."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ropeway.config.params import EvaluateParams
from ropeway.data.shards import Shards
from ropeway.models.chat_template import open_template
from ropeway.stages.evaluate.evaluation_workers import Cards, Share, gather, share_out
from ropeway.stages.evaluate.opening import MEASURED_ON_ONE, SAMPLED_ON_ONE, open_model, threads_for
from ropeway.stages.evaluate.passkey import Answered, Question, ask
from ropeway.stages.evaluate.positions import LongRow, score_positions, sum_positions
from ropeway.stages.evaluate.samples import Configurations, sample
from ropeway.stages.evaluate.tasks import Tasks, TaskScore, run_tasks
from ropeway.stages.evaluate.token_scores import Score, Sums, score_sources, sum_batches


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """What every model is measured on."""

    shards: Shards  # their validation rows are scored
    profile: EvaluateParams  # as evaluate reads it
    long_rows: Sequence[LongRow] = ()  # for the losses by position; none: not asked
    questions: Sequence[Question] = ()  # hidden keys; none: not asked
    draws: Sequence[tuple[str, str]] = ()  # (prompt, configuration) -> one answer each; none: not asked
    configurations: Configurations = field(default_factory=dict)  # name -> arguments of `generate`
    tasks: Tasks | None = None  # of the harness; None: not asked


@dataclass(frozen=True, slots=True)
class ShareResult:
    """What a share of it came to, item by item: nothing is added up before all shares lie side by side."""

    batches: list[Sums]
    positions: list[tuple[str, Sums]]
    keys: list[Answered]
    answers: list[str]
    tasks: list[dict[str, TaskScore]]


@dataclass(frozen=True, slots=True)
class ModelResult:
    """What one model came to.

    Attributes:
        curves: `""` and, where the model has a scaling, `_unscaled` -> one score per bucket of positions.
    """

    scores: list[Score]  # one per source
    curves: dict[str, list[Score]]
    keys: list[Answered]  # an answer to every passkey question
    answers: list[str]  # one per draw
    tasks: dict[str, TaskScore]  # a score per task of the harness; none where params name none


def measure_folder(folder: Path, like: Path, asked: EvalRequest, *, cards: Cards, name: str) -> ModelResult:
    """Return what the model in a folder comes to; the same, bit by bit, whatever the number of processes.

    `like` is as in `open_model`; errors call the model `name`.

    Raises:
        DataError: A source has no supervised validation token, or its loss is not finite.
        ConfigError: A passkey length has no room for the question.
        TemporaryError: A process was killed.
    """
    parts = share_out(measure_share, (folder, like, _without_files(asked)), cards)
    sums = gather([part.batches for part in parts])
    return ModelResult(
        scores=score_sources(sums, asked.shards, name=name),
        curves=score_positions(gather([part.positions for part in parts])),
        keys=gather([part.keys for part in parts]),
        answers=gather([part.answers for part in parts]),
        tasks=dict(sorted(item for one in gather([part.tasks for part in parts]) for item in one.items())),
    )


def measure_share(folder: Path, like: Path, asked: EvalRequest, share: Share) -> ShareResult:
    """Open a model, measure it on a share of what is asked and let it go."""
    model, tokenizer = open_model(folder, like=like)
    template = open_template(folder)
    wanted, seed = asked.profile.evaluation, asked.profile.rng_seed
    with threads_for(model, one_below=MEASURED_ON_ONE):
        batches = sum_batches(model, asked.shards, asked.profile, share=share)
        positions = sum_positions(model, asked.long_rows, wanted.positions, share=share)
    with threads_for(model, one_below=SAMPLED_ON_ONE):
        keys = ask(model, tokenizer, template, share.of(asked.questions), seed=seed)
        answers = sample(model, tokenizer, template, share.of(asked.draws), asked.configurations, seed=seed)
        tasks = ask_harness(model, tokenizer, asked, share)
    return ShareResult(batches, positions, keys, answers, tasks)


def ask_harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: EvalRequest, share: Share
) -> list[dict[str, TaskScore]]:
    """Return the scores of each named task in a share of them, last of all: the harness changes what a model generates.

    One by one: the harness lays questions of all tasks that it is given at once into the same batches, and a task's
    figures would depend on those beside it.
    """
    if asked.tasks is None:
        return []
    profile = asked.profile
    return [
        run_tasks(
            model,
            tokenizer,
            replace(asked.tasks, names=(name,)),
            batch_size=profile.per_device_eval_batch_size,
            max_length=profile.max_length,
            seed=profile.rng_seed,
        )
        for name in share.of(asked.tasks.names)
    ]


def _without_files(asked: EvalRequest) -> EvalRequest:
    """Return the same without what this process has mapped: pickled, a map would be all its bytes."""
    sources = tuple(replace(source, train=source.train[:0], _open={}) for source in asked.shards.sources)
    return replace(asked, shards=replace(asked.shards, sources=sources))
