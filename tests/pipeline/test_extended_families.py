"""Bases whose RoPE is partial, per layer type or longrope: extended, trained, packaged, and used as the next base.

`make test-families` runs all of them.
"""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from ropeway.config.load_params import load_profile
from ropeway.config.stages import READS
from ropeway.reporting.model_card import render_card
from ropeway.runtime.workspace import Workspace
from ropeway.stages.base import stage as base
from tests.support.families import FAMILIES, LONGROPE, make_family_workspace, save_family
from tests.support.training import forget
from tests.support.whole_run import rewrite, run_all

PHI3 = {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 32}, "original_max_position_embeddings": 32}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
# name -> (family, what it adds, superhot_config, exported rope_parameters without those of the attention factor)
CASES = {
    "layer types": (
        "gemma3_text", {}, {"type": "linear", "scale": 2},
        {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}, "sliding_attention": LOCAL},
    ),
    "part of a head": (
        "stablelm", {"hidden_size": 64, "num_key_value_heads": 4},
        {"type": "yarn", "scale": 2, "beta_fast": 32, "beta_slow": 1},
        {**YARN, "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    ),
    "longrope on half of a head": (
        "glm4", {}, {"type": "longrope", "scale": 2, "long_factor": [1.5, 3.0], "attention_factor": None},
        {
            "rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128,
            "short_factor": [1.5, 3.0], "long_factor": [1.5, 3.0], "partial_rotary_factor": 0.5,
        },
    ),
    "longrope of the base": (
        "phi3", PHI3, {"type": "longrope", "scale": 8, "long_factor": None, "attention_factor": None},
        {
            "rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32,
            "short_factor": LONGROPE["long_factor"], "long_factor": LONGROPE["long_factor"],
            "partial_rotary_factor": 1.0,
        },
    ),
}  # fmt: skip
FAST = ("layer types", "longrope on half of a head")


def lay(root, name):
    """Return a workspace that extends a model of this case to 256 tokens."""
    model_type, more, stated, _ = CASES[name]
    family = FAMILIES[model_type]
    save_family(replace(family, more={**family.more, **more}), root / "base")
    changes = {"max_length": 192, "superhot": True, "superhot_config": stated}
    return make_family_workspace(root, family.layout, changes)


def stated_rope(folder):
    """Return positions and `rope_parameters` of a config.json."""
    config = json.loads((folder / "config.json").read_bytes())
    return config["max_position_embeddings"], config["rope_parameters"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.families) for name in CASES]
)
def test_a_base_is_extended_trained_packaged_and_the_next_base(tmp_path, monkeypatch, capsys, name):
    workspace = lay(tmp_path, name)
    run_all(workspace, monkeypatch)
    assert "RoPE: the base has" in capsys.readouterr().out
    losses = [line["loss"] for line in forget(workspace, 0)]
    assert losses[-1] < losses[0]
    positions, parameters = stated_rope(workspace.package)
    parameters.pop("attention_factor", None)
    assert parameters == CASES[name][3]

    loaded = AutoModelForCausalLM.from_pretrained(workspace.package).eval()
    trained = AutoModelForCausalLM.from_pretrained(workspace.model, dtype=loaded.dtype).eval()
    for length in (16, 250):
        ids = torch.arange(length)[None] % 300
        with torch.inference_mode():
            assert torch.equal(loaded.float()(ids).logits, trained.float()(ids).logits)
    files = ("card.json", "ledger.json", "eval.json", "samples.json")
    card = render_card(*(json.loads((workspace.package / file).read_bytes()) for file in files))
    assert "It replaces what the base states: `{" in card
    assert ("layers of type `sliding_attention` keep the RoPE of the base" in card) == (name == "layer types")
    share = CASES[name][3].get("partial_rotary_factor", 1.0)
    assert (f"RoPE turns {100 * share:g}% of each head" in card) == (share != 1)

    rewrite(workspace, {"model_name": str(workspace.package)})
    following = Workspace(tmp_path / "next", "tiny")
    base.run(following, load_profile(workspace.root / "params.yaml")[1].reading(READS["base"]))
    again, stated = stated_rope(following.base)
    stated.pop("attention_factor", None)
    assert (again, stated | {"type": None}) == (positions, CASES[name][3] | {"type": None})
