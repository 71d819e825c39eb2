"""What the published parameters amount to: 3,319 steps, and DeepSpeed's configuration in full."""

import json
from pathlib import Path

import pytest

from ropeway.config.load_params import load_profile
from ropeway.data.accumulation import accumulation_steps
from ropeway.planning.memory import Sizes
from ropeway.planning.plan import plan_run
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.workspace import Workspace
from ropeway.stages.train.deepspeed_config import parse_deepspeed_json, plan_deepspeed
from ropeway.stages.train.training_run import learning_rate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def published():
    return load_profile(ROOT / "params.yaml", "llama2_13b_orca_8k")[1]


def test_the_published_run_takes_3319_steps_on_8_ranks(published):
    plan = plan_run(Workspace(ROOT, "llama2_13b_orca_8k"), published, ranks=8)
    assert plan.rows_per_source == {"orca-chat": 188_842, "fanfics": 47_760, "red_pajama": 188_262}
    assert (plan.rows, plan.optimizer_steps, plan.accumulation_steps) == (424_864, 3319, 8)
    assert plan.other_ranks[4] == {"accumulation_steps": 16, "optimizer_steps": 3319, "original": 6638}
    assert plan.other_ranks[16] == {"accumulation_steps": 4, "optimizer_steps": 3319, "original": 1659}
    assert json.loads(plan.as_json())["optimizer_steps"] == 3319


@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_the_published_plan_in_full(published, ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("ROPEWAY_REGISTRY", raising=False)
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # a workspace in which nothing has been made yet
    plan = json.loads(plan_run(Workspace(tmp_path, "llama2_13b_orca_8k"), published, ranks=ranks).as_json())
    assert plan.pop("disk_free_bytes") > 0
    assert plan == json.loads((Path(__file__).parent / "plans.json").read_text())[str(ranks)]
    assert {size: card["fits"] for size, card in plan["cards"].items()} == {"40": False, "80": ranks >= 8}


def test_the_published_model_has_the_weights_of_llama_2_13b_with_16_more_rows(published):
    # Llama-2-13b has 13,015,864,320 weights (its safetensors index); 2 x 16 rows x 5,120 are added.
    assert Sizes.of(published).parameters == 13_015_864_320 + 2 * 16 * 5120


def test_ranks_that_do_not_divide_are_refused_with_all_numbers(published):
    with pytest.raises(ConfigError, match=r"128, not a multiple of per_device_train_batch_size 2 x 6 ranks = 12"):
        accumulation_steps(published, 6)


def test_the_cards_accumulation_is_checked_on_8_ranks_and_ignored_elsewhere(published):
    wrong = published.model_copy(update={"gradient_accumulation_steps": 4})
    assert accumulation_steps(wrong, 4) == 16
    with pytest.raises(ConfigError, match="gradient_accumulation_steps is 4"):
        accumulation_steps(wrong, 8)


def test_the_published_deepspeed_configuration_in_full(published):
    named = parse_deepspeed_json((ROOT / published.deepspeed_config).read_text(), published.deepspeed_config)
    assert plan_deepspeed(published, named, ranks=8, accumulation_steps=8, total_steps=3319) == {
        "train_batch_size": 128,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 2.0,
        "fp16": {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "bf16": {"enabled": False},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "torch_adam": True,
                "fused": True,
                "lr": 1e-5,
                "betas": [0.9, 0.95],
                "eps": 1e-12,
                "weight_decay": 0.0,
            },
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {
                "warmup_min_lr": 0.0,
                "warmup_max_lr": 1e-5,
                "warmup_num_steps": 100,
                "warmup_type": "linear",
            },
        },
        "zero_optimization": {
            "stage": 2,
            "allgather_partitions": True,
            "allgather_bucket_size": 1_000_000_000,
            "overlap_comm": False,
            "reduce_scatter": True,
            "reduce_bucket_size": 1_000_000_000,
            "contiguous_gradients": True,
        },
        "steps_per_print": 2**31,
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_batch_size": 64}, "train_batch_size: set by params.yaml"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "optimizer.params.lr: set by params.yaml"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: set by params.yaml"),
        ({"zero_optimization": {"stage": "auto"}}, '"auto" is not supported'),
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation: unknown key"),
    ],
)
def test_a_second_source_of_truth_in_the_deepspeed_json_is_refused(tmp_path, change, says):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(change))
    with pytest.raises(ConfigError) as caught:
        parse_deepspeed_json(path.read_text(), path.name)
    assert says in str(caught.value)


def test_the_rate_warms_up_after_two_steps_at_zero_and_then_stays(published):
    rates = [learning_rate(published, applied, total_steps=3319) for applied in range(105)]
    assert rates[:3] == [0.0, 0.0, pytest.approx(1e-7)]
    assert rates[100] == pytest.approx(9.9e-6)
    assert rates[101:] == [1e-5] * 4
