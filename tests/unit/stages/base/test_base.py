import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropeway.config.load_params import load_profile
from ropeway.config.sections import (
    FolderBase,
    GgufBase,
    Llama3Scaling,
    LongropeScaling,
    ModelShape,
    ScratchBase,
    ThetaScaling,
)
from ropeway.config.stages import READS
from ropeway.data.raw_records import RawWriter
from ropeway.models.base_rope import scaling_from_json
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.tokenizer import open_tokenizer
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.manifest import file_sha256, load_manifest, write_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.base import stage as base
from ropeway.stages.base.stage import check_gguf_rope, plan_vocabulary, resize
from tests.support import tiny_gguf
from tests.support.tiny_run import PARITY, ROOT

_, PUBLISHED = load_profile(ROOT / "params.yaml", "llama2_13b_orca_8k")
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 400,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def profile(**changes):
    shape = ModelShape(**(SHAPE | changes.pop("shape", {})))
    values = {"base": ScratchBase(kind="scratch"), "model_name": "scratch", "max_length": 96, "expected_model": shape}
    return PUBLISHED.model_copy(update=values | changes).reading(READS["base"])


def lay(root):
    workspace = Workspace(root, "run")
    with RawWriter(workspace.raw / "text", "document") as writer:
        for number in range(200):
            writer.add(f"The lamp number {number} burns at dusk.\n\n    oil = {number * 7}\n")
    write_manifest(workspace.raw, {"sources": {"text": {"kind": "document", "read": 200, "kept": 200, "refused": {}}}})
    return workspace


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    workspace = lay(tmp_path_factory.mktemp("base"))
    base.run(workspace, profile())
    return workspace


def original(folder, tokenizer="tokenizer_base", *, rows=2000, **changes):
    """A Llama as another program writes it, with the vectors' tokenizer."""
    torch.manual_seed(3)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shape = {name: SHAPE[name] for name in (*names, "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")}
    config = LlamaConfig(**(shape | {"vocab_size": rows} | changes))
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    shutil.copytree(PARITY / tokenizer, folder, dirs_exist_ok=True)
    return folder


def of_folder(name, *, rows=2000, **changes):
    return profile(base=FolderBase(kind="folder"), model_name=name, shape={"vocab_size": rows}, **changes)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_base_from_scratch_is_whole_and_says_what_it_is(scratch):
    manifest = load_manifest(scratch.base, remedy="")
    assert manifest["special"] == {"bos": 1, "eos": 2, "pad": 2} | dict(
        zip(OPEN_ASSISTANT.added_tokens, range(400, 405), strict=True)
    )
    assert manifest["template"] == OPEN_ASSISTANT.digest
    assert manifest["tokenizer"] == file_sha256(scratch.base / "tokenizer.json")
    assert manifest["model"]["embedding_rows"] == 416
    model = AutoModelForCausalLM.from_pretrained(scratch.base)
    assert manifest["parameters"] == sum(part.numel() for part in model.parameters())
    assert model.get_input_embeddings().weight.shape == (416, 16)
    assert {part.dtype for part in model.parameters()} == {torch.float32}


def test_the_config_states_rope_in_full_and_the_base_models_own_positions(scratch):
    config = json.loads((scratch.base / "config.json").read_bytes())
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert config["max_position_embeddings"] == 64
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    model = AutoModelForCausalLM.from_pretrained(scratch.base)
    plain = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain / 2)


def test_equal_seeds_give_equal_bytes_and_another_seed_other_weights(scratch, tmp_path):
    again, other = lay(tmp_path / "again"), lay(tmp_path / "other")
    torch.manual_seed(99)  # whatever was drawn before
    base.run(again, profile())
    base.run(other, profile(rng_seed=1))
    assert file_sha256(again.base / "manifest.json") == file_sha256(scratch.base / "manifest.json")
    assert file_sha256(other.base / "model.safetensors") != file_sha256(scratch.base / "model.safetensors")
    assert file_sha256(other.base / "tokenizer.json") == file_sha256(scratch.base / "tokenizer.json")


