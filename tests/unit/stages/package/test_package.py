import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ropeway.config.edit import cut_block, inherited_names, write_blocks
from ropeway.config.load_params import read_block
from ropeway.config.sections import PersonalData
from ropeway.data.raw_records import RawWriter
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.conversation import Conversation
from ropeway.models.rope import build_scaling
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.workspace import Workspace
from ropeway.stages.package.facts import count_systems
from ropeway.stages.package.model_config import (
    TESTED_LOADER,
    lowest_loader,
    plan_config,
    plan_special_tokens_map,
    plan_tokenizer,
    plan_tokenizer_config,
)
from ropeway.stages.package.weights import (
    EMBEDDING,
    HEAD,
    INDEX,
    SINGLE,
    locate_tensors,
    name_shards,
    plan_shards,
    read_dtypes,
    write_weights,
)
from tests.support.tiny_run import ROOT

STOPS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
TRAINED = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "max_position_embeddings": 4096, "use_cache": False,
    "dtype": "float32", "transformers_version": "5.24.0", "_name_or_path": "/home/me/base",
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
}  # fmt: skip


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 60))
def test_every_tensor_is_in_one_shard_and_only_a_larger_tensor_makes_a_larger_shard(sizes, limit):
    named = {f"t{number:02d}": size for number, size in enumerate(sizes)}
    shards = plan_shards(named, limit)
    assert [name for shard in shards for name in shard] == list(named)
    for shard in shards:
        assert len(shard) == 1 or sum(named[name] for name in shard) <= limit


def test_shards_have_the_file_names_of_transformers():
    assert name_shards(1) == ["model.safetensors"]
    assert name_shards(3)[2] == "model-00003-of-00003.safetensors"


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    weights = {EMBEDDING: torch.randn(10, 4), HEAD: torch.randn(10, 4), "model.norm.weight": torch.ones(4)}
    save_file(weights, folder / SINGLE)
    (tmp_path / "out").mkdir()
    return folder, tmp_path / "out", weights


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_weights_are_cast_sharded_and_indexed(export, dtype, torch_dtype):
    source, target, weights = export
    written = write_weights(source, target, dtype=dtype, max_shard_bytes=100, tied=False)
    assert (written.parameters, written.bytes) == (84, 168)
    index = json.loads((target / INDEX).read_bytes())
    assert index["metadata"]["total_size"] == 168
    for name, tensor in weights.items():
        stored = load_file(target / index["weight_map"][name])[name]
        assert torch.equal(stored, tensor.to(torch_dtype))
    assert {kind for path in target.glob("*.safetensors") for _, kind in read_dtypes(path)} == {
        dtype.replace("fp", "F").replace("bf", "BF")
    }


def test_one_shard_has_no_index(export):
    source, target, _ = export
    write_weights(source, target, dtype="fp32", max_shard_bytes=10**9, tied=False)
    assert [path.name for path in target.iterdir()] == [SINGLE]


def test_a_value_beyond_the_maximum_of_fp16_is_an_error(export):
    source, target, weights = export
    save_file({**weights, "model.norm.weight": torch.full((4,), 70000.0)}, source / SINGLE)
    with pytest.raises(DataError, match=r"model.norm.weight has values up to 70000, the maximum of fp16 is 65504"):
        write_weights(source, target, dtype="fp16", max_shard_bytes=10**9, tied=False)


def test_a_tied_head_is_not_stored_and_must_equal_the_embedding(export):
    source, target, weights = export
    with pytest.raises(DataError, match=r"ties lm_head.weight to model.embed_tokens.weight, but they differ by up to"):
        write_weights(source, target, dtype="fp32", max_shard_bytes=10**9, tied=True)
    save_file({**weights, HEAD: weights[EMBEDDING].clone()}, source / SINGLE)
    write_weights(source, target, dtype="fp32", max_shard_bytes=10**9, tied=True)
    assert sorted(load_file(target / SINGLE)) == [EMBEDDING, "model.norm.weight"]


