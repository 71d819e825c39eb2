"""card.json: all facts of the model card, which `ropeway.reporting.model_card` renders."""

from collections.abc import Mapping

from ropeway.config.edit import cut_block, inherited_names
from ropeway.config.sections import HuggingfaceSource
from ropeway.models.jinja_template import UnusableConversationError
from ropeway.stages.package.facts import Facts
from ropeway.stages.package.model_config import TORCH_NAMES

FORMAT = 1
LLAMA2 = "llama2"  # the Hub's identifier of the Llama 2 license
# Source: Llama 2 Community License Agreement, section 1.b.iii, which requires this sentence in a "Notice" text file.
NOTICE = (
    "Llama 2 is licensed under the LLAMA 2 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."
)


def plan_card(facts: Facts, params_text: str, *, parameters: int, weights: Mapping[str, str]) -> dict[str, object]:
    """Return the content of card.json; `params_text` is the frozen params.yaml, `weights` file -> sha256."""
    rope, profile = facts.rope, facts.profile
    read = [source.repo for source in profile.sources.values() if isinstance(source, HuggingfaceSource)]
    spoken = sorted(((text, count) for text, count in facts.systems.items() if text), key=lambda one: (-one[1], one[0]))
    return {
        "format": FORMAT,
        "name": facts.name,
        "title": facts.title,
        "steps": facts.steps,
        "applied_steps": facts.applied_steps,
        "fingerprint": facts.model.get("fingerprint"),
        "parameters": parameters,
        "weights": dict(weights),
        "torch_dtype": TORCH_NAMES[profile.package.dtype],
        "loader": facts.loader,
        "notice": NOTICE if profile.card.license == LLAMA2 else None,
        "params": profile.model_dump(mode="json", include=set(profile.model_fields_set)),
        "params_block": cut_block(params_text, facts.name),
        "inherited": list(inherited_names(params_text, facts.name)),
        "base": {key: facts.base["model"].get(key) for key in ("kind", "name", "origin")},
        "base_rope": dict(facts.base_rope),
        "rope": {
            "kind": rope.kind,
            "is_scaled": rope.is_scaled,
            "kept": rope.kept,
            "factor": rope.factor,
            "settings": [list(one) for one in rope.card_settings],
            "stretch": rope.stretch,
            "replaced": "" if rope.kept else rope.stated,
            "kept_layers": rope.kept_layers,
            "share": rope.share,
            "legacy_key": rope.legacy_key,
            "original": rope.original,
            "reach": rope.reach,
        },
        "max_positions": facts.max_positions,
        "end": facts.end,
        "prompts": _render_prompts(facts),
        "special": dict(facts.special),
        "conversations": facts.systems.total(),
        "systems": [list(one) for one in spoken],
        "datasets": list(dict.fromkeys([*read, *profile.card.upstream_datasets])),
        "sources": [
            {
                "name": name,
                "kind": facts.raw["sources"][name]["kind"],
                "identity": facts.raw["sources"][name]["identity"],
            }
            for name, _ in profile.mixture
            if name in facts.raw["sources"]
        ],
        "train": {key: facts.train[key] for key in ("rows_left_out", "rewinds", "continued_from")},
    }


def _render_prompts(facts: Facts) -> list[str]:
    """Return two prompts in the model's template, of one and two questions, without a system message if it has none."""
    prompts = []
    for turns in (("user prompt",), ("Q1", "A1", "Q2")):
        try:
            prompts.append(facts.template.render_prompt(turns, end=facts.end, system="system message"))
        except UnusableConversationError:
            prompts.append(facts.template.render_prompt(turns, end=facts.end))
    return prompts