def test_the_global_generator_is_left_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    base.run(lay(tmp_path), profile())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_is_opened_with_its_weights_and_role_tokens_are_added_behind(tmp_path):
    workspace, folder = lay(tmp_path), original(tmp_path / "model-x")
    base.run(workspace, of_folder("model-x"))
    old, new = weights(folder), weights(workspace.base)
    assert set(old) == set(new)
    for name, weight in old.items():
        assert torch.equal(new[name][: len(weight)], weight), name
        assert new[name].dtype == torch.bfloat16
    rows = new["model.embed_tokens.weight"][2000:].float()
    assert rows.shape == (16, 16)
    assert 0.014 < float(rows.std()) < 0.026
    assert not torch.equal(rows, new["lm_head.weight"][2000:].float())
    assert load_manifest(workspace.base, remedy="")["special"]["<|prompter|>"] == 2000


def test_new_rows_are_the_same_on_every_machine_and_the_mean_when_asked_for(tmp_path):
    original(tmp_path / "model-x")
    digests = []
    for name in ("a", "b"):
        workspace = Workspace(tmp_path, name)
        torch.manual_seed(len(digests))
        base.run(workspace, of_folder("model-x"))
        digests.append(file_sha256(workspace.base / "model.safetensors"))
    assert digests[0] == digests[1]
    mean = Workspace(tmp_path, "mean")
    base.run(mean, of_folder("model-x", new_rows="mean"))
    embedding = weights(mean.base)["model.embed_tokens.weight"].float()
    torch.testing.assert_close(embedding[2000], embedding[:2000].mean(dim=0), rtol=1e-2, atol=1e-4)
    assert torch.equal(embedding[2000], embedding[2015])


def test_a_published_checkpoint_keeps_its_own_role_ids_and_rows(tmp_path):
    folder = original(tmp_path / "published", "tokenizer", rows=2016)
    workspace = Workspace(tmp_path, "run")
    base.run(workspace, of_folder("published", rows=2016))
    old, new = weights(folder), weights(workspace.base)
    assert all(torch.equal(old[name], new[name]) for name in old)
    ours, theirs = open_tokenizer(workspace.base), open_tokenizer(folder)
    assert ours.get_vocab(with_added_tokens=True) == theirs.get_vocab(with_added_tokens=True)


def test_tied_embeddings_stay_tied(tmp_path):
    original(tmp_path / "tied", tie_word_embeddings=True)
    workspace = Workspace(tmp_path, "run")
    tied = profile(
        base=FolderBase(kind="folder"),
        model_name="tied",
        shape={"vocab_size": 2000, "tie_word_embeddings": True},
    )
    base.run(workspace, tied)
    model = AutoModelForCausalLM.from_pretrained(workspace.base)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape[0] == 2016


def test_an_opened_model_is_stretched_as_params_say(tmp_path):
    original(tmp_path / "model-x")
    workspace = Workspace(tmp_path, "run")
    base.run(workspace, of_folder("model-x"))
    config = json.loads((workspace.base / "config.json").read_bytes())
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert config["max_position_embeddings"] == 64
    model = AutoModelForCausalLM.from_pretrained(workspace.base)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, 1 / 10000 ** (torch.arange(0, 8, 2) / 8) / 2)


def test_without_scaling_the_config_says_so(tmp_path):
    original(tmp_path / "model-x")
    workspace = Workspace(tmp_path, "run")
    plain = of_folder("model-x", superhot=False, max_length=64)
    base.run(workspace, plain)
    config = json.loads((workspace.base / "config.json").read_bytes())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


OWN = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 16.0, "original_max_position_embeddings": 4, "beta_fast": 16.0, "beta_slow": 2.0},
    "longrope": {
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 4.0, 8.0, 16.0],
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("kind", OWN)
def test_a_base_s_own_scaling_is_kept_exactly_and_never_replaced(tmp_path, kind):
    stated = {"rope_type": kind, "rope_theta": 10000.0, **OWN[kind]}
    folder = original(tmp_path / "model-x", rope_parameters=stated)
    untouched = AutoConfig.from_pretrained(
        folder
    )  # the authority: transformers' own functions on the base's own config
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](untouched)
    workspace = Workspace(tmp_path, "run")
    base.run(workspace, of_folder("model-x", superhot=False, max_length=64))
    config = json.loads((workspace.base / "config.json").read_bytes())
    assert config["rope_parameters"] == untouched.rope_parameters == stated
    assert config["max_position_embeddings"] == untouched.max_position_embeddings == 64
    live = AutoModelForCausalLM.from_pretrained(workspace.base).model.rotary_emb
    torch.testing.assert_close(live.inv_freq, frequencies, rtol=0, atol=0)
    assert live.attention_scaling == factor
    rope = scaling_from_json(load_manifest(workspace.base, remedy="")["rope"])
    assert rope.inv_freq(8).tolist() == frequencies.tolist()
    with pytest.raises(ConfigError, match=rf"superhot.*linear RoPE scaling by 2, .*\"rope_type\": \"{kind}\""):
        base.run(workspace, of_folder("model-x"))


