"""Opens base and tuned, one after the other, measures them and writes eval.json and samples.json."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from ropeway.chat import JINJA, template_digest
from ropeway.errors import DataError
from ropeway.evaluate.samples import CONFIGURATIONS, read_prompts, report_samples, sample
from ropeway.evaluate.scores import Score, all_rows, measure
from ropeway.manifest import digest_of, file_sha256, load_manifest, write_json
from ropeway.params import Profile
from ropeway.rows import collate
from ropeway.shards import Shards, open_shards
from ropeway.workspace import Workspace

# Models of fewer parameters run on one CPU thread.
MEASURED_ON_ONE = 1 << 26
SAMPLED_ON_ONE = 1 << 28  # a row of one token gives a second thread still less to do


def write_report(workspace: Workspace, profile: Profile) -> None:
    """Measure base and tuned and write both files.

    Raises:
        DataError: As in `check_template`, `measure` and `encode_prompt`.
        ConfigError: As in `read_prompts`.
    """
    prompts = read_prompts(workspace.root / profile.evaluation.prompts)
    load_manifest(workspace.base, remedy="Run `dvc checkout`, or `dvc repro base`")
    trained = load_manifest(workspace.model, remedy="Run `dvc checkout`, or `dvc repro train`")
    shards = open_shards(workspace.data)
    for folder in (workspace.base, workspace.model):
        check_template(folder, shards)
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
    write_json(workspace.evaluation, report_scores(shards, profile, scores))
    args = {
        "prompts": profile.evaluation.prompts,
        "max_new_tokens": max_new_tokens,
        "rng_seed": profile.rng_seed,
        "template": template_digest(),
    }
    write_json(workspace.samples, report_samples(f"{workspace.profile}-{trained['steps']}", prompts, answers, args))
    count = len(prompts) * len(CONFIGURATIONS)
    print(f"{count} sample answers per model from {profile.evaluation.prompts}")


def open_model(folder: Path, *, like: Path) -> tuple[Any, Any]:
    """Return (model, tokenizer) as any user would open them: fp32 on a CPU, else on the GPU in the export's dtype.

    Args:
        folder: What is opened.
        like: The exported folder, whose dtype base and tuned share on a GPU so that they are compared fairly.
    """
    disable_progress_bar()  # stages print lines
    cuda = torch.cuda.is_available()
    dtype = AutoConfig.from_pretrained(like).dtype if cuda else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.to("cuda" if cuda else "cpu").eval(), tokenizer


@contextmanager
def threads_for(model: Any, *, one_below: int) -> Iterator[None]:  # noqa: ANN401
    """Run a small model on one CPU thread: handing its little matrices to a second costs more than it saves.

    Measured on two cores. 3.3 M weights: 72 rows take 2.0 s on one thread and 1.8 s on two; beside other work 3 s
    against 14 s, and 12 answers 1.5 s against 8 to 20 s. 135 M weights beside other work: 89 ms a sampled token against
    340 to 400.
    """
    before = torch.get_num_threads()
    small = model.device.type == "cpu" and model.num_parameters() < one_below
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_template(folder: Path, shards: Shards) -> None:
    """Raise DataError unless a folder's tokenizer and template are those the data was made with.

    A model trained with one template and measured with another looks broken, or worse, does not.
    """
    remedy = "Run `dvc repro`, so that base, data and model come from one run"
    made_with, tokenizer, template = shards.manifest, folder / "tokenizer.json", folder / "chat_template.jinja"
    if (found := file_sha256(tokenizer)) != made_with["tokenizer"]:
        wanted = made_with["tokenizer"]
        raise DataError(f"{tokenizer}: sha256 is {found[:12]}…, the data was made with {wanted[:12]}…. {remedy}")
    if (found := template_digest()) != made_with["template"]:
        raise DataError(
            f"the data was made with template {made_with['template'][:12]}…, this code's is {found[:12]}…. {remedy}"
        )
    text = template.read_text(encoding="utf-8") if template.is_file() else "(no such file)"
    if text != JINJA:
        place = next(at for at, pair in enumerate(zip_longest(text, JINJA)) if pair[0] != pair[1])
        raise DataError(
            f"{template}: differs from the template of data and training at character {place}: expected "
            f"{JINJA[place : place + 30]!r}, found {text[place : place + 30]!r}. {remedy}"
        )


def report_scores(shards: Shards, profile: Profile, scores: dict[str, list[Score]]) -> dict[str, Any]:
    """Return eval.json: metrics per source and model, their mean over sources, and which rows were measured."""
    return {
        "sources": {
            source.name: {name: scores[name][number].metrics() for name in scores}
            for number, source in enumerate(shards.sources)
        },
        "mean": {name: round(sum(score.loss for score in found) / len(found), 6) for name, found in scores.items()},
        "validation": validation_digest(shards, profile),
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
