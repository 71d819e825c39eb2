"""Stage evaluate: scores the exported model and its base, loaded as a user loads them; writes scores and tables.

It imports nothing of ropeway.stages.train: it measures the model that is shipped.

eval.json                  loss, perplexity, accuracy, nats/byte per source and model; positions, a summary of passkey
                           retrieval; long context by kind and length; tasks of lm-evaluation-harness
samples.json               answers of base and tuned model, in the JSON of Open-Assistant's sampling reports
tables/*.csv               scores, positions, passkey (share by length), passkey_answers (every answer), and where
                           params ask for it long_context (score by kind and length), long_context_answers
"""

import csv
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import numpy as np

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import EvaluateParams
from ropeway.data.batches import collate
from ropeway.data.shards import Shards, open_shards
from ropeway.models.answer_parts import ParsedAnswer
from ropeway.models.chat_template import open_prompt_template, open_template
from ropeway.models.open_model import load_tokenizer
from ropeway.runtime.manifest import digest_of, load_manifest, whole_folder, write_json, write_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.evaluate import long_context, passkey, positions
from ropeway.stages.evaluate.evaluation_workers import SINGLE_PROCESS, plan_workers
from ropeway.stages.evaluate.load_model import check_data
from ropeway.stages.evaluate.measuring import EvalRequest, ModelResult, measure_folder
from ropeway.stages.evaluate.passkey import PasskeyAnswer
from ropeway.stages.evaluate.samples import (
    Prompt,
    encode_prompt,
    parse_generation_configs,
    parse_prompts,
    plan_samples,
    report_samples,
)
from ropeway.stages.evaluate.tasks import harness_version, open_tasks, report_tasks
from ropeway.stages.evaluate.text import count_bytes
from ropeway.stages.evaluate.token_scores import Score, all_rows, check_supervised

Table = Sequence[Mapping[str, object]]
SECTIONS = ("losses", "positions", "passkey", "long_context", "tasks")  # of eval.json, as the gate names them


def run(workspace: Workspace, profile: EvaluateParams) -> None:
    """Measure base and tuned model, then write all files.

    Raises:
        DataError: Data, base and model are not of one run, a source has no supervised validation token, or a loss is
            not finite.
        ConfigError: A file or task in `evaluation` is missing or malformed, or a length of passkeys or long context is
            too short.
        TemporaryError: A task's dataset could not be downloaded, or a worker was killed; nothing was written.
    """
    _check_models(workspace)
    prompts, request = plan_request(workspace, profile)
    check_data(workspace.model, request.shards)
    found = measure_both(workspace, request)
    scores = {name: one.scores for name, one in found.items()}
    measured = report_scores(request.shards, profile, scores, tokenizer_folder=workspace.base)
    asked_in = {name: open_prompt_template(folder).name for name, folder in _folders(workspace)}
    differing = {"asked_in": asked_in} if len(set(asked_in.values())) > 1 else {}
    if differing:
        print(f"questions and prompts: the base was asked in {asked_in['base']} template, tuned in {asked_in['tuned']}")
    report = {**measured, **differing, **report_skills(request, found, identify_sections(workspace, request))}
    write_json(workspace.evaluation, report)
    _write_samples(workspace, request, prompts, {name: one.answers for name, one in found.items()})
    lines = positions.table_positions(_name_curves(found), profile.evaluation.positions)
    tables = plan_tables(measured["sources"], lines, {name: one.passkeys for name, one in found.items()})
    if request.long_context:
        answers = {name: one.long_context for name, one in found.items()}
        tables["long_context"] = long_context.table_long_context(answers)
        tables["long_context_answers"] = list(long_context.table_long_answers(answers))
    write_tables(workspace.tables, tables)
    print(f"{len(request.samples)} sample answers per model in {workspace.samples}; tables in {workspace.tables}")


def plan_request(workspace: Workspace, profile: EvaluateParams) -> tuple[list[Prompt], EvalRequest]:
    """Return the prompts and the request: all of this stage that needs no trained model."""
    frozen, wanted = FrozenInputs.load(workspace.root), profile.evaluation
    prompts = parse_prompts(frozen.text("prompts", wanted.prompts), wanted.prompts)
    configurations = {
        name: {**arguments, "max_new_tokens": wanted.max_new_tokens}
        for name, arguments in parse_generation_configs(
            frozen.text("prompts", wanted.sampling), wanted.sampling
        ).items()
    }
    request = plan_measurements(workspace, profile)
    check_data(workspace.base, request.shards)
    return prompts, replace(request, samples=plan_samples(prompts, configurations), configurations=configurations)


