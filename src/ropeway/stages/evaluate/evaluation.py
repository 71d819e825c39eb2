"""Opens base and tuned, one after the other, measures them and writes eval.json, samples.json and tables."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import Profile
from ropeway.data.batches import collate
from ropeway.data.shards import Shards, open_shards
from ropeway.models.chat_template import open_template
from ropeway.runtime.manifest import digest_of, load_manifest, write_json
from ropeway.runtime.workspace import Workspace
from ropeway.stages.evaluate import passkey, positions
from ropeway.stages.evaluate.evaluation_tables import plan_tables, write_tables
from ropeway.stages.evaluate.evaluation_workers import plan_workers
from ropeway.stages.evaluate.measuring import Asked, Found, measure_folder
from ropeway.stages.evaluate.opening import check_data, open_tokenizer
from ropeway.stages.evaluate.samples import encode_prompt, plan_draws, report_samples
from ropeway.stages.evaluate.sampling import parse_configurations, parse_prompts
from ropeway.stages.evaluate.tasks import find_harness, open_tasks, report_tasks
from ropeway.stages.evaluate.text import count_bytes
from ropeway.stages.evaluate.token_scores import Score, all_rows, check_supervised


def write_report(workspace: Workspace, profile: Profile) -> None:
    """Measure base and tuned and write all files, once all is measured.

    Raises:
        DataError: As in `check_data`, `measure_folder`, `plan_long_rows` and `encode_prompt`.
        ConfigError: As in `parse_prompts`, `parse_configurations`, `open_tasks`, `encode_question` and `plan_workers`.
        TemporaryError: As in `open_tasks` and `measure_folder`.
    """
    load_manifest(workspace.base, remedy="Run `dvc checkout`, or `dvc repro base`")
    load_manifest(workspace.model, remedy="Run `dvc checkout`, or `dvc repro train`")
    prompts, asked = plan_report(workspace, profile)
    check_data(workspace.model, asked.shards)
    found = measure_both(workspace, asked)
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
    write_samples(workspace, asked, prompts, {name: one.answers for name, one in found.items()})
    tables = plan_tables(report["sources"], positions.table_positions(curves, wanted), keys)
    write_tables(workspace.tables, tables)
    print(f"{len(asked.draws)} sample answers per model in {workspace.samples}; tables in {workspace.tables}")


def plan_report(workspace: Workspace, profile: Profile) -> tuple[list[str], Asked]:
    """Return the prompts, and what is measured: everything of this stage that needs no trained model."""
    frozen, wanted = FrozenInputs.load(workspace.root), profile.evaluation
    prompts = parse_prompts(frozen.text("prompts", wanted.prompts), wanted.prompts)
    configurations = {
        name: {**arguments, "max_new_tokens": wanted.max_new_tokens}
        for name, arguments in parse_configurations(frozen.text("prompts", wanted.sampling), wanted.sampling).items()
    }
    shards = open_shards(workspace.data)
    check_data(workspace.base, shards)
    return prompts, Asked(
        shards=shards,
        profile=profile,
        long_rows=positions.plan_long_rows(shards, profile),
        questions=passkey.plan_questions(wanted.passkey, seed=profile.rng_seed),
        draws=plan_draws(prompts, configurations),
        configurations=configurations,
        tasks=open_tasks(wanted.tasks, workspace.root, workspace.tasks),
    )


def check_request(workspace: Workspace, profile: Profile) -> None:
    """Raise what would end this stage whatever the model: faults of params, prompts, tasks, tokenizer and data."""
    prompts, asked = plan_report(workspace, profile)
    check_supervised(asked.shards, profile)
    tokenizer, template = open_tokenizer(workspace.base), open_template(workspace.base)
    encode_prompt(tokenizer, template, prompts[0])
    for question in asked.questions[:1]:  # the shortest
        passkey.encode_question(tokenizer, template, question)


def measure_both(workspace: Workspace, asked: Asked) -> dict[str, Found]:
    """Return what base and tuned come to, one model after the other."""
    cards = plan_workers()
    found = {}
    for name, folder in (("base", workspace.base), ("tuned", workspace.model)):
        found[name] = one = measure_folder(folder, workspace.model, asked, cards=cards, name=name)
        for source, score in zip(asked.shards.sources, one.scores, strict=True):
            print(f"{name:>5} on {source.name}: {score.loss:.4f} nats/token over {score.tokens:,} tokens")
        print(f"{name:>5} finds {sum(key.right for key in one.keys)} of {len(one.keys)} hidden keys")
        for task, result in one.tasks.items():
            print(f"{name:>5} in {task}: {', '.join(f'{key} {value:.4f}' for key, value in result.metrics.items())}")
    return found


def write_samples(
    workspace: Workspace, asked: Asked, prompts: Sequence[str], answers: Mapping[str, Sequence[str]]
) -> None:
    """Write samples.json."""
    trained = load_manifest(workspace.model, remedy="Run `dvc repro train`", verify=False)
    args = {
        "prompts": asked.profile.evaluation.prompts,
        "config": asked.profile.evaluation.sampling,
        "max_new_tokens": asked.profile.evaluation.max_new_tokens,
        "rng_seed": asked.profile.rng_seed,
        "template": open_template(workspace.model).digest,
    }
    name = f"{workspace.profile}-{trained['steps']}"
    report = report_samples(name, prompts, asked.configurations, answers, args)
    write_json(workspace.samples, report)


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
