"""Tiny models of many families: trained on two ranks, resumed to the same bytes, evaluated, packaged, loaded plainly.

`make test-families` runs all of them and writes docs/measured/families.json, the table of the documentation.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ropeway.config.load_params import load_profile
from ropeway.planning.memory import Sizes
from ropeway.planning.shape import measured_weights, with_shape
from ropeway.runtime.errors import ConfigError
from tests.support.families import FAMILIES, FAST, make_family_workspace, save_family
from tests.support.training import forget, start
from tests.support.whole_run import run_all

TABLE = Path(__file__).parents[2] / "docs" / "measured" / "families.json"
CASES = [pytest.param(name, marks=[] if name in FAST else pytest.mark.families) for name in FAMILIES]


def lay(root, name):
    """Return a workspace whose base is a model of this family, and that model."""
    family = FAMILIES[name]
    base = save_family(family, root / "base")
    changes = {"superhot": False, "gradient_checkpointing": True}
    return make_family_workspace(root, family.layout, changes), base


@pytest.mark.parametrize("name", CASES)
def test_a_family_is_trained_resumed_evaluated_and_packaged(tmp_path, monkeypatch, name):
    workspace, base = lay(tmp_path, name)
    publication = run_all(workspace, monkeypatch, ranks=2)
    trained = (workspace.model / "model.safetensors").read_bytes()
    log = forget(workspace, 1)
    assert "resuming after step" in start(workspace)
    assert (workspace.model / "model.safetensors").read_bytes() == trained

    loaded = AutoModelForCausalLM.from_pretrained(workspace.package, dtype=torch.float32)
    assert type(loaded) is type(base)
    assert loaded.config.rope_parameters == base.config.rope_parameters
    changed = [
        part for key, part in base.state_dict().items() if not torch.equal(loaded.state_dict()[key][: len(part)], part)
    ]
    assert changed
    profile = with_shape(workspace, load_profile(workspace.root / "params.yaml")[1])
    stored = AutoModelForCausalLM.from_pretrained(workspace.base)
    planned = Sizes.of(profile, measured_weights(workspace, profile))
    assert planned.parameters == sum(part.numel() for part in stored.parameters())
    proofs = json.loads((workspace.base / "manifest.json").read_bytes())["proofs"]
    losses = [line["loss"] for line in log]
    assert losses[-1] < losses[0]
    note(name, proofs, losses, publication)


def note(name, proofs, losses, publication):
    """Add a row to the table of the documentation, where the run is for that."""
    if "FAMILIES_TABLE" not in os.environ:
        return
    table = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    row = {
        "model_type": FAMILIES[name].model_type,
        "special": FAMILIES[name].special,
        "layout": FAMILIES[name].layout,
        "proofs": {way: fault or "equal" for way, fault in proofs.items()},
        "first_loss": round(losses[0], 3),
        "last_loss": round(losses[-1], 3),
        "version": publication.version,
    }
    table[name] = row
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def test_a_layout_that_a_family_cannot_have_is_refused_before_training_with_what_works(tmp_path, monkeypatch):
    workspace, _ = lay(tmp_path, "stablelm")
    path = workspace.root / "params.yaml"
    path.write_text(path.read_text().replace("layout: padded", "layout: packed"))
    with pytest.raises(ConfigError, match=r"does not pass the boundaries .* What works: layout: padded with use_flash"):
        run_all(workspace, monkeypatch)
    assert not list(workspace.checkpoints.glob("*/step-*"))


def test_a_plan_is_of_the_base_that_params_name_now(tmp_path):
    workspace, _ = lay(tmp_path, "qwen3")
    profile = load_profile(workspace.root / "params.yaml")[1]
    shape = with_shape(workspace, profile).expected_model.model_dump(exclude_none=True)
    workspace.base.mkdir(parents=True)
    other = {"name": "another base", "kind": "folder", "embedding_rows": 8, **shape}
    facts = {"model": other, "layer_weights": [[1]], "parameters": 9}
    (workspace.base / "manifest.json").write_text(json.dumps(facts))
    known = with_shape(workspace, profile)
    assert measured_weights(workspace, known) is None
    (workspace.base / "manifest.json").write_text(json.dumps(facts | {"model": other | {"name": profile.model_name}}))
    assert measured_weights(workspace, known).parameters == 9
    away = profile.model_copy(update={"model_name": "nowhere"})
    with pytest.raises(ConfigError, match=r"nowhere has no config\.json"):
        with_shape(workspace, away)


def test_the_shape_is_read_from_the_bases_config_before_and_after_it_is_written(tmp_path):
    workspace, base = lay(tmp_path, "qwen3")
    profile = load_profile(workspace.root / "params.yaml")[1]
    assert profile.expected_model is None
    shape = with_shape(workspace, profile).expected_model
    config = AutoConfig.from_pretrained(tmp_path / "base")
    assert (shape.head_dim, shape.num_key_value_heads, shape.vocab_size) == (16, 2, config.vocab_size)
    assert shape.hidden_size == base.config.hidden_size