def plan_measurements(
    workspace: Workspace, profile: EvaluateParams, sections: Collection[str] = SECTIONS
) -> EvalRequest:
    """Return the request for sections of eval.json, without sample answers."""
    shards, wanted = open_shards(workspace.data), profile.evaluation
    return EvalRequest(
        shards=shards,
        profile=profile,
        losses="losses" in sections,
        long_rows=positions.plan_long_rows(shards, profile) if "positions" in sections else (),
        questions=passkey.plan_passkey_questions(wanted.passkey, seed=profile.rng_seed)
        if "passkey" in sections
        else (),
        long_context=long_context.plan_long_context(wanted.long_context, seed=profile.rng_seed)
        if "long_context" in sections
        else (),
        tasks=open_tasks(wanted.tasks, workspace.root, workspace.tasks) if "tasks" in sections else None,
    )


def check_request(workspace: Workspace, profile: EvaluateParams) -> None:
    """Check params, prompts, tasks, tokenizer and data before training, with the errors that `run` would raise."""
    prompts, request = plan_request(workspace, profile)
    check_supervised(request.shards, profile)
    tokenizer = load_tokenizer(workspace.base)
    for template in (open_template(workspace.base), open_prompt_template(workspace.base)):  # of tuned model and base
        for prompt in prompts:
            encode_prompt(tokenizer, template, prompt)
        for question in request.questions[:1]:  # the shortest
            passkey.encode_passkey_question(tokenizer, template, question)
        for puzzle in request.long_context:
            if puzzle.length == request.long_context[0].length:  # the shortest
                long_context.encode_long_context(tokenizer, template, puzzle)


def measure_both(workspace: Workspace, request: EvalRequest) -> dict[str, ModelResult]:
    """Return the results of base and tuned model, measured one after the other."""
    gpus = plan_workers()
    found = {}
    for name, folder in _folders(workspace):
        found[name] = one = measure_folder(folder, workspace.model, request, gpus=gpus, name=name)
        for source, score in zip(request.shards.sources, one.scores, strict=True):
            print(f"{name:>5} on {source.name}: {score.loss:.4f} nats/token over {score.tokens:,} tokens")
        print(
            f"{name:>5} passkey retrieval: {sum(key.is_correct for key in one.passkeys)} of {len(one.passkeys)} correct"
        )
        if one.long_context:
            mean = sum(answer.score for answer in one.long_context) / len(one.long_context)
            print(f"{name:>5} on long context: score {mean:.3f} of 1 in {len(one.long_context)} questions")
        for task, result in one.tasks.items():
            print(
                f"{name:>5} on task {task}: {', '.join(f'{key} {value:.4f}' for key, value in result.metrics.items())}"
            )
    return found


def _write_samples(
    workspace: Workspace, request: EvalRequest, prompts: Sequence[Prompt], answers: Mapping[str, Sequence[ParsedAnswer]]
) -> None:
    trained = load_manifest(workspace.model, remedy="Run `dvc repro train`", verify=False)
    args = {
        "prompts": request.profile.evaluation.prompts,
        "config": request.profile.evaluation.sampling,
        "max_new_tokens": request.profile.evaluation.max_new_tokens,
        "rng_seed": request.profile.rng_seed,
        "template": open_template(workspace.model).digest,
    }
    name = f"{workspace.profile}-{trained['steps']}"
    report = report_samples(name, prompts, request.configurations, answers, args)
    write_json(workspace.samples, report)


def identify_sections(workspace: Workspace, request: EvalRequest) -> dict[str, str]:
    """Return section of eval.json -> digest of what it measures; two models can be compared where it is equal."""
    profile, tasks = request.profile, FrozenInputs.load(workspace.root).value("tasks")
    identities = {
        "positions": positions.identify_rows(request.long_rows, profile.evaluation.positions, profile.max_length),
        "passkey": passkey.identify_questions(request.questions),
        "long_context": long_context.identify_long_context(request.long_context),
    }
    return identities | ({"tasks": digest_of(tasks)} if request.tasks else {})


