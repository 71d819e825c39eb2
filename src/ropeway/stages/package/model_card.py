"""README.md of the package: the published card's sections in its order, every number and name taken from the run.

Source of the sections: the model card of OpenAssistant/llama2-13b-orca-8k-3319. Where that card contradicted itself
(two sizes of the base model, a link to another data set than was used, counts without their whole) the text here is
made from one value, so it cannot.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ropeway.config.block import cut_block, inherited_names
from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import GgufBase, ScratchBase
from ropeway.data.lineage import describe_base
from ropeway.runtime.workspace import Workspace
from ropeway.stages.package.card_text import escape, fence, list_names
from ropeway.stages.package.facts import Facts
from ropeway.stages.package.model_card_data import describe_sources, format_composition, format_origin, hub_datasets
from ropeway.stages.package.model_card_results import (
    LLAMA2,
    NOTICE,
    format_evaluation,
    format_license,
    format_loading,
    format_people,
    format_pictures,
    format_samples,
    format_tasks,
)
from ropeway.stages.package.model_config import TORCH_NAMES
from ropeway.stages.package.weights import Written

SHOWN_SYSTEMS = 50


def write_card(facts: Facts, workspace: Workspace, folder: Path, written: Written) -> None:
    """Write README.md, and the notice that Llama 2 asks for, into a package folder that has all but its manifest."""
    params = FrozenInputs.load(workspace.root).params_file.read_text(encoding="utf-8")
    sections = (
        format_front_matter(facts),
        *introduce(facts, written),
        *format_context(facts),
        *format_template(facts),
        "## Datasets",
        *describe_sources(facts),
        *format_composition(facts),
        *format_configuration(facts, params),
        *format_evaluation(facts),
        *format_pictures(facts),
        *format_tasks(facts),
        *format_samples(facts),
        *format_loading(facts, folder),
        *format_people(facts),
        *format_license(facts),
    )
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    if facts.profile.card.license == LLAMA2:
        (folder / "NOTICE.txt").write_text(f"{NOTICE}\n", encoding="utf-8")


def preview_card(facts: Facts, workspace: Workspace) -> str:
    """Return the sections that need no trained model."""
    params = FrozenInputs.load(workspace.root).params_file.read_text(encoding="utf-8")
    sections = (
        format_front_matter(facts),
        *introduce(facts, Written(0, 0)),
        *format_context(facts),
        *format_template(facts),
        *describe_sources(facts),
        *format_composition(facts),
        *format_configuration(facts, params),
        *format_people(facts),
        *format_license(facts),
    )
    return "\n\n".join(sections)


def format_front_matter(facts: Facts) -> str:
    """Return the Hub's metadata as YAML; strings are written as JSON, which YAML reads."""
    card = facts.profile.card
    lines = [f"license: {card.license}"]
    if card.license == "other":  # the Hub reads the other two keys only then
        lines += [f"license_name: {json.dumps(card.license_name)}", f"license_link: {json.dumps(card.license_link)}"]
    if card.base_model:
        lines += [f"base_model: {json.dumps(card.base_model)}", "base_model_relation: finetune"]
    if datasets := hub_datasets(facts):
        lines += ["datasets:", *(f"- {json.dumps(name)}" for name in datasets)]
    lines += ["library_name: transformers", "pipeline_tag: text-generation"]
    return "\n".join(["---", *lines, "---"])


def describe_steps(facts: Facts) -> str:
    """Return how many steps were applied, skipped, and left out with their rows."""
    left = facts.train["rows_left_out"] // facts.profile.global_batch_size
    said = f"{facts.applied_steps:,} applied, {facts.steps - facts.applied_steps - left:,} skipped for overflow"
    if not left:
        return said
    return (
        f"{said}, {left:,} passed over with their {facts.train['rows_left_out']:,} rows because the numbers went wrong "
        f"there: training went back {facts.train['rewinds']:,} times, steps.csv has the steps"
    )


def describe_descent(record: Mapping[str, Any]) -> str:
    """Return in words from which runs training went on, the last one first.

    >>> one = {"fingerprint": "00bb", "step": 60, "changed": {"learning_rate": "0.002 -> 0.001"}, "earlier": {}}
    >>> describe_descent(one)
    'training went on from step 60 of the run 00bb (changed since: learning_rate 0.002 -> 0.001)'
    >>> describe_descent({"fingerprint": "00cc", "step": 1200, "changed": {}, "earlier": one})[:70]
    'training went on from step 1,200 of the run 00cc; there training went '
    """
    words = f"training went on from step {record['step']:,} of the run {record['fingerprint']}"
    if record["changed"]:
        words += f" (changed since: {', '.join(f'{key} {values}' for key, values in record['changed'].items())})"
    return f"{words}; there {describe_descent(record['earlier'])}" if record["earlier"] else words