def test_a_scaling_of_the_same_kind_is_extended_from_the_original_context(tmp_path):
    llama3 = {"type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    stated = {"rope_type": "llama3", "rope_theta": 10000.0, **OWN["llama3"]}  # 8 tokens by 8: 64
    original(tmp_path / "model-x", rope_parameters=stated)
    workspace = Workspace(tmp_path, "run")
    longer = of_folder("model-x", superhot_config=Llama3Scaling(**llama3, scale=16.0), max_length=128)
    base.run(workspace, longer)
    config = json.loads((workspace.base / "config.json").read_bytes())
    assert config["rope_parameters"] == stated | {"factor": 16.0}
    assert config["max_position_embeddings"] == 128
    shorter = of_folder("model-x", superhot_config=Llama3Scaling(**llama3, scale=4.0), max_length=32)
    with pytest.raises(ConfigError, match="which reaches 64 tokens and not 32"):
        base.run(workspace, shorter)


def test_our_own_export_as_the_next_base_is_not_scaled_twice(tmp_path):
    original(tmp_path / "model-x")
    first, second = Workspace(tmp_path, "run"), Workspace(tmp_path / "next", "run")
    base.run(first, of_folder("model-x"))
    base.run(second, of_folder(str(first.base), rows=2016))
    configs = [json.loads((workspace.base / "config.json").read_bytes()) for workspace in (first, second)]
    assert configs[0]["rope_parameters"]["factor"] == 2.0
    for key in ("rope_parameters", "max_position_embeddings", "vocab_size"):
        assert configs[0][key] == configs[1][key], key


def test_a_larger_theta_is_trained_and_exported(tmp_path, capsys):
    original(tmp_path / "model-x")
    workspace = Workspace(tmp_path, "run")
    stated = ThetaScaling(type="theta", scale=4.0, rope_theta=1e6)
    base.run(workspace, of_folder("model-x", superhot_config=stated, max_length=256))
    config = json.loads((workspace.base / "config.json").read_bytes())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}
    assert config["max_position_embeddings"] == 256
    assert "RoPE: the base has" in capsys.readouterr().out
    lower = ThetaScaling(type="theta", scale=4.0, rope_theta=100.0)
    with pytest.raises(ConfigError, match="not above the base's 10000"):
        base.run(workspace, of_folder("model-x", superhot_config=lower, max_length=256))


def longrope(*, scale=2.0, long_factor=(1.0, 1.5, 2.0, 4.0)):
    return LongropeScaling(
        type="longrope", scale=scale, long_factor=long_factor and [*long_factor], attention_factor=None
    )


def test_longrope_is_recorded_with_what_it_replaces_and_is_no_scaling_twice(tmp_path):
    stated = {"rope_type": "longrope", "rope_theta": 10000.0, **OWN["longrope"]}  # 16 tokens, extended to 64
    original(tmp_path / "model-x", rope_parameters=stated)
    first, second = Workspace(tmp_path, "run"), Workspace(tmp_path / "next", "run")
    longer = {"superhot_config": longrope(scale=16.0, long_factor=None), "max_length": 256}
    base.run(first, of_folder("model-x", **longer))
    rope = load_manifest(first.base, remedy="")["rope"]
    assert json.loads(rope["replaced"]) == stated
    assert (rope["original"], rope["factors"]) == (16, stated["long_factor"])
    base.run(second, of_folder(str(first.base), **longer).model_copy(update={"expected_model": None}))
    configs = [json.loads((workspace.base / "config.json").read_bytes()) for workspace in (first, second)]
    assert configs[0]["rope_parameters"] == configs[1]["rope_parameters"]
    assert [config["max_position_embeddings"] for config in configs] == [256, 256]


