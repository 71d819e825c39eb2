"""All scores and answers of one model, measured by one process or by several."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ropeway.config.params import EvaluateParams
from ropeway.data.shards import Shards
from ropeway.models.answer_parts import ParsedAnswer
from ropeway.models.chat_template import open_prompt_template
from ropeway.stages.evaluate.evaluation_workers import GpuAssignment, Share, merge_shares, run_shares
from ropeway.stages.evaluate.load_model import (
    GENERATE_SINGLE_THREADED_BELOW,
    SCORE_SINGLE_THREADED_BELOW,
    cpu_threads_for,
    open_model,
)
from ropeway.stages.evaluate.long_context import LongContextAnswer, LongContextQuestion, answer_long_context
from ropeway.stages.evaluate.passkey import PasskeyAnswer, PasskeyQuestion, answer_questions
from ropeway.stages.evaluate.positions import LongRow, score_positions, sum_positions
from ropeway.stages.evaluate.samples import GenerationConfigs, Prompt, generate_samples, stop_ids
from ropeway.stages.evaluate.tasks import Tasks, TaskScore, run_tasks
from ropeway.stages.evaluate.token_scores import Score, Sums, score_sources, sum_batches


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """What to measure of each model."""

    shards: Shards  # the validation rows to score
    profile: EvaluateParams  # the params that evaluate reads
    losses: bool = True  # whether the validation rows are scored
    long_rows: Sequence[LongRow] = ()  # for losses by position; empty: not measured
    questions: Sequence[PasskeyQuestion] = ()  # passkey retrieval; empty: not measured
    long_context: Sequence[LongContextQuestion] = ()  # questions on long texts; empty: not measured
    samples: Sequence[tuple[Prompt, str]] = ()  # (prompt, configuration) of each sample answer; empty: not generated
    configurations: GenerationConfigs = field(default_factory=dict)  # name -> arguments of `generate`
    tasks: Tasks | None = None  # of lm-evaluation-harness; None: not measured


@dataclass(frozen=True, slots=True)
class ShareResult:
    """The results of one share, per item: sums are taken only once the results of all shares are there."""

    batches: list[Sums]
    positions: list[tuple[str, Sums]]
    passkeys: list[PasskeyAnswer]
    long_context: list[LongContextAnswer]
    answers: list[ParsedAnswer]
    tasks: list[dict[str, TaskScore]]


@dataclass(frozen=True, slots=True)
class ModelResult:
    """All results of one model.

    Attributes:
        curves: `""` and, where the model has a RoPE scaling, `_unscaled` -> one score per bucket of positions.
    """

    scores: list[Score]  # one per source; empty if not requested
    curves: dict[str, list[Score]]
    passkeys: list[PasskeyAnswer]  # one per passkey question
    long_context: list[LongContextAnswer]  # one per question on a long text
    answers: list[ParsedAnswer]  # one per sample
    tasks: dict[str, TaskScore]  # one per task of the harness; empty where params name none


def measure_folder(folder: Path, like: Path, request: EvalRequest, *, gpus: GpuAssignment, name: str) -> ModelResult:
    """Return all results of the model in a folder; bit-identical for any number of processes.

    `like` is as in `open_model`; error messages call the model `name`.

    Raises:
        DataError: A source has no supervised validation token, or its loss is not finite.
        ConfigError: A length of passkeys or long context is shorter than the question alone.
        TemporaryError: A worker process was killed.
    """
    parts = run_shares(measure_share, (folder, like, _without_memory_maps(request)), gpus)
    sums = merge_shares([part.batches for part in parts])
    return ModelResult(
        scores=score_sources(sums, request.shards, name=name) if request.losses else [],
        curves=score_positions(merge_shares([part.positions for part in parts])),
        passkeys=merge_shares([part.passkeys for part in parts]),
        long_context=merge_shares([part.long_context for part in parts]),
        answers=merge_shares([part.answers for part in parts]),
        tasks=dict(sorted(item for one in merge_shares([part.tasks for part in parts]) for item in one.items())),
    )


def measure_share(folder: Path, like: Path, request: EvalRequest, share: Share) -> ShareResult:
    """Open a model and measure one share of the request."""
    model, tokenizer = open_model(folder, like=like)
    template = open_prompt_template(folder)
    model.config.eos_token_id = stop_ids(model, tokenizer, template)
    wanted, seed = request.profile.evaluation, request.profile.rng_seed
    with cpu_threads_for(model, single_threaded_below=SCORE_SINGLE_THREADED_BELOW):
        batches = sum_batches(model, request.shards, request.profile, share=share) if request.losses else []
        positions = sum_positions(model, request.long_rows, wanted.positions, share=share)
    with cpu_threads_for(model, single_threaded_below=GENERATE_SINGLE_THREADED_BELOW):
        passkeys = answer_questions(model, tokenizer, template, share.of(request.questions), seed=seed)
        long_context = answer_long_context(model, tokenizer, template, share.of(request.long_context), seed=seed)
        answers = generate_samples(
            model, tokenizer, template, share.of(request.samples), request.configurations, seed=seed
        )
        tokenizer.chat_template = template.jinja  # the harness asks in it, too
        tasks = run_harness_tasks(model, tokenizer, request, share)
    return ShareResult(batches, positions, passkeys, long_context, answers, tasks)


def run_harness_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: EvalRequest, share: Share
) -> list[dict[str, TaskScore]]:
    """Return the scores of each task in a share; call it last, since the harness changes the generation settings.

    One task at a time: the harness batches questions of different tasks together, so that the scores of a task would
    depend on the other tasks.
    """
    if request.tasks is None:
        return []
    profile = request.profile
    return [
        run_tasks(
            model,
            tokenizer,
            replace(request.tasks, names=(name,)),
            batch_size=profile.per_device_eval_batch_size,
            max_length=profile.max_length,
            seed=profile.rng_seed,
        )
        for name in share.of(request.tasks.names)
    ]


def _without_memory_maps(request: EvalRequest) -> EvalRequest:
    """Return the request without memory maps: pickling a map would copy the whole file."""
    sources = tuple(replace(source, train=source.train[:0], _open={}) for source in request.shards.sources)
    return replace(request, shards=replace(request.shards, sources=sources))
