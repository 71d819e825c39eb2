"""A stand-in has its base's family, tokenizer and proportions, and few weights."""

import json

import pytest
import torch
from transformers import AutoConfig

from ropeway.config.load_params import load_profile
from ropeway.models.open_model import head_dim, model_class, read_config
from ropeway.models.tokenizer import train_tokenizer
from ropeway.rehearse import stand_in
from ropeway.rehearse.rehearsal import _make_empty
from ropeway.rehearse.stand_in import (
    BaseChoice,
    choose_base,
    count_weights,
    fit_vocabulary,
    make_base,
    shrink_config,
    shrink_shape,
)
from ropeway.runtime.errors import ConfigError
from tests.support.families import FAMILIES
from tests.support.rehearsing import SMALL, make_chats
from tests.support.whole_run import TEXTS, rewrite

WORDS = [row["text"] for row in TEXTS] * 3


def load(workspace):
    return load_profile(workspace.root / "params.yaml")[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_of_every_family_gets_smaller_in_its_own_kind(name):
    family = FAMILIES[name]
    deep = {} if "layer_types" in family.more else {"num_hidden_layers": 12}
    config = AutoConfig.for_model(family.model_type, **{**family.sizes, **deep, "intermediate_size": 256})
    small = shrink_config(config, 1)
    assert (small.model_type, small.vocab_size) == (config.model_type, config.vocab_size)
    assert small.hidden_size <= config.hidden_size
    assert head_dim(small) == head_dim(config)
    assert small.rope_parameters == config.rope_parameters
    assert getattr(small, "sliding_window", None) == getattr(config, "sliding_window", None)
    with torch.device("meta"):
        parts = [sum(one.numel() for one in model_class(each)(each).parameters()) for each in (small, config)]
    assert parts[0] < parts[1]


def test_a_large_base_is_replaced_by_its_own_family_with_its_own_tokenizer(tmp_path, monkeypatch):
    workspace = make_chats(tmp_path, family=FAMILIES["qwen3"])
    profile = load(workspace)
    assert choose_base(workspace.root, profile, has_gpu=False).way == "real"
    monkeypatch.setattr(stand_in, "MOST_WEIGHTS", {False: 100, True: 100})
    choice = choose_base(workspace.root, profile, has_gpu=False)
    made = make_base(profile, choice, WORDS, tmp_path / "made", length=64)
    config = read_config(tmp_path / "made" / made.model_name, {})
    assert (config.model_type, made.is_real, made.has_own_tokenizer) == ("qwen3", False, True)
    assert made.shape is None
    own, copied = (folder / "tokenizer.json" for folder in (tmp_path / "base", tmp_path / "made" / made.model_name))
    assert own.read_bytes() == copied.read_bytes()


def test_a_family_that_cannot_be_made_smaller_is_replaced_by_a_llama_and_says_so(tmp_path, monkeypatch):
    workspace = make_chats(tmp_path, family=FAMILIES["qwen3"])
    profile = load(workspace)

    def refuse(_config, _shared):
        raise ValueError("4096 heads or none")

    monkeypatch.setattr(stand_in, "shrink_config", refuse)
    made = make_base(profile, BaseChoice("like files", tmp_path / "base"), WORDS, tmp_path / "made", length=64)
    config = read_config(tmp_path / "made" / made.model_name, {})
    assert (config.model_type, config.vocab_size) == ("llama", 2000)
    assert "4096 heads or none" in made.words


@pytest.mark.parametrize("template", ["open_assistant", "base"])
def test_a_missing_base_is_a_small_llama_in_the_stated_proportions(tmp_path, template):
    workspace = make_chats(tmp_path)
    shape = {
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 9, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 4096, "rope_theta": 1e6,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    changes = {"model_name": "gone", "expected_model": shape, "superhot": True, "template": template}
    rewrite(workspace, changes | {"superhot_config": {"type": "linear", "scale": 2}, "what_counts": "answers"})
    profile = load(workspace)
    choice = choose_base(workspace.root, profile, has_gpu=False)
    assert choice.way == "like shape"
    made = make_base(profile, choice, WORDS, tmp_path / "made", length=128)
    assert made.shape["num_attention_heads"] / made.shape["num_key_value_heads"] == 4
    assert (made.shape["rope_theta"], made.shape["tie_word_embeddings"]) == (1e6, True)
    assert made.shape["max_position_embeddings"] == 64
    stated = json.loads((tmp_path / "made" / made.model_name / "tokenizer_config.json").read_text())
    assert ("chat_template" in stated) == (template == "base")


def test_heads_of_a_stand_in_can_be_shared_by_the_ranks_that_share_rows(tmp_path):
    profile = load(make_chats(tmp_path)).model_copy(update={"sequence_parallel": 8})
    published = load_profile(tmp_path / "workspace" / "params.yaml")[1]
    assert published.sequence_parallel == 1
    from ropeway.config.sections import ModelShape

    shape = ModelShape(
        hidden_size=4096, intermediate_size=1, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=9, max_position_embeddings=9, rope_theta=1e4, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    small = shrink_shape(profile, shape, length=64)
    assert small.num_attention_heads % 8 == 0
    assert count_weights(small) < count_weights(shape)


def test_a_base_that_is_here_and_cannot_be_trained_is_refused(tmp_path):
    workspace = make_chats(tmp_path, family=SMALL)
    (tmp_path / "base" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="adapter"):
        choose_base(workspace.root, load(workspace), has_gpu=False)


def test_a_tokenizer_of_a_poor_sample_has_the_tokens_that_it_gives():
    with pytest.raises(ConfigError):
        train_tokenizer(["ab ab ab ab"], vocab_size=300)
    assert fit_vocabulary(["ab ab ab ab"], 320).get_vocab_size() < 300


def test_a_workspace_that_cannot_be_made_is_refused_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/workspace: the rehearsal's workspace cannot be made"):
        _make_empty(tmp_path / "file" / "workspace")
    _make_empty(tmp_path / "workspace")
    (tmp_path / "workspace" / "left").write_text("")
    _make_empty(tmp_path / "workspace")
    assert [path.name for path in (tmp_path / "workspace").iterdir()] == [".work"]