def report_skills(
    request: EvalRequest, found: Mapping[str, ModelResult], identities: Mapping[str, str]
) -> dict[str, object]:
    """Return the other sections of eval.json, as far as they were requested."""
    report: dict[str, object] = {}
    if request.long_rows:
        wanted, border = request.profile.evaluation.positions, request.profile.max_length
        report["positions"] = positions.report_positions(_name_curves(found), wanted, border)
    if request.questions:
        report["passkey"] = passkey.report_passkey({name: one.passkeys for name, one in found.items()})
    if request.long_context:
        report["long_context"] = long_context.report_long_context({n: one.long_context for n, one in found.items()})
    if request.tasks:
        report["tasks"] = report_tasks({name: one.tasks for name, one in found.items()})
        report["harness"] = f"lm_eval {harness_version(request.tasks.names)}"
    return {**report, "identities": {name: one for name, one in identities.items() if name in report}}


def _name_curves(found: Mapping[str, ModelResult]) -> dict[str, list[Score]]:
    return {f"{name}{kind}": curve for name, one in found.items() for kind, curve in one.curves.items()}


class ScoreReport(TypedDict):
    """The validation section of eval.json: metrics by source and model, and the mean loss by model."""

    sources: dict[str, dict[str, dict[str, float]]]
    mean: dict[str, float]
    validation: str
    tokenizer: str
    rows: int


def report_scores(
    shards: Shards, profile: EvaluateParams, scores: dict[str, list[Score]], *, tokenizer_folder: Path
) -> ScoreReport:
    """Return metrics by source and model, the mean loss over sources, and the identity of the rows.

    The tokenizer must be that of the shards; the size of the text in bytes is decoded with it.
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


def validation_digest(shards: Shards, profile: EvaluateParams) -> str:
    """Return a digest of tokens, targets and masks of all validation rows: scores with equal digests are comparable."""
    rows = []
    for row in all_rows(shards, profile):
        batch = collate([row], shards, profile, pad_to_multiple_of=None)
        parts = (batch.input_ids, np.where(batch.loss_mask, batch.targets, -1), batch.loss_mask.astype(np.int64))
        digest = hashlib.sha256(np.concatenate(parts, axis=1).astype("<i8").tobytes()).hexdigest()
        rows.append([shards.sources[row[0].source].name, digest])
    return digest_of(sorted(rows))


def plan_tables(
    sources: Mapping[str, Mapping[str, Mapping[str, float]]], curves: Table, keys: Mapping[str, Sequence[PasskeyAnswer]]
) -> dict[str, Table]:
    """Return name -> lines of each CSV file in tables/."""
    scores = [
        {"source": source, "model": model, **metrics}
        for source, models in sources.items()
        for model, metrics in models.items()
    ]
    return {
        "scores": scores,
        "positions": curves,
        "passkey": passkey.table_lengths(keys),
        "passkey_answers": list(passkey.table_answers(keys)),
    }


def write_tables(target: Path, tables: Mapping[str, Table]) -> None:
    """Write the folder of CSV files atomically."""
    with whole_folder(target) as folder:
        for name, lines in tables.items():
            with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                names = dict.fromkeys(name for line in lines for name in line)  # no nats/byte without supervised text
                writer = csv.DictWriter(file, list(names), lineterminator="\n")
                writer.writeheader()
                writer.writerows(lines)
        write_manifest(folder, {})


def score_first_rows(workspace: Workspace, profile: EvaluateParams, *, limit: int) -> list[dict[str, object]]:
    """Return the scores of base and tuned model on the first `limit` validation rows of each source; write nothing.

    Raises:
        DataError: The model is not trained, or as in `check_data` and `measure_folder`.
    """
    _check_models(workspace)
    shards = first_rows(open_shards(workspace.data), limit)
    sizes = count_bytes(shards, profile, workspace.base)
    rows: list[dict[str, object]] = []
    for name, folder in _folders(workspace):
        check_data(folder, shards)
        scores = measure_folder(
            folder, workspace.model, EvalRequest(shards, profile), gpus=SINGLE_PROCESS, name=name
        ).scores
        for source, score, size in zip(shards.sources, scores, sizes, strict=True):
            rows.append({"source": source.name, "model": name, **score.metrics(size)})
    return sorted(rows, key=lambda row: (str(row["source"]), str(row["model"])))


def _folders(workspace: Workspace) -> tuple[tuple[str, Path], ...]:
    return ("base", workspace.base), ("tuned", workspace.model)


def _check_models(workspace: Workspace) -> None:
    """Raise DataError unless base and trained model are complete and unchanged."""
    load_manifest(workspace.base, remedy="Run `dvc repro base`")
    load_manifest(workspace.model, remedy="Run `dvc repro train`")


def first_rows(shards: Shards, limit: int) -> Shards:
    """Return the shards with at most `limit` validation rows per source."""
    return replace(
        shards,
        sources=tuple(replace(source, validation=source.validation[:limit]) for source in shards.sources),
    )
