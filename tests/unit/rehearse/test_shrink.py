"""The rehearsed profile: valid for every profile, every difference is listed, and kinds stay."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from ropeway.config.load_params import load_profiles, read_block, resolve_preset
from ropeway.config.params import Profile
from ropeway.rehearse.shrink import (
    STEPS,
    RehearsalMachine,
    RehearsedBase,
    SourceSample,
    shrink_deepspeed,
    shrink_profile,
)

ROOT = Path(__file__).parents[3]
PARAMS = ROOT / "params.yaml"
CPU, GPUS = RehearsalMachine(2, has_gpu=False), RehearsalMachine(8, has_gpu=True)


def sampled(block, records=30, characters=600):
    return [
        SourceSample(
            name,
            {"kind": "files", "paths": [f"samples/{name}.jsonl"], "rows": "text", "columns": {}, "expected_rows": None},
            (characters,) * records,
            "the first records",
            is_generated=False,
            refused={},
        )
        for name in block["sources"]
    ]


def own_base(block):
    return RehearsedBase(
        block["base"],
        block["model_name"],
        block["expected_model"],
        "the real base",
        is_real=True,
        has_own_tokenizer=True,
    )


def leaves(value, key=""):
    if isinstance(value, dict):
        return {name: one for inner, part in value.items() for name, one in leaves(part, f"{key}.{inner}").items()}
    return {key.removeprefix("."): value}


@pytest.mark.parametrize("machine", [CPU, GPUS], ids=["cpu", "gpus"])
@pytest.mark.parametrize("name", list(load_profiles(PARAMS)[1]))
def test_every_profile_stays_valid_and_every_difference_is_listed(name, machine):
    block = read_block(PARAMS, name)
    before = deepcopy(block)
    small, changes = shrink_profile(block, sampled(block), own_base(block), machine)
    assert block == before
    profile = TypeAdapter(Profile).validate_python(small)
    assert profile.num_train_epochs == 1
    groups = machine.ranks // profile.sequence_parallel
    assert profile.global_batch_size % (profile.per_device_train_batch_size * groups) == 0
    named = {change.key for change in changes}
    real, rehearsed = leaves(block), leaves(small)
    other = {key for key in {*real, *rehearsed} if real.get(key) != rehearsed.get(key) and key != "datasets"}
    hidden = {key for key in other if not any(key == one or key.startswith(f"{one}.") for one in named)}
    assert hidden == set()
    for key in ("layout", "template", "superhot", "superhot_config", "peft_model", "lr_schedule", "gate", "history"):
        assert small[key] == block[key]


def test_the_published_profile_on_a_cpu_names_what_a_cpu_cannot_do():
    block = read_block(PARAMS, "llama2_13b_orca_8k")
    small, changes = shrink_profile(block, sampled(block), own_base(block), CPU)
    why = {change.key: (change.real, change.rehearsed) for change in changes if change.why}
    assert why["dtype"] == ("fp16", "bf16")
    assert why["use_flash_attention"] == ("true", "false")
    assert small["max_length"] == 384
    assert shrink_profile(block, sampled(block), own_base(block), GPUS)[0]["dtype"] == "fp16"


@pytest.mark.parametrize(("records", "passes"), [(30, 2), (8, 1), (2, 1)])
def test_the_batch_gets_smaller_with_the_sample(records, passes):
    block = {**read_block(PARAMS, "laptop"), "global_batch_size": 64}
    small, _ = shrink_profile(block, sampled(block, records), own_base(block), CPU)
    assert small["gradient_accumulation_steps"] == passes
    rows = sum(int(records * 0.8) for _ in block["sources"])
    assert small["global_batch_size"] * (STEPS if records > 2 else 1) <= max(rows, 2)


def test_with_few_records_no_source_can_be_without_validation():
    block = {**read_block(PARAMS, "laptop"), "split": "by_hash"}
    assert shrink_profile(block, sampled(block, 5), own_base(block), CPU)[0]["split"] == "permutation"
    assert shrink_profile(block, sampled(block, 30), own_base(block), CPU)[0]["val_split"] == 0.5


@pytest.mark.parametrize("preset", ["lora", "finetune"])
def test_presets_stay_what_they_are(preset):
    block = {
        **read_block(PARAMS, "smollm2"),
        **{key: resolve_preset(PARAMS, preset)[key] for key in ("lora", "peft_model")},
    }
    small, _ = shrink_profile(block, sampled(block), own_base(block), CPU)
    profile = TypeAdapter(Profile).validate_python(small)
    assert (profile.peft_model, profile.layout) == (preset == "lora", "packed")


def test_a_deepspeed_json_loses_what_needs_a_gpu_and_keeps_the_rest():
    stated = {
        "optimizer": {"type": "Adam"},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5e8, "x": 1},
    }
    text, changes = shrink_deepspeed(json.dumps(stated), "zero.json", CPU)
    small = json.loads(text)
    assert small["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 5_000_000, "x": 1}
    assert small["optimizer"] == {"type": "AdamW", "params": {"torch_adam": True}}
    assert len(changes) == 3
    kept = json.loads(shrink_deepspeed(json.dumps(stated), "zero.json", GPUS)[0])
    assert kept["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert shrink_deepspeed("{", "zero.json", CPU) == ("{", ())
