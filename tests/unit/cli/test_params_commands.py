import json
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from ropeway.cli.main import app
from ropeway.config.describe import build_json_schema, explain_key
from ropeway.config.load_params import read_block
from ropeway.runtime.errors import ConfigError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def ask(monkeypatch):
    monkeypatch.chdir(ROOT)

    def run(*words):
        result = CliRunner().invoke(app, ["params", *words, "--json"], catch_exceptions=False)
        return json.loads(result.stdout)

    return run


def test_a_profile_is_shown_with_all_values_and_who_states_each(ask):
    shown = ask("show", "laptop")
    assert shown["values"] == json.loads(json.dumps(read_block(ROOT / "params.yaml", "laptop")))
    stated = shown["stated_by"]
    names = [stated[key] for key in ("max_length", "learning_rate", "adam_beta1", "gate.min_gain_over_base_nats")]
    assert names == ["laptop", "scratch", "llama2_13b_orca_8k", "scratch"]
    assert stated["gate.max_loss_increase_nats"] == "llama2_13b_orca_8k"
    assert stated["resume_from"] == "laptop"


def test_a_preset_is_shown_explained_and_compared_like_a_profile(ask):
    shown = ask("show", "lora")
    assert (shown["values"]["peft_model"], shown["stated_by"]["peft_model"]) == (True, "lora")
    assert (shown["values"]["layout"], shown["stated_by"]["layout"]) == ("packed", "finetune")
    assert "preset" not in shown["values"]
    assert "model_name" in shown["values"]
    values = ask("explain", "learning_rate")["values"]
    assert (values["continue"], values["laptop"]) == (2e-5, 2e-3)
    assert set(ask("diff", "finetune", "continue")) == {"learning_rate", "warmup_steps"}
    with pytest.raises(ConfigError, match="nothing"):
        ask("show", "nothing")


def test_a_key_is_explained_with_its_values(ask):
    found = ask("explain", "evaluation.passkey.lengths")
    assert found["values"]["laptop"] == [128, 256, 512, 768]
    assert "whole number" in found["described"][0]["type"]
    assert set(ask("explain", "superhot_config")["described"][0]["keys"]) >= {"type", "scale", "beta_fast"}


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("lengths", "evaluation.passkey.lengths"),
        ("learning_rat", "learning_rate"),
        ("gate.x", "no key"),
        ("", "no key"),
    ],
)
def test_an_unknown_key_is_refused_with_those_that_are_like_it(key, near):
    with pytest.raises(ConfigError, match=near):
        explain_key(key)


def test_two_profiles_are_compared_value_by_value(ask):
    found = ask("diff", "laptop", "smollm2")
    assert found["learning_rate"] == {"laptop": 2e-3, "smollm2": 1e-3}
    assert found["package.dtype"] == {"laptop": "fp32", "smollm2": "bf16"}
    assert "package.max_shard_bytes" not in found
    assert ask("diff", "laptop", f"{ROOT}/params.yaml:laptop") == {}


def test_the_schema_file_is_that_of_the_code():
    assert json.loads((ROOT / "params.schema.json").read_text(encoding="utf-8")) == build_json_schema(), (
        "run `ropeway params schema > params.schema.json`"
    )
    first = (ROOT / "params.yaml").read_text(encoding="utf-8").partition("\n")[0]
    assert first.endswith("$schema=params.schema.json")


def shipped():
    return YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def test_the_shipped_file_satisfies_the_schema():
    schema = build_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(shipped(), schema)
    properties = schema["$defs"]["Profile"]["properties"]
    assert [key for key, one in properties.items() if "description" not in one and "$ref" not in json.dumps(one)] == []


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rat": 1},
        {"learning_rate": "1e-5"},
        {"gate": {"max_loss_increase_nats": -1}},
        {"gate": {"unknown": 1}},
        {"base": {"kind": "scrach"}},
        {"datasets": []},
        {"max_length": 1},
    ],
)
def test_the_schema_refuses_what_ropeway_refuses(change):
    tree = shipped()
    tree["laptop"] |= change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, build_json_schema())