def introduce(facts: Facts, written: Written) -> Iterator[str]:
    """Yield title, what the model is, and the list of facts."""
    profile, card = facts.profile, facts.profile.card
    base = name_base(facts)
    yield f"# {facts.title}"
    made = (
        "a Llama trained from random weights" if isinstance(profile.base, ScratchBase) else f"a fine-tuning of {base}"
    )
    kinds = [account["kind"] for account in facts.ledger["sources"]]
    texts = [text for kind, text in (("conversation", "conversations"), ("document", "plain text")) if kind in kinds]
    yield f"This model is {made} on {' and '.join(texts)}, with a context of {profile.max_length:,} tokens."
    yield f"Note: **At least Hugging Face transformers {facts.loader} is required to load this model.**"
    applied = describe_steps(facts)
    items = [
        f"base model: {base}",
        f"opened from: {format_origin(describe_base(facts.base['model']))}",
        f"License: [{card.license_name}]({card.license_link})",
        "sampling report: [samples.html](samples.html), [samples.json](samples.json)",
        "wandb: if the run was mirrored there, the provenance beside this version in the registry has the link",
        f"checkpoint: the final weights, {facts.steps:,} steps of {profile.global_batch_size} rows ({applied})",
        f"parameters: {written.parameters:,}",
        f"datatype: {profile.package.dtype} ({TORCH_NAMES[profile.package.dtype]}); trained in {profile.dtype}",
    ]
    if record := facts.train["continued_from"]:
        items.append(f"not from the base in one go: {describe_descent(record)}")
    if card.sponsored_by:
        items.append(f"sponsored by: {card.sponsored_by}")
    yield "\n".join(f"- {item}" for item in items)
    if isinstance(profile.base, GgufBase):
        yield (
            f"The base was opened from `{profile.base.file}` of the Python package `{profile.base.package}`: a GGUF "
            "file of quantised weights, de-quantised before training. It is not the original in full precision, and "
            "neither are the base's figures below."
        )


def name_base(facts: Facts) -> str:
    """Return the base model, linked where it has a home."""
    base = facts.profile.card.base_model
    if base:
        return f"[{base}](https://huggingface.co/{base})"
    return "none (random weights)" if isinstance(facts.profile.base, ScratchBase) else "a local folder, not published"


def format_context(facts: Facts) -> Iterator[str]:
    """Yield how positions are scaled and what the config's numbers mean."""
    rope, reach, trained = facts.rope, facts.max_positions, facts.profile.max_length
    yield "## Long context (RoPE Scaling)"
    if not rope.is_scaled:
        yield (
            f"This model was trained with a context of {trained:,} tokens and no scaling of its RoPE embeddings; its "
            f"`max_position_embeddings` of {reach:,} is the base's own."
        )
        return
    if rope.kept:
        yield (
            f"This model was trained with a context of {trained:,} tokens and keeps the RoPE scaling of its base as it "
            f"is, {rope.kind}: `{rope.kept}`. `max_position_embeddings` of {reach:,} is the base's own. config.json "
            "states the scaling as `rope_scaling` and as `rope_parameters`, so that transformers 4 and 5 both apply "
            f'it. Before loading, make sure of the version: `pip install "transformers>={facts.loader}"`.'
        )
        return
    settings = ", ".join(f"{key}: {value:g}" for key, value in (("scale", rope.factor), *rope.settings))
    yield (
        f"This model was trained with a context of {trained:,} tokens using {rope.kind} scaling of RoPE embeddings by "
        f"a factor of {rope.factor:g}: {rope.stretch}. In params.yaml that is "
        f"`superhot_config: {{type: {rope.kind}, {settings}}}`."
    )
    sum_ = f"{rope.original:,} x {rope.factor:g} = {rope.reach:,}"
    stated = (
        f"`max_position_embeddings` stays {reach:,}, the base's own context: with the factor the model reaches "
        f"{sum_} tokens, and programs that multiply the two get that number."
        if reach == rope.original
        else f"`max_position_embeddings` is the whole reach, {sum_} tokens: programs do not multiply it here."
    )
    yield (
        f"{stated} The tokenizer's `model_max_length` is {trained:,}. config.json states the scaling as `rope_scaling` "
        "and as `rope_parameters`, so that transformers 4 and 5 both apply it. Before loading, make sure of the "
        f'version: `pip install "transformers>={facts.loader}"`.'
    )


def format_template(facts: Facts) -> Iterator[str]:
    """Yield the conversation template and the system messages that occurred."""
    end = facts.end
    yield "## Conversation Template"
    yield "For the initial response use (the system message is optional):"
    yield fence(f"<|system|>system message{end}<|prompter|>user prompt{end}<|assistant|>")
    yield "For multi-turn conversations use:"
    yield fence(f"<|system|>system message{end}<|prompter|>Q1{end}<|assistant|>A1{end}<|prompter|>Q2{end}<|assistant|>")
    yield (
        f"`{end}` is the tokenizer's end token (id {facts.special['eos']}), with which every turn ends. In "
        f"front of it all comes one BOS (id {facts.special['bos']}), which the tokenizer puts there itself; "
        "`tokenizer.apply_chat_template` gives the same ids (transformers 4.34 or later)."
    )
    spoken = [(text, count) for text, count in facts.systems.items() if text]
    spoken.sort(key=lambda pair: (-pair[1], pair[0]))
    total, without = facts.systems.total(), facts.systems[""]
    if not spoken:
        yield f"None of the {total:,} conversations read has a system message."
        return
    yield (
        f"{total - without:,} of the {total:,} conversations read have a system message, {without:,} have none. "
        f"The {len(spoken):,} messages, with the number of conversations:"
    )
    yield "\n".join(f"{n}. {escape(text)} ({count:,})" for n, (text, count) in enumerate(spoken[:SHOWN_SYSTEMS], 1))
    if rest := spoken[SHOWN_SYSTEMS:]:
        yield f"… and {len(rest):,} more, in {sum(count for _, count in rest):,} conversations."


def format_configuration(facts: Facts, params: str) -> Iterator[str]:
    """Yield the run's block of params.yaml as it stands there."""
    yield "## Model Configuration"
    yield fence(cut_block(params, facts.name), "yaml")
    if names := inherited_names(params, facts.name):
        yield (
            f"Keys that are not shown are those of {list_names(names)}; [run.yaml](run.yaml) holds that too, and "
            "[run.json](run.json) has every value. The YAML is read as 1.2."
        )
