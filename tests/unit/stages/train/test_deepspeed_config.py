"""The optimizer of a DeepSpeed JSON runs without a compiler on a GPU, or is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from deepspeed.runtime import lr_schedules
from torch.utils import cpp_extension

from ropeway.config.load_params import load_profile
from ropeway.runtime.errors import ConfigError
from ropeway.stages.train.deepspeed_config import (
    check_optimizer,
    parse_deepspeed_json,
    plan_deepspeed,
    without_compiler,
)
from ropeway.stages.train.training_run import learning_rate

CONFIGS = Path(__file__).parents[4] / "configs"


@pytest.fixture(params=[None, "empty"])
def no_nvcc(request, tmp_path, monkeypatch):
    """No CUDA toolkit, or one for running programs only, without a compiler."""
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", request.param and str(tmp_path))


@pytest.mark.usefixtures("no_nvcc")
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("zero*.json")), ids=lambda path: path.stem)
def test_every_shipped_configuration_needs_no_compiler(path):
    check_optimizer(parse_deepspeed_json(path.read_text(), path.name), path.name)


@pytest.mark.usefixtures("no_nvcc")
@pytest.mark.parametrize("named", [{}, {"optimizer": {"type": "AdamW"}}, {"optimizer": {"type": "Lion"}}])
def test_an_optimizer_that_deepspeed_compiles_is_refused_without_nvcc(named):
    with pytest.raises(ConfigError, match=r'a\.json.*nvcc.*"torch_adam": true'):
        check_optimizer(named, "a.json")


def test_an_optimizer_that_deepspeed_compiles_is_accepted_with_nvcc(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    check_optimizer({"optimizer": {"type": "AdamW"}}, "a.json")


@pytest.mark.usefixtures("no_nvcc")
def test_an_offloaded_optimizer_needs_no_cuda_compiler():
    check_optimizer({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "a.json")


def test_the_published_optimizer_makes_the_steps_of_plain_adamw():
    params = json.loads((CONFIGS / "zero_config_pretrain.json").read_text())["optimizer"]["params"]
    assert params.pop("torch_adam")
    results = []
    for options in (params, {}):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 50))
        optimizer = torch.optim.AdamW([weight], lr=1e-2, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.1, **options)
        for step in range(5):
            weight.grad = torch.sin(weight.detach() * (step + 1))
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 3, 6])
def test_deepspeed_s_schedule_has_the_rates_that_are_checked_at_every_step(schedule, warmup):
    profile = load_profile(CONFIGS.parent / "params.yaml", "laptop")[1]
    changed = profile.model_copy(update={"lr_schedule": schedule, "warmup_steps": warmup, "learning_rate": 0.5})
    stated = plan_deepspeed(changed, {}, ranks=1, accumulation_steps=1, total_steps=12)["scheduler"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = getattr(lr_schedules, stated["type"])(optimizer, **stated["params"])
    for applied in range(12):
        rate = optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(learning_rate(changed, applied, total_steps=12), abs=1e-12), applied
        if schedule == "constant" and not warmup:
            assert rate == 0.5
        scheduler.step()


@pytest.mark.parametrize(
    ("optimizer", "stated", "found"),
    [("AdamW", None, "1"), (None, None, "1"), ("Muon", None, None), ("AdamW", "0", "0"), ("Muon", "1", "1")],
)
def test_deepspeed_starts_without_torchs_compiler_unless_its_optimizer_needs_it(monkeypatch, optimizer, stated, found):
    name = "TORCHDYNAMO_DISABLE"
    monkeypatch.delenv(name, raising=False)
    if stated is not None:
        monkeypatch.setenv(name, stated)
    named = {"optimizer": {"type": optimizer}} if optimizer else {}

    def start():
        with without_compiler(named):
            assert os.environ.get(name) == found
            raise ConfigError("a start that fails")

    with pytest.raises(ConfigError):
        start()
    assert os.environ.get(name) == stated
