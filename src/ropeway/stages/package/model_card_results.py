"""The card's second half: what was measured, what it answers, how to load and verify it, whose it is."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from ropeway.data.task_scores import name_metrics, show_score
from ropeway.runtime.manifest import file_sha256
from ropeway.stages.package.card_text import escape, fence, figure, format_table
from ropeway.stages.package.facts import Facts

COUNTED = {
    "published": "documents, and of conversations all but the prompter's turns",
    "answers": "documents, and of conversations the answers",
}
_PARTS = {"up_to_max_length": "up to", "beyond": "beyond"}  # eval.json's keys
LLAMA2 = "llama2"  # the Hub's identifier of that licence
# Source: Llama 2 Community License Agreement, section 1.b.iii, which wants this sentence in a "Notice" text file.
NOTICE = (
    "Llama 2 is licensed under the LLAMA 2 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."
)
# Source: the published card's section "License".
USE_POLICY = (
    "Your use of the Llama Materials must comply with applicable laws and regulations (including trade compliance laws "
    "and regulations) and adhere to the [Acceptable Use Policy](https://ai.meta.com/llama/use-policy) for the Llama "
    "Materials."
)


def format_evaluation(facts: Facts) -> Iterator[str]:
    """Yield base against tuned, per source."""
    report, measured = facts.evaluation, facts.profile
    yield "## Evaluation"
    rows = []
    for name, found in report["sources"].items():
        base, tuned = found["base"], found["tuned"]
        rows.append(
            [
                name,
                f"{tuned['tokens']:,}",
                *(_change(base, tuned, key) for key in ("loss", "perplexity", "accuracy", "nats_per_byte")),
            ]
        )
    mean = report["mean"]
    rows.append(["mean over sources", "", f"{figure(mean['base'])} → {figure(mean['tuned'])}", "", "", ""])
    yield format_table(["source", "tokens", "loss, base → tuned", "perplexity", "accuracy", "nats/byte"], rows)
    counted = COUNTED[measured.what_counts] if measured.label_masking else "all tokens"
    yield (
        f"Loss in nats per counted token, summed over tokens, hence the same for every batch size. Counted are "
        f"{counted}. {report['rows']:,} validation rows, cut on the right at {measured.max_length:,} tokens "
        f"(digest `{report['validation'][:16]}`); the base ran under `{json.dumps(facts.base_rope, sort_keys=True)}`."
    )


def _change(base: Mapping[str, float], tuned: Mapping[str, float], key: str) -> str:
    return f"{figure(base[key])} → {figure(tuned[key])}" if key in base else ""


def format_pictures(facts: Facts) -> Iterator[str]:
    """Yield what was measured beyond losses per source, and the pictures."""
    report, measured = facts.evaluation, facts.profile
    yield "![Validation loss per source, base and tuned](plots/sources.png)"
    yield "![Loss while training](plots/loss.png)"
    yield "### Loss by position"
    found, wanted = report["positions"], measured.evaluation.positions
    parts = [(name, found[key]) for key, name in _PARTS.items() if key in found]
    curves = list(parts[0][1])
    rows = [[_name_curve(curve), *(figure(losses[curve]) for _, losses in parts)] for curve in curves]
    yield format_table(["model", *(f"{name} {measured.max_length:,} tokens" for name, _ in parts)], rows)
    yield (
        f"Nats per token over rows of {wanted.row_tokens:,} tokens, validation texts one behind another: below and "
        "beyond the length that was trained."
    )
    yield "![Loss by position, base and tuned](plots/positions.png)"
    yield "### Passkey retrieval"
    keys = report["passkey"]
    said = "; ".join(f"{name} finds {one['right']:,} of {one['asked']:,} keys" for name, one in keys.items())
    lengths, depths = (getattr(measured.evaluation.passkey, name) for name in ("lengths", "depths"))
    yield (
        f"Five digits hidden in filler of {min(lengths):,} to {max(lengths):,} tokens at {len(depths)} depths "
        f"(arXiv:2305.16300): {said}. Every answer, wrong ones too: "
        "[plots/passkey_answers.csv](plots/passkey_answers.csv)."
    )
    yield "![Share of keys found by length and depth](plots/passkey.png)"


def _name_curve(curve: str) -> str:
    model, _, unscaled = curve.partition("_")
    return f"{model}, RoPE not scaled" if unscaled else model


def format_tasks(facts: Facts) -> Iterator[str]:
    """Yield base against tuned in every task of lm-evaluation-harness, where params name any."""
    tasks = facts.evaluation.get("tasks", {})
    if not tasks:
        return
    yield "### Tasks of lm-evaluation-harness"
    rows = [
        [
            name,
            task["version"],
            str(task["shots"]),
            f"{task['n']:,}",
            metric,
            " → ".join(show_score(task[model], metric) for model in ("base", "tuned")),
        ]
        for name, task in tasks.items()
        for metric in name_metrics(task["tuned"])
    ]
    yield format_table(["task", "version", "shots", "questions", "metric", "base → tuned"], rows)
    yield (
        f"{facts.evaluation['harness']}, HF backend, prompts in this model's chat template with one BOS in front; ± is "
        "the standard error."
    )


def format_samples(facts: Facts) -> Iterator[str]:
    """Yield the greedy answer of base and tuned to every prompt."""
    yield "## Sample answers"
    configs = [result["sampling_config"].partition("/")[2] for result in facts.samples["prompts"][0]["results"]]
    shown = "greedy" if "greedy" in configs else configs[0]
    yield (
        f"{shown.capitalize()}, {facts.samples['args']['max_new_tokens']} tokens at most; "
        "[samples.html](samples.html) has sampled ones too, side by side, and [samples.json](samples.json) the same "
        "in the format of the Open-Assistant family's sampling reports."
    )
    for one in facts.samples["prompts"]:
        outputs = {result["sampling_config"]: result["outputs"][0] for result in one["results"]}
        yield f"**{escape(one['prompt'])}**"
        for model in ("base", "tuned"):
            yield f"{model}:\n\n{fence(outputs[f'{model}/{shown}'].strip() or '(nothing: it ends at once)')}"


def format_loading(facts: Facts, folder: Path) -> Iterator[str]:
    """Yield how to load, verify and make it again."""
    yield "## How to load and verify"
    yield fence(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        'messages = [{"role": "user", "content": "What is a list?"}]\n'
        "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt', "
        "return_dict=True)\n"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0]))",
        "python",
    )
    yield (
        "[manifest.json](manifest.json) names every file with its sha256. `python -m ropeway.stages.package.check .` "
        "hashes them again, loads the folder and compares tokens, template, RoPE frequencies, dtype, stop token with "
        "[probe.json](probe.json). The weights:"
    )
    weights = [f"{file_sha256(path)}  {path.name}" for path in sorted(folder.glob("*.safetensors"))]
    yield fence("\n".join(weights))
    yield (
        f"Training fingerprint `{facts.model['fingerprint']}` (parameters, data, base, DeepSpeed config and code). "
        f"`ropeway reproduce {facts.name}@VERSION` makes it again, in a clone of the project at the revision that the "
        "version's provenance names, and compares the weights byte by byte; by hand, check out that revision and "
        f"`ropeway run --profile {facts.name}`."
    )


def format_people(facts: Facts) -> Iterator[str]:
    """Yield developers and thanks, where params name any."""
    card = facts.profile.card
    if card.developers:
        yield "# Developers"
        yield "\n".join(f"- [{name}](https://github.com/{name})" for name in card.developers)
    if card.thanks or card.sponsored_by:
        yield "# Special Thanks"
    if card.thanks:
        yield f"We want to thank {card.thanks.rstrip('.')}."
    if card.sponsored_by:
        yield f"{card.sponsored_by} sponsored the training compute required for this model."


def format_license(facts: Facts) -> Iterator[str]:
    """Yield the licence; the terms of Llama 2 travel with what is made of it."""
    card = facts.profile.card
    yield "# License"
    lines = [f"- The weights: [{card.license_name}]({card.license_link})."]
    if card.license == LLAMA2:
        lines += [f"- {NOTICE}", f"- {USE_POLICY}"]
    lines.append("- The texts it was trained on keep their own licences; see the data sets above.")
    yield "\n".join(lines)
