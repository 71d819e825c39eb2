"""The published block is the card's, key for key; every profile stands on its own; dvc.yaml and stages agree."""

import json
import re
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from ropeway.config.load_params import load_profile, load_profiles
from ropeway.config.params import Profile
from ropeway.config.stages import FROZEN, READS, STAGES, UNHASHED, frozen_path
from ropeway.runtime.errors import ConfigError
from tests.support.shipped_params import read_shipped_params

ROOT = Path(__file__).parents[2]
CARD = (ROOT / "tests/contract/model-card.txt").read_text(encoding="utf-8")


def read_yaml(text):
    return YAML(typ="safe", pure=True).load(text)


def test_the_published_block_holds_every_key_and_value_of_the_card():
    block = read_yaml(re.search(r"```\n(llama2_13b_orca_8k:.*?)```", CARD, re.DOTALL).group(1))["llama2_13b_orca_8k"]
    ours = read_yaml((ROOT / "params.yaml").read_text(encoding="utf-8"))["llama2_13b_orca_8k"]
    assert len(block) == 26
    for key, value in block.items():
        assert ours[key] == value, key
        assert type(ours[key]) is type(value), key


def test_the_three_profiles_ship_and_are_whole():
    chosen, profiles = load_profiles(ROOT / "params.yaml")
    assert chosen == "smollm2"
    assert list(profiles) == ["llama2_13b_orca_8k", "smollm2", "laptop"]


@pytest.mark.parametrize(
    "setting",
    ["++laptop.gate.min_gain_over_base_nats=0.5", "++laptop.learning_rate=0.5", "laptop.expected_model.vocab_size=9"],
)
def test_setting_a_value_of_one_profile_with_dvc_changes_no_other(tmp_path, setting):
    path = tmp_path / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    apply_overrides(str(path), [setting])  # `dvc exp run -S`
    before, after = load_profiles(ROOT / "params.yaml")[1], load_profiles(path)[1]
    assert [name for name in before if before[name] != after[name]] == ["laptop"]


def list_differences(definition):
    """Return what dvc.yaml says otherwise than `STAGES` declares, stage by stage."""
    written = {
        name: {key: value for key, value in stage.items() if key not in ("desc", "always_changed")}
        for name, stage in definition["stages"].items()
    }
    of_runs = "runs/${{profile}}/{}".format
    declared = {
        stage.name: {
            "cmd": f"ropeway stage {stage.name} ${{profile}}",
            "deps": stage.dependencies,
            "outs": [of_runs(one) for one in stage.outputs],
            **({"metrics": [of_runs(one) for one in stage.metrics]} if stage.metrics else {}),
            **({"plots": [of_runs(one) for one in stage.plots]} if stage.plots else {}),
        }
        for stage in STAGES
    }
    frozen = [*(f"code-{name}" for name in READS), *(f"params-{name}" for name in READS), *FROZEN]
    declared["identity"] = {
        "cmd": "ropeway stage identity",  # a name like `x; rm -r .` would be a shell command
        "outs": [{frozen_path(name): {"cache": False}} for name in frozen],
    }
    for stage in written.values():
        if "plots" in stage:
            stage["plots"] = [next(iter(one)) for one in stage["plots"]]
    return [name for name in sorted({*written, *declared}) if written.get(name) != declared.get(name)]


