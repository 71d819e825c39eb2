"""Opens base and tuned, one after the other, measures them and writes eval.json and samples.json."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ropeway.chat import template_digest
from ropeway.evaluate.opening import MEASURED_ON_ONE, SAMPLED_ON_ONE, check_data, open_model, threads_for
from ropeway.evaluate.samples import CONFIGURATIONS, read_prompts, report_samples, sample
from ropeway.evaluate.scores import Score, all_rows, measure
from ropeway.evaluate.text import count_bytes
from ropeway.manifest import digest_of, load_manifest, write_json
from ropeway.params import Profile
from ropeway.rows import collate
from ropeway.shards import Shards, open_shards
from ropeway.workspace import Workspace


def write_report(workspace: Workspace, profile: Profile) -> None:
    """Measure base and tuned and write both files.

    Raises:
        DataError: As in `check_data`, `measure` and `encode_prompt`.
        ConfigError: As in `read_prompts`.
    """
    prompts = read_prompts(workspace.root / profile.evaluation.prompts)
    load_manifest(workspace.base, remedy="Run `dvc checkout`, or `dvc repro base`")
    trained = load_manifest(workspace.model, remedy="Run `dvc checkout`, or `dvc repro train`")
    shards = open_shards(workspace.data)
    for folder in (workspace.base, workspace.model):
        check_data(folder, shards)
    scores: dict[str, list[Score]] = {}
    answers = {}
    max_new_tokens = profile.evaluation.max_new_tokens
    for name, folder in (("base", workspace.base), ("tuned", workspace.model)):
        model, tokenizer = open_model(folder, like=workspace.model)
        with threads_for(model, one_below=MEASURED_ON_ONE):
            scores[name] = measure(model, shards, profile, name=name)
        with threads_for(model, one_below=SAMPLED_ON_ONE):
            answers[name] = sample(model, tokenizer, prompts, max_new_tokens=max_new_tokens, seed=profile.rng_seed)
        for source, score in zip(shards.sources, scores[name], strict=True):
            print(f"{name:>5} on {source.name}: {score.loss:.4f} nats/token over {score.tokens:,} tokens")
    write_json(workspace.evaluation, report_scores(shards, profile, scores, tokenizer_folder=workspace.base))
    args = {
        "prompts": profile.evaluation.prompts,
        "max_new_tokens": max_new_tokens,
        "rng_seed": profile.rng_seed,
        "template": template_digest(),
    }
    write_json(workspace.samples, report_samples(f"{workspace.profile}-{trained['steps']}", prompts, answers, args))
    count = len(prompts) * len(CONFIGURATIONS)
    print(f"{count} sample answers per model from {profile.evaluation.prompts}")


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
