"""Opens base and tuned, one after the other, measures them and writes eval.json, samples and plots."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ropeway.chat import template_digest
from ropeway.errors import DataError
from ropeway.evaluate import passkey, positions
from ropeway.evaluate.opening import MEASURED_ON_ONE, SAMPLED_ON_ONE, check_data, open_model, threads_for
from ropeway.evaluate.page import draw_page
from ropeway.evaluate.passkey import Answered
from ropeway.evaluate.plots import plan_tables, read_steps, write_plots
from ropeway.evaluate.positions import LongRow
from ropeway.evaluate.samples import report_samples, sample
from ropeway.evaluate.sampling import Configurations, read_configurations, read_prompts
from ropeway.evaluate.scores import Score, all_rows, measure
from ropeway.evaluate.tasks import Tasks, TaskScore, find_harness, open_tasks, report_tasks, run_tasks
from ropeway.evaluate.text import count_bytes
from ropeway.manifest import digest_of, load_manifest, write_atomic, write_json
from ropeway.params import Profile
from ropeway.rows import collate
from ropeway.shards import Shards, open_shards
from ropeway.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Asked:
    """What every model is measured on."""

    shards: Shards
    long_rows: list[LongRow]
    prompts: list[str]
    configurations: Configurations
    tasks: Tasks | None


@dataclass(frozen=True, slots=True)
class Found:
    """What one model came to.

    Attributes:
        scores: One per source.
        curves: `""` and, where the model has a scaling, `_unscaled` -> one score per bucket of positions.
        keys: An answer to every passkey question.
        answers: For each prompt, configuration -> answer.
        tasks: A score per task of the harness; none where params name none.
    """

    scores: list[Score]
    curves: dict[str, list[Score]]
    keys: list[Answered]
    answers: list[dict[str, str]]
    tasks: dict[str, TaskScore]


def write_report(workspace: Workspace, profile: Profile) -> None:
    """Measure base and tuned and write all files.

    Raises:
        DataError: As in `check_data`, `measure`, `plan_long_rows` and `encode_prompt`.
        ConfigError: As in `read_prompts`, `read_configurations`, `open_tasks` and `encode_question`.
        TemporaryError: As in `open_tasks`.
    """
    asked, steps = plan_report(workspace, profile)
    found = {
        name: measure_model(name, folder, workspace, profile, asked)
        for name, folder in (("base", workspace.base), ("tuned", workspace.model))
    }
    scores = {name: one.scores for name, one in found.items()}
    curves = {f"{name}{kind}": curve for name, one in found.items() for kind, curve in one.curves.items()}
    keys = {name: one.keys for name, one in found.items()}
    wanted = profile.evaluation.positions
    report = {
        **report_scores(asked.shards, profile, scores, tokenizer_folder=workspace.base),
        "positions": positions.report_positions(curves, wanted, profile.max_length),
        "passkey": passkey.report_passkey(keys),
    }
    if asked.tasks:
        report["tasks"] = report_tasks({name: one.tasks for name, one in found.items()})
        report["harness"] = f"lm_eval {find_harness(asked.tasks.names)}"
    write_json(workspace.evaluation, report)
    samples = write_samples(workspace, profile, asked, {name: one.answers for name, one in found.items()})
    tables = plan_tables(report["sources"], positions.table_positions(curves, wanted), keys)
    write_plots(workspace.plots, tables, steps, keys, max_length=profile.max_length)
    count = len(asked.prompts) * len(asked.configurations)
    print(f"{count} sample answers per model, {samples}; plots in {workspace.plots}")


def plan_report(workspace: Workspace, profile: Profile) -> tuple[Asked, Sequence[Mapping[str, Any]]]:
    """Return what is measured, and the lines of steps.csv; whatever is wrong is said before a model is opened."""
    prompts = read_prompts(workspace.root / profile.evaluation.prompts)
    configurations = {
        name: {**arguments, "max_new_tokens": profile.evaluation.max_new_tokens}
        for name, arguments in read_configurations(workspace.root / profile.evaluation.sampling).items()
    }
    load_manifest(workspace.base, remedy="Run `dvc checkout`, or `dvc repro base`")
    load_manifest(workspace.model, remedy="Run `dvc checkout`, or `dvc repro train`")
    if not workspace.steps.is_file():
        raise DataError(f"{workspace.steps}: not found. Run `dvc checkout`, or `dvc repro train`")
    shards = open_shards(workspace.data)
    for folder in (workspace.base, workspace.model):
        check_data(folder, shards)
    long_rows = positions.plan_long_rows(shards, profile)
    tasks = open_tasks(profile.evaluation.tasks, workspace.root, workspace.tasks)
    asked = Asked(shards, long_rows, prompts, configurations, tasks)
    return asked, read_steps(workspace.steps)


def measure_model(name: str, folder: Path, workspace: Workspace, profile: Profile, asked: Asked) -> Found:
    """Open one model, measure it and let it go."""
    model, tokenizer = open_model(folder, like=workspace.model)
    wanted, seed = profile.evaluation, profile.rng_seed
    with threads_for(model, one_below=MEASURED_ON_ONE):
        scores = measure(model, asked.shards, profile, name=name)
        curves = positions.measure_positions(model, asked.long_rows, wanted.positions)
    with threads_for(model, one_below=SAMPLED_ON_ONE):
        keys = passkey.ask(model, tokenizer, wanted.passkey, seed=seed)
        answers = sample(model, tokenizer, asked.prompts, asked.configurations, seed=seed)
        tasks = ask_harness(model, tokenizer, asked.tasks, profile) if asked.tasks else {}
    for source, score in zip(asked.shards.sources, scores, strict=True):
        print(f"{name:>5} on {source.name}: {score.loss:.4f} nats/token over {score.tokens:,} tokens")
    print(f"{name:>5} finds {sum(one.right for one in keys)} of {len(keys)} hidden keys")
    for task, result in tasks.items():
        print(f"{name:>5} in {task}: {', '.join(f'{key} {value:.4f}' for key, value in result.metrics.items())}")
    return Found(scores, curves, keys, answers, tasks)


def ask_harness(model: Any, tokenizer: Any, tasks: Tasks, profile: Profile) -> dict[str, TaskScore]:  # noqa: ANN401
    """Return a score per task, last of all: the harness changes what a model generates by default."""
    size = profile.per_device_eval_batch_size
    return run_tasks(model, tokenizer, tasks, batch_size=size, max_length=profile.max_length, seed=profile.rng_seed)


def write_samples(
    workspace: Workspace, profile: Profile, asked: Asked, answers: Mapping[str, Sequence[Mapping[str, str]]]
) -> str:
    """Write samples.json and samples.html; return where people look."""
    trained = load_manifest(workspace.model, remedy="Run `dvc repro train`", verify=False)
    args = {
        "prompts": profile.evaluation.prompts,
        "config": profile.evaluation.sampling,
        "max_new_tokens": profile.evaluation.max_new_tokens,
        "rng_seed": profile.rng_seed,
        "template": template_digest(),
    }
    name = f"{workspace.profile}-{trained['steps']}"
    report = report_samples(name, asked.prompts, asked.configurations, answers, args)
    write_json(workspace.samples, report)
    write_atomic(workspace.samples_page, draw_page(report).encode())
    return str(workspace.samples_page)


def report_scores(
    shards: Shards, profile: Profile, scores: dict[str, list[Score]], *, tokenizer_folder: Path
) -> dict[str, Any]:
    """Return eval.json: metrics per source and model, their mean over sources, and which rows were measured.

    Args:
        shards: Whose validation rows were measured.
        profile: What counts of them.
        scores: Model -> one score per source.
        tokenizer_folder: Holds the tokenizer that made the shards; it says how many bytes the losses were paid for.
    """
    sizes = count_bytes(shards, profile, tokenizer_folder)
    return {
        "sources": {
            source.name: {name: scores[name][number].metrics(size) for name in scores}
            for number, (source, size) in enumerate(zip(shards.sources, sizes, strict=True))
        },
        "mean": {name: round(sum(score.loss for score in found) / len(found), 6) for name, found in scores.items()},
        "validation": validation_digest(shards, profile),
        "tokenizer": shards.manifest["tokenizer"],
        "rows": len(all_rows(shards, profile)),
    }


def validation_digest(shards: Shards, profile: Profile) -> str:
    """Return the identity of what was measured: tokens, targets and mask of every row, in any order.

    Two versions may be compared when theirs agree.
    """
    rows = []
    for row in all_rows(shards, profile):
        batch = collate([row], shards, profile, pad_to_multiple_of=None)
        parts = (batch.input_ids, np.where(batch.loss_mask, batch.targets, -1), batch.loss_mask.astype(np.int64))
        digest = hashlib.sha256(np.concatenate(parts, axis=1).astype("<i8").tobytes()).hexdigest()
        rows.append([shards.sources[row[0].source].name, digest])
    return digest_of(sorted(rows))