def test_dvc_yaml_says_what_the_stages_declare():
    definition = read_yaml((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    assert list_differences(definition) == []
    assert list(definition["stages"]) == ["identity", *READS]


@pytest.mark.parametrize(
    ("old", "new", "stage"),
    [
        ("      - .identity/deepspeed.json\n", "", "train"),
        ("      - runs/${profile}/tables\n    metrics", "    metrics", "evaluate"),
        ("ropeway stage package ${profile}", "ropeway stage package", "package"),
        ("      - .identity/tasks.json: {cache: false}\n", "", "identity"),
        (
            "    cmd: ropeway stage prepare ${profile}\n",
            "    cmd: ropeway stage prepare ${profile}\n    params: [x]\n",
            "prepare",
        ),
    ],
)
def test_a_difference_between_dvc_yaml_and_the_declaration_is_found(old, new, stage):
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    assert text.count(old) == 1
    assert list_differences(read_yaml(text.replace(old, new))) == [stage]


def test_what_a_stage_reads_is_written_by_an_earlier_one():
    written = set()
    for stage in STAGES:
        assert {one.split("/")[0] for one in stage.inputs} <= written, stage.name
        assert set(stage.frozen) <= set(FROZEN)
        written |= {*stage.outputs, *stage.metrics, *stage.plots}


def test_no_key_that_changes_no_result_is_a_reason_to_run_a_stage():
    assert [(name, key) for name, keys in READS.items() for key in keys if key in UNHASHED] == []


def test_a_stage_cannot_read_a_key_it_does_not_list():
    _, profile = load_profile(ROOT / "params.yaml", "laptop")
    fetch = profile.reading(READS["fetch"])
    assert fetch.sources == profile.sources
    with pytest.raises(AttributeError):
        _ = fetch.learning_rate


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("learning_rate: 2e-3", "learning_rate: '2e-3'", "learning_rate: expected a number, found '2e-3'"),
        ("learning_rate: 2e-3", "learning_rate: 1e-5x", "learning_rate: expected a number, found '1e-5x'"),
        ("learning_rate: 2e-3", "learning_rate: 0", "learning_rate: expected more than 0.0, found 0"),
        ("warmup_steps: 10", "warmup_step: 10", "warmup_step: unknown key; did you mean warmup_steps?"),
        (
            "max_val_set: 48",
            "max_valset: 48",
            "datasets.0.docstrings.max_valset: unknown key; did you mean max_val_set?",
        ),
        (
            "max_length: 512",
            "max_length: 1024",
            "max_position_embeddings 256 x superhot_config.scale 2 allows only 512 tokens",
        ),
        ("max_length: 512", "max_length: 512.5", "max_length: expected a whole number, found 512.5"),
        ("kind: scratch", "kind: scrach", "base.kind: expected one of 'folder', 'hub', 'scratch', 'gguf'"),
        ("    - topics:\n        max_chunk", "    - topic:\n        max_chunk", "only one of them has topic, topics"),
        (
            "use_flash_attention: false",
            "use_flash_attention: no",
            "use_flash_attention: expected true or false, found 'no'",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_key(tmp_path, old, new, says):
    text = read_shipped_params()
    at = text.rindex(old)  # in laptop, or in a preset
    path = tmp_path / "params.yaml"
    path.write_text(text[:at] + text[at:].replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_profile(path)


def test_all_faults_are_reported_at_once(tmp_path):
    path = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    for old, new in (("rng_seed: 0xe1291f1a", "rng_seed: -1"), ("dtype: fp32", "dtype: fp31")):
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    message = str(caught.value)
    assert "profile 'llama2_13b_orca_8k'" in message
    assert message.count("rng_seed: expected at least 0, found -1") == 3
    assert "dtype: expected 'fp16', 'bf16' or 'fp32', found 'fp31'" in message


def test_a_missing_profile_names_those_that_exist(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(read_shipped_params("labtop"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'labtop' does not exist.*llama2_13b_orca_8k, smollm2, laptop"):
        load_profile(path)


def test_a_duplicate_key_is_an_error_and_not_the_last_one(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("profile: a\na: {}\na: {}\n")
    with pytest.raises(ConfigError, match="'a' twice, first in line 2"):
        load_profile(path)


def test_every_profile_is_a_profile_with_no_default_at_its_top():
    assert [name for name, field in Profile.model_fields.items() if not field.is_required()] == []


@pytest.mark.parametrize("name", ["a b", "../x", "a/b", "", "x" * 65, "a..b", "ä", "'; rm -rf'"])
def test_a_profile_s_name_can_be_a_folder_and_a_model_s_name_or_is_refused(tmp_path, name):
    (tmp_path / "params.yaml").write_text(
        read_shipped_params("smollm2").replace("\nlaptop:\n", f"\n{json.dumps(name)}:\n"),
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match=r"profile name .*: expected 1 to 64 of A-Z a-z 0-9"):
        load_profile(tmp_path / "params.yaml", "smollm2")