def test_every_fault_of_a_scaling_is_named_at_once(tmp_path):
    config = AutoConfig.from_pretrained(original(tmp_path / "model-x"))
    params = of_folder("model-x", superhot_config=longrope(long_factor=[2.0]), max_length=256)
    with pytest.raises(
        ConfigError, match=r"(?s)max_length is 256 tokens.*allows only 128.*expected 4 numbers.*found 1"
    ):
        base.plan_rope(config, params)


def test_a_model_from_scratch_needs_its_own_factors(tmp_path):
    workspace = lay(tmp_path)
    base.run(workspace, profile(superhot_config=longrope()))
    config = json.loads((workspace.base / "config.json").read_bytes())
    assert config["rope_parameters"]["short_factor"] == [1.0, 1.5, 2.0, 4.0]
    assert config["max_position_embeddings"] == 128
    with pytest.raises(ConfigError, match=r"long_factor is null, .* state 4 numbers"):
        base.run(lay(tmp_path / "b"), profile(superhot_config=longrope(long_factor=None)))


def test_how_far_a_kept_scaling_reaches_is_the_base_s_to_say(tmp_path):
    original(tmp_path / "model-x", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})
    base.run(Workspace(tmp_path, "run"), of_folder("model-x", superhot=False, max_length=256))
    with pytest.raises(ConfigError, match=r"max_length is 257 tokens, .* 256"):
        base.run(Workspace(tmp_path, "run"), of_folder("model-x", superhot=False, max_length=257))


def test_a_missing_folder_is_reported_with_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        base.run(lay(tmp_path), of_folder("nowhere"))
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(ConfigError, match=r"nowhere: has no config.json.*Put one there .*base: \{kind: hub"):
        base.run(lay(tmp_path / "b"), of_folder(str(tmp_path / "nowhere")))
    assert not (tmp_path / "runs" / "run" / "base").exists()


