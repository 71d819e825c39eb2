"""The optimizer of a DeepSpeed JSON runs without a compiler on a GPU, or is refused."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from ropeway.runtime.errors import ConfigError
from ropeway.stages.train.deepspeed_config import check_optimizer, parse_deepspeed_json

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
