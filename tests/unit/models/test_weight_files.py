"""Weights are read from safetensors of the model's own folder, whatever its files name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ropeway.models.open_model import load_with_info, open_folder, read_config
from ropeway.runtime.errors import ConfigError, DataError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a model, beside weights that no folder of it names."""
    torch.manual_seed(0)
    shape = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    folder = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2)).save_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(one) for name, one in held.items()}, tmp_path / "other.safetensors")
    torch.save({name: torch.zeros_like(one) for name, one in held.items()}, folder / "adapter_model.bin")
    return folder


def configured(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def indexed(file, *, alone=True):
    def change(folder):
        names = load_file(folder / "model.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
        (folder / INDEX).write_text(json.dumps(index))
        if alone:
            (folder / "model.safetensors").unlink()

    return change


def adapted(name):
    return lambda folder: (folder / name).write_text('{"base_model_name_or_path": "/elsewhere"}')


ELSEWHERE = {
    "an adapter": (adapted("adapter_config.json"), DataError),
    "an adapter on a file system that ignores case": (adapted("Adapter_Config.json"), DataError),
    "the config names a pickle": (configured(transformers_weights="adapter_model.bin"), ConfigError),
    "the config names safetensors": (configured(transformers_weights="model.safetensors"), ConfigError),
    "the config renames the setting": (
        configured(attribute_map={"transformers_weights": "note"}, note="adapter_model.bin"),
        ConfigError,
    ),
    "an index with a relative path": (indexed("../other.safetensors"), DataError),
    "an index with an absolute path": (indexed("/other.safetensors"), DataError),
    "an index with a pickle": (indexed("adapter_model.bin"), DataError),
    "an index with no name": (indexed(7), DataError),
    "an index beside a single file": (indexed("model.safetensors", alone=False), DataError),
}


@pytest.mark.parametrize("opened", [lambda folder: open_folder(folder, torch.float32), load_with_info])
@pytest.mark.parametrize(("change", "error"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_weights_that_would_come_from_elsewhere_are_refused(folder, opened, change, error):
    change(folder)
    with pytest.raises(error):
        opened(folder)


def test_weights_in_several_files_of_the_folder_are_opened(folder):
    expected = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(expected)
    for file, some in (("a.safetensors", names[:3]), ("b.safetensors", names[3:])):
        save_file({name: expected[name] for name in some}, folder / file, metadata={"format": "pt"})
    placed = {name: "a.safetensors" if name in names[:3] else "b.safetensors" for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    found = open_folder(folder, torch.float32).state_dict()
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def test_a_base_whose_config_renames_the_setting_is_refused_before_its_weights_are_read(folder):
    configured(attribute_map={"transformers_weights": "note"}, note="adapter_model.bin")(folder)
    with pytest.raises(ConfigError, match="transformers_weights"):
        read_config(folder, {})