def test_another_shape_than_expected_names_every_difference(tmp_path):
    original(tmp_path / "model-x", num_hidden_layers=1)
    with pytest.raises(ConfigError) as caught:
        base.run(lay(tmp_path), of_folder("model-x", rows=2001))
    assert "num_hidden_layers: expected_model has 2, the model's config 1" in str(caught.value)
    assert "vocab_size: expected_model has 2001, the model's config 2000" in str(caught.value)


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    folder = original(tmp_path / "model-x")
    held = load_file(folder / "model.safetensors")
    held.pop("model.layers.1.mlp.up_proj.weight")
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 weights are missing .* first model.layers.1.mlp.up_proj.weight"):
        base.run(lay(tmp_path), of_folder("model-x"))


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def reconfigured(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def with_weights(**changes):
    def change(folder):
        held = load_file(folder / "model.safetensors")
        for name, value in changes.items():
            held[name.replace("__", ".")] = value(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def one_value(value):
    def change(held):
        weight = held["model.layers.1.mlp.up_proj.weight"].clone()
        weight[3, 5] = value
        return weight

    return change


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def half_an_index(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = {"lm_head.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def two_sets(folder):
    """A whole model in shards, and another one beside the index."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    held = load_file(folder / "model-00001-of-00001.safetensors")
    places = dict.fromkeys(held, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    save_file({name: torch.zeros_like(one) for name, one in held.items()}, folder / "model.safetensors")


def a_tensor_twice(folder):
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    first, *_, last = sorted(held)
    save_file(held, folder / one)
    save_file({last: torch.zeros_like(held[last])}, folder / two)
    places = dict.fromkeys(held, one) | {first: two}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def index_outside(folder):
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "model-1.safetensors")
    places = dict.fromkeys(held, "../outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def pickle_beside(folder):
    """A pickle that transformers would read, beside safetensors."""
    torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")
    reconfigured(transformers_weights="adapter_model.bin")(folder)


def not_json(folder):
    (folder / "config.json").write_text("{")


UP = "model__layers__1__mlp__up_proj__weight"
FAULTY = {
    "adapter": (adapter, "an adapter"),
    "adapter alone": (lambda folder: (adapter(folder), (folder / "config.json").unlink()), "an adapter"),
    "pickles": (pickled, r"pytorch_model\.bin"),
    "a pickle that the config names": (pickle_beside, "transformers_weights names the file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "found none"),
    "bitsandbytes": (
        reconfigured(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"quantized \(bitsandbytes\)",
    ),
    "gptq": (reconfigured(quantization_config={"quant_method": "gptq", "bits": 4}), r"quantized \(gptq\)"),
    "unknown architecture": (reconfigured(model_type="of_2031"), "model type `of_2031`"),
    "no architecture": (reconfigured(model_type=None), "None"),
    "config cut": (not_json, r"config\.json"),
    "NaN": (with_weights(**{UP: one_value(float("nan"))}), r"1 values of model\.layers\.1\.mlp\.up_proj\.weight"),
    "infinity": (with_weights(**{UP: one_value(float("-inf"))}), r"1 values of model\.layers\.1\.mlp\.up_proj"),
    "weights without a place": (
        with_weights(model__layers__0__self_attn__q_proj__bias=lambda _: torch.ones(16)),
        r"would be dropped, first model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "another shape": (with_weights(**{UP: lambda _: torch.ones(3, 3)}), "cannot be loaded"),
    "weights cut": (cut, "cannot be loaded"),
    "int8": (with_weights(**{UP: lambda held: held[UP.replace("__", ".")].to(torch.int8)}), "is stored as I8"),
    "two sets of weights": (two_sets, r"has model\.safetensors besides the files that .* names"),
    "a tensor twice": (a_tensor_twice, r"which model\.safetensors\.index\.json places in"),
    "an index that leads outside": (index_outside, r"in '\.\./outside\.safetensors', which is outside of this folder"),
    "no safetensors": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a safetensors file"),
    "a file of the index lacks": (half_an_index, r"model-00002-of-00002\.safetensors"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_folder_that_is_no_plain_whole_llama_is_refused_in_one_sentence(tmp_path, fault):
    break_it, words = FAULTY[fault]
    break_it(original(tmp_path / "model-x"))
    with pytest.raises(ConfigError, match=words):
        base.run(lay(tmp_path), of_folder("model-x"))
    assert not (tmp_path / "runs" / "run" / "base").exists()


def test_a_base_without_rope_is_refused_in_one_sentence():
    with pytest.raises(ConfigError, match=r"gpt2: transformers has no rope_parameters .* Choose a decoder"):
        base.plan_rope(AutoConfig.for_model("gpt2"), profile())


def test_a_package_or_file_that_is_not_there_is_reported(tmp_path):
    gguf = GgufBase(kind="gguf", package="no_such_package", file="x.gguf")
    with pytest.raises(
        ConfigError, match="no_such_package is not installed; `make setup` installs that of the profile smollm2"
    ):
        base.run(lay(tmp_path), profile(base=gguf))
    gguf = GgufBase(kind="gguf", package="ropeway", file="x.gguf")
    with pytest.raises(ConfigError, match=r"has no x.gguf; GGUF files there: none"):
        base.run(lay(tmp_path / "b"), profile(base=gguf))


@pytest.mark.parametrize("fault", ["none", "yarn", "rope_freqs", "rope_freqs of ones"])
def test_a_gguf_file_with_a_rope_scaling_is_refused_since_it_would_not_be_applied(tmp_path, fault):
    path = tmp_path / "tiny.gguf"
    tiny_gguf.write_model(
        path,
        scaling="yarn" if fault == "yarn" else None,
        factors={"rope_freqs": 2.0, "rope_freqs of ones": 1.0}.get(fault),
    )
    if fault in ("none", "rope_freqs of ones"):
        return check_gguf_rope(path)
    with pytest.raises(ConfigError, match="which transformers does not read from a GGUF file"):
        check_gguf_rope(path)
    return None


def test_a_vocabulary_that_needs_no_rows_is_left_as_it_is():
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in SHAPE.items() if k != "rope_theta"}))
    before = model.get_input_embeddings().weight
    resize(model, rows=400, new_rows="normal", seed=1)
    assert model.get_input_embeddings().weight is before
    assert plan_vocabulary(32005, 16) == 32016
    assert plan_vocabulary(32016, 16) == 32016