def test_the_config_has_scaling_dtype_and_cache_under_old_and_new_keys():
    config = plan_config(TRAINED, rope=build_scaling("linear", 2.0, 10000.0, 4096), dtype="bf16", stops=STOPS)
    assert config["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["use_cache"] is True
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert config["max_position_embeddings"] == 4096


def test_the_config_has_no_path_and_no_library_version():
    config = plan_config(TRAINED, rope=build_scaling("linear", 2.0, 10000.0, 4096), dtype="bf16", stops=STOPS)
    assert not {"transformers_version", "_name_or_path"} & set(config)


@pytest.mark.parametrize(
    "rope", [build_scaling("default", 1.0, 10000.0, 4096), build_scaling("linear", 1.0, 10000.0, 4096)]
)
def test_a_model_without_scaling_has_no_rope_scaling_for_old_loaders_to_refuse(rope):
    config = plan_config(TRAINED, rope=rope, dtype="fp16", stops=STOPS)
    assert config["rope_scaling"] is None
    assert config["rope_parameters"]["rope_theta"] == 10000.0


def test_of_another_family_than_llama_the_tested_version_is_stated():
    assert lowest_loader(build_scaling("linear", 2.0, 10000.0, 4096), {"model": {}}, "helium") == TESTED_LOADER


def test_the_lowest_loader_depends_on_theta_scaling_and_tokenizer():
    linear, old = build_scaling("linear", 2.0, 10000.0, 4096), {"model": {"merges": ["a b"]}}
    assert lowest_loader(linear, old, "llama") == "4.31.0"
    assert lowest_loader(build_scaling("default", 1.0, 100000.0, 8192), old, "llama") == "4.33.0"
    assert lowest_loader(build_scaling("llama3", 8.0, 500000.0, 8192), old, "llama") == "4.43.0"
    assert lowest_loader(linear, {"model": {"ignore_merges": True, "merges": ["a b"]}}, "llama") == "4.40.0"
    assert lowest_loader(linear, {"model": {"merges": [["a", "b c"]]}}, "llama") == "4.45.0"


def test_merges_are_strings_for_old_tokenizers_unless_a_token_has_a_space():
    tree = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"], ["ab", "c"]]}}
    assert plan_tokenizer(tree)["model"] == {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b", "ab c"]}
    assert plan_tokenizer(plan_tokenizer(tree)) == plan_tokenizer(tree)
    for other in ([["a", " b"]], [], None):
        kept = {"model": {"type": "BPE", "merges": other}}
        assert plan_tokenizer(kept) == kept


def test_the_tokenizer_config_drops_keys_that_only_some_loaders_read():
    trained = {
        "tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True, "model_max_length": 10**30,
        "extra_special_tokens": ["<|system|>"], "bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>",
        "pad_token": "</s>", "padding_side": "left", "mask_token": None,
        "additional_special_tokens": [*OPEN_ASSISTANT.added_tokens],
    }  # fmt: skip
    config = plan_tokenizer_config(trained, OPEN_ASSISTANT, max_length=8192)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config["bos_token"], config["eos_token"], config["model_max_length"]) == ("<s>", "</s>", 8192)
    assert config["padding_side"] == "right"
    assert not {"extra_special_tokens", "backend", "is_local", "mask_token"} & set(config)
    assert plan_special_tokens_map(config) == {
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>",
        "additional_special_tokens": list(OPEN_ASSISTANT.added_tokens),
    }  # fmt: skip


FILE = """\
# Head.
profile: b

a: &first
  # Inside.
  x: 1

  # Still inside.
  y: {z: 2}
# About b.
# Two lines.
b: &second   # it
  <<: *first
  x: 3  # own

c:
  <<: *second
  w: 0
"""


def test_a_block_is_cut_with_its_comments_and_without_other_blocks():
    assert cut_block(FILE, "b") == "# About b.\n# Two lines.\nb: &second   # it\n  <<: *first\n  x: 3  # own\n"
    assert cut_block(FILE, "a").splitlines()[-1] == "  y: {z: 2}"


def test_inherited_blocks_come_before_the_block():
    assert inherited_names(FILE, "c") == ["a", "b"]
    assert inherited_names(FILE, "a") == []
    assert inherited_names("a: &a {x: 1}\nb: &b {y: 2}\nc:\n  <<: [*a, *b]\n", "c") == ["a", "b"]


def test_cut_blocks_have_the_same_values_as_in_the_file(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text(FILE)
    write_blocks(params, "c", tmp_path / "run.yaml")
    assert read_block(tmp_path / "run.yaml", "c") == {"x": 3, "y": {"z": 2}, "w": 0}


@pytest.mark.parametrize("name", ["laptop", "smollm2", "llama2_13b_orca_8k"])
def test_every_shipped_profile_can_be_cut_out(tmp_path, name):
    write_blocks(ROOT / "params.yaml", name, tmp_path / "run.yaml")
    text = (tmp_path / "run.yaml").read_text()
    assert read_block(tmp_path / "run.yaml", name) == read_block(ROOT / "params.yaml", name)
    assert "profile:" not in text


def test_a_block_that_changes_when_cut_out_is_refused(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text("shared: &it {x: 1}\na:\n  x: 0\n  nested: *it\n")
    with pytest.raises(ConfigError, match=r"profile 'a': .*`<<: \*name`"):
        write_blocks(params, "a", tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "index", [b"{", b"[]", b"{}", b'{"weight_map": 1}', b'{"weight_map": {"w": 1}}',
              b'{"weight_map": {"w": "../../secret.safetensors"}}', b'{"weight_map": {"w": "x.bin"}}', b"[" * 100_000],
)  # fmt: skip
def test_an_index_of_weights_names_files_of_its_own_folder(tmp_path, index):
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(DataError, match="weight_map"):
        locate_tensors(tmp_path)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("off", {"Mail anna@example.org": 1, "Mail bert@example.org": 1, "": 1}),
        ("count", {"Mail anna@example.org": 1, "Mail bert@example.org": 1, "": 1}),
        ("mask", {"Mail [EMAIL]": 2, "": 1}),
        ("refuse", {"Mail [EMAIL]": 2, "": 1}),
    ],
)
def test_personal_data_that_no_model_reads_is_not_in_the_card_either(tmp_path, action, expected):
    workspace = Workspace(tmp_path, "tiny")
    with RawWriter(workspace.raw / "chats", "conversation") as raw:
        for system in ("Mail anna@example.org", "Mail bert@example.org", ""):
            raw.add(Conversation(("Hi", "Hello"), system))
    personal = PersonalData(action=action, kinds=["email"])
    assert count_systems(workspace, {"sources": {"chats": {"kind": "conversation"}}}, personal) == expected
