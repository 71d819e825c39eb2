"""Each kind of training that params can ask for, on two real DeepSpeed ranks, from base and data to an export."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.training import forget, start, train, zero

LORA = (
    "peft_model: true\n"
    "  lora: {rank: 4, alpha: 8, dropout: 0.1, target_modules: [q_proj, v_proj], train_embeddings: false}"
)
YARN = "superhot_config: {type: yarn, scale: 2, beta_fast: 32, beta_slow: 1}"
LLAMA3 = "superhot_config: {type: llama3, scale: 2, low_freq_factor: 1, high_freq_factor: 4}"


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.fixture(scope="module")
def zero2(tmp_path_factory):
    return weights(train(tmp_path_factory.mktemp("zero2"), zero(2))[1].model)


CPU = {"device": "cpu"}
STATES = {
    "zero1": zero(1),
    "zero3": zero(3),
    "optimizer offloaded": zero(2, offload_optimizer=CPU),
    "all offloaded": zero(3, offload_optimizer=CPU, offload_param=CPU),
}
SLOW = ("zero1", "zero3", "optimizer offloaded")  # each a part of what "all offloaded" does
NAMED = [pytest.param(one, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, one in STATES.items()]


@pytest.mark.parametrize("named", NAMED)
def test_every_zero_stage_and_offload_gives_the_model_of_zero2(tmp_path, zero2, named):
    _, workspace = train(tmp_path, named)
    found = weights(workspace.model)
    assert found.keys() == zero2.keys()
    for name, part in zero2.items():
        assert torch.allclose(found[name], part, atol=1e-5), name


def test_lora_trains_its_layers_alone_and_exports_a_plain_model(tmp_path):
    _, workspace = train(tmp_path, zero(2), LORA, LLAMA3)
    stated = json.loads((workspace.model / "config.json").read_text())
    assert (stated["rope_parameters"]["rope_type"], stated["max_position_embeddings"]) == ("llama3", 96)
    base, found = weights(workspace.base), weights(workspace.model)
    changed = {name for name, part in base.items() if not torch.equal(found[name], part)}
    assert found.keys() == base.keys()
    assert changed == {f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "qv"}
    forget(workspace, 1)
    assert "resuming after step 2" in start(workspace)
    again = weights(workspace.model)
    assert all(torch.equal(again[name], part) for name, part in found.items())  # dropout drew the same


def test_lora_under_zero3_and_yarn_exports_merged_weights(tmp_path):
    _, workspace = train(tmp_path, zero(3), LORA, YARN)
    stated = json.loads((workspace.model / "config.json").read_text())["rope_parameters"]
    assert (stated["rope_type"], stated["original_max_position_embeddings"]) == ("yarn", 48)
    base, found = weights(workspace.base), weights(workspace.model)
    changed = {name for name, part in base.items() if not torch.equal(found[name], part)}
    assert changed == {f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "qv"}


def test_another_rank_count_resumes_with_the_same_rows_in_order(tmp_path, zero2):
    _, workspace = train(tmp_path, zero(2))
    by_two = forget(workspace, 2)
    assert "converting it for 1" in start(workspace, ranks=1)
    two_then_one = forget(workspace, 1)
    assert "converting it for 2" in start(workspace, ranks=2)
    two_one_two = forget(workspace, 1)
    logs = [[line["rows"] for line in log] for log in (by_two, two_then_one, two_one_two)]
    assert len(logs[0]) == 3
    assert logs[0] == logs[1] == logs[2]
    found = weights(workspace.model)
    for name, part in zero2.items():
        assert torch.allclose(found[name], part, atol=1e-5), name


def checkpoint_files(workspace):
    """Return the files of each checkpoint of the run, with their sha256."""
    manifests = sorted(workspace.checkpoints.glob("*/step-*/manifest.json"))
    return {path.parent.name: json.loads(path.read_text())["files"] for path in manifests}


KINDS = {
    "zero2": (zero(2),),
    "zero0": (zero(0),),
    "all offloaded": (zero(3, offload_optimizer=CPU, offload_param=CPU),),
    "optimizer offloaded": (zero(2, offload_optimizer=CPU),),
    "lora": (zero(2), LORA),
}
FAST = ("zero2",)


@pytest.mark.parametrize(
    "kind", [pytest.param(one, marks=[] if one in FAST else pytest.mark.slow, id=one) for one in KINDS]
)
def test_checkpoints_written_in_the_background_have_the_same_bytes(tmp_path, kind):
    found = []
    for flag in ("false", "true"):
        said, workspace = train(tmp_path / flag, *KINDS[kind], f"async_save: {flag}")
        found.append((checkpoint_files(workspace), (workspace.model / "model.safetensors").read_bytes()))
        assert ("of which training waited" in said) == (flag == "true")
    assert list(found[0][0]) == ["step-000001", "step-000002", "step-000003"]
    assert found[0] == found[1]
    forget(workspace, 1)
    assert "resuming after step 2" in start(workspace)
    assert checkpoint_files(workspace) == found[0][0]
