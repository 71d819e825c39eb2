"""RoPE scalings over bases that turn a part of each head, or have RoPE per layer type, and longrope."""

import json
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropeway.config.load_params import load_profile
from ropeway.config.sections import Llama3Scaling, LongropeScaling, StretchScaling, ThetaScaling, YarnScaling
from ropeway.models.base_rope import keep_scaling, scaling_from_json
from ropeway.models.open_model import measure_frequencies, model_class, reads_flat_scaling, rotary_dim, set_rope
from ropeway.models.rope import build_scaling, longest_independent
from ropeway.models.rope_plan import change_faults, describe_change, plan_scaling
from ropeway.runtime.errors import ConfigError
from ropeway.stages.package.check import config_faults
from ropeway.stages.package.model_config import plan_config
from ropeway.stages.train.model import check_rows
from tests.support.tiny_run import ROOT

SIZES = {
    "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 64, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SLIDING = {"rope_type": "default", "rope_theta": 10000.0}
# model_type -> (what it adds to the sizes, what of its rope_parameters is kept, theta)
BASES = {
    "llama": ({}, {}, 10000.0),
    "stablelm": ({}, {"partial_rotary_factor": 0.25}, 10000.0),
    "phi": ({"partial_rotary_factor": 0.4, "hidden_size": 160}, {"partial_rotary_factor": 0.4}, 10000.0),
    "glm4": ({"head_dim": 32, "rope_theta": 500000.0}, {"partial_rotary_factor": 0.5}, 500000.0),
    "gpt_neox": ({"rotary_pct": 0.5, "rotary_emb_base": 30000}, {"partial_rotary_factor": 0.5}, 30000),
    "gemma3_text": ({"head_dim": 32, "layer_types": ["sliding_attention", "full_attention"]}, {}, 1e6),
    "olmo3": ({"layer_types": ["sliding_attention", "full_attention"], "rope_theta": 500000.0}, {}, 500000.0),
}
LAYERED = {"gemma3_text": SLIDING, "olmo3": {"rope_type": "default", "rope_theta": 500000.0}}


def factors(dim):
    return [1.0 + 0.25 * number for number in range(dim // 2)]


def kinds(dim):
    """Return kind -> (superhot_config, the parameters that its authors would write)."""
    from_128 = {"factor": 4.0, "original_max_position_embeddings": 128}
    ramp = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    beta = {"beta_fast": 32.0, "beta_slow": 1.0}
    lists = {"short_factor": factors(dim), "long_factor": factors(dim)}
    longrope = LongropeScaling(type="longrope", scale=4.0, long_factor=factors(dim), attention_factor=None)
    return {
        "linear": (StretchScaling(type="linear", scale=4.0), {"factor": 4.0}),
        "dynamic": (StretchScaling(type="dynamic", scale=4.0), {"factor": 4.0}),
        "yarn": (YarnScaling(type="yarn", scale=4.0, **beta), {**from_128, **beta}),
        "llama3": (Llama3Scaling(type="llama3", scale=4.0, **ramp), {**from_128, **ramp}),
        "longrope": (longrope, {**from_128, **lists}),
        "theta": (ThetaScaling(type="theta", scale=4.0, rope_theta=2e6), {}),
    }


def config_of(name, **changes):
    return AutoConfig.for_model(name, **{**SIZES, **BASES[name][0], **changes})


def own_of(config):
    frequencies, is_flat = measure_frequencies(config), reads_flat_scaling(config)
    return keep_scaling(config.rope_parameters, config.max_position_embeddings, frequencies, is_flat=is_flat)


def plan(config, stated):
    profile = load_profile(ROOT / "params.yaml", "llama2_13b_orca_8k")[1]
    own = own_of(config)
    profile = profile.model_copy(update={"superhot_config": stated})
    return plan_scaling(profile, theta=own.theta, original=own.original, base=own), own


def authority(name, kind, stated):
    """Return what transformers' own functions compute from parameters written by hand, for the scaled layers."""
    _, kept, theta = BASES[name]
    theta = 2e6 if kind == "theta" else theta
    written = {"rope_type": "default" if kind == "theta" else kind, "rope_theta": theta, **stated, **kept}
    layered = name in LAYERED
    parameters = {"full_attention": written, "sliding_attention": LAYERED[name]} if layered else written
    config = config_of(name, rope_parameters=parameters)
    options = {"layer_type": "full_attention"} if layered else {}
    if kind == "theta":
        with torch.device("meta"):
            rotary = model_class(config)(config).base_model.rotary_emb
        return type(rotary).compute_default_rope_parameters(config, **options)
    return ROPE_INIT_FUNCTIONS[kind](config, **options)


@pytest.mark.parametrize("kind", kinds(8))
@pytest.mark.parametrize("name", BASES)
def test_frequencies_are_those_of_transformers_own_functions(name, kind):
    config = config_of(name)
    stated, parameters = kinds(rotary_dim(config))[kind]
    rope, own = plan(config, stated)
    assert not list(change_faults(rope, own, max_length=512, dim=rotary_dim(config)))
    frequencies, factor = authority(name, kind, parameters)
    buffer = "full_attention_inv_freq" if name in LAYERED else "inv_freq"
    expected = rope.expected(rotary_dim(config))
    assert expected[buffer][0] == pytest.approx(factor, rel=1e-9)
    torch.testing.assert_close(torch.from_numpy(expected[buffer][1]), frequencies, rtol=1e-6, atol=0)
    live = measure_frequencies(set_rope(config, rope))
    assert live.keys() == expected.keys()
    assert live[buffer] == (factor, *frequencies.tolist())


@pytest.mark.parametrize("name", LAYERED)
def test_layers_with_windows_keep_their_rope_exactly_and_it_is_said(name):
    config = config_of(name)
    rope, own = plan(config, kinds(32)["linear"][0])
    assert rope.to_config()["sliding_attention"] == LAYERED[name] == config.rope_parameters["sliding_attention"]
    before, after = measure_frequencies(config), measure_frequencies(set_rope(config, rope))
    assert after["sliding_attention_inv_freq"] == before["sliding_attention_inv_freq"]
    assert after["full_attention_inv_freq"] != before["full_attention_inv_freq"]
    assert "layers of type sliding_attention keep the base's RoPE" in describe_change(rope, own)


@pytest.mark.parametrize("kind", kinds(8))
@pytest.mark.parametrize("name", BASES)
def test_the_export_is_read_alike_from_the_keys_of_transformers_5_and_4(name, kind):
    config = config_of(name)
    rope, _ = plan(config, kinds(rotary_dim(config))[kind][0])
    trained = set_rope(config, rope)
    exported = plan_config(trained.to_dict(), rope=rope, dtype="fp32", stops={})
    want = measure_frequencies(trained)
    assert measure_frequencies(type(config).from_dict(exported)) == want
    share = BASES[name][1].get("partial_rotary_factor")
    assert exported.get("partial_rotary_factor") == share == exported["rope_parameters"].get("partial_rotary_factor")
    old = {key: value for key, value in exported.items() if key != "rope_parameters"}
    if kind == "theta" and name == "gpt_neox":  # its key of theta is `rotary_emb_base`
        return
    assert measure_frequencies(type(config).from_dict(old)) == want


@pytest.mark.parametrize("kind", [kind for kind in kinds(8) if kind != "theta"])
@pytest.mark.parametrize("name", BASES)
def test_our_own_export_as_the_next_base_does_not_compound(name, kind):
    config = config_of(name)
    dim = rotary_dim(config)
    stated = kinds(dim)[kind][0]
    rope, _ = plan(config, stated)
    exported = plan_config(set_rope(config, rope).to_dict(), rope=rope, dtype="fp32", stops={})
    following = type(config).from_dict(json.loads(json.dumps(exported)))
    again, own = plan(following, stated)
    assert not list(change_faults(again, own, max_length=512, dim=dim))
    assert (again.factor, again.original, again.reach) == (4.0, 128, 512)
    assert again.to_config() == rope.to_config()
    assert set_rope(following, again).max_position_embeddings == set_rope(config, rope).max_position_embeddings
    longer, _ = plan(following, stated.model_copy(update={"scale": 8.0}))
    assert longer.reach == 1024


def test_a_larger_theta_is_not_counted_twice():
    config = config_of("llama")
    stated = ThetaScaling(type="theta", scale=4.0, rope_theta=2e6)
    rope, _ = plan(config, stated)
    again, own = plan(set_rope(config, rope), stated)
    (fault,) = change_faults(again, own, max_length=512, dim=32)
    assert "rope_theta: 2e+06 is not above the base's 2e+06, whose 512 tokens belong to it" in fault


@pytest.mark.parametrize("kind", kinds(8))
@pytest.mark.parametrize("name", BASES)
def test_a_scaling_over_a_base_survives_json(name, kind):
    config = config_of(name)
    rope, own = plan(config, kinds(rotary_dim(config))[kind][0])
    for scaling in (rope, own):
        again = scaling_from_json(json.loads(json.dumps(scaling.to_json())))
        assert again == scaling
        assert again.to_config_keys() == scaling.to_config_keys()


def test_scalings_of_earlier_versions_are_read():
    old = {"kind": "linear", "factor": 2.0, "theta": 1e4, "original": 64, "settings": []}
    new = {"kept": "", "positions": 0, "frequencies": {}}
    assert scaling_from_json(old | new) == build_scaling("linear", 2.0, 1e4, 64)
    assert scaling_from_json(old | new | {"frequencies": []}) == build_scaling("linear", 2.0, 1e4, 64)
    own = '{"factor": 2.0, "rope_theta": 10000.0, "rope_type": "linear"}'
    kept = scaling_from_json(old | {"kept": own, "positions": 64, "frequencies": {"inv_freq": [1.0, 0.5]}})
    assert kept.to_config_keys()["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert (kept.reach, kept.expected(2)["inv_freq"][0]) == (128, 1.0)


LISTS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3]}


def longrope_base():
    """A Phi-3 with a context of 64 tokens, extended to 256."""
    written = {"rope_type": "longrope", "rope_theta": 10000.0, **LISTS, "original_max_position_embeddings": 64}
    changes = {"hidden_size": 32, "max_position_embeddings": 256, "original_max_position_embeddings": 64}
    return AutoConfig.for_model("phi3", **{**SIZES, **changes, "rope_parameters": written})


def test_longrope_takes_the_bases_long_factors_for_every_length():
    config = longrope_base()
    stated = LongropeScaling(type="longrope", scale=8.0, long_factor=None, attention_factor=None)
    rope, own = plan(config, stated)
    assert not list(change_faults(rope, own, max_length=512, dim=8))
    found = set_rope(config, rope)
    parameters = found.rope_parameters
    assert parameters["short_factor"] == parameters["long_factor"] == LISTS["long_factor"]
    assert (found.max_position_embeddings, found.original_max_position_embeddings, own.reach) == (512, 64, 256)
    assert longest_independent(own.to_config(), 256) == 64
    assert longest_independent(parameters, 512) is None
    long, factor = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=65)
    torch.testing.assert_close(torch.from_numpy(rope.inv_freq(8)), long, rtol=1e-6, atol=0)
    assert rope.attention_factor > factor  # that of 8 x 64 tokens
    with torch.device("meta"):
        rotary_class = type(model_class(found)(found).model.rotary_emb)
    live, seen = rotary_class(found), []
    for length in (8, 64, 65, 400, 8):
        live(torch.zeros(1), torch.arange(length)[None])
        seen.append(live.inv_freq.tolist())
    assert all(one == long.tolist() for one in seen)


def test_a_plain_phi3_gets_the_original_context_that_it_prefers():
    config = AutoConfig.for_model("phi3", **SIZES)  # states 4,096 original positions and 128 positions
    rope, _ = plan(config, kinds(32)["longrope"][0])
    found = set_rope(config, rope)
    assert found.original_max_position_embeddings == found.rope_parameters["original_max_position_embeddings"] == 128


def test_a_kind_that_the_family_refuses_is_an_error_with_its_reason():
    config = AutoConfig.for_model("phi3", **SIZES)
    rope, _ = plan(config, kinds(32)["linear"][0])
    with pytest.raises(ConfigError, match=r"phi3: linear RoPE scaling is refused by .* must be one of \['longrope'\]"):
        set_rope(config, rope)


def test_every_reason_against_a_longrope_is_named_at_once():
    config = longrope_base()
    stated = LongropeScaling(type="longrope", scale=2.0, long_factor=[2.0, 3.0], attention_factor=None)
    rope, own = plan(config, stated)
    faults = "\n".join(change_faults(rope, own, max_length=512, dim=8))
    assert "which reaches 256 tokens and not 128" in faults
    assert "max_length is 512 tokens, but the base's 64 x superhot_config.scale 2 allows only 128" in faults
    assert "long_factor: expected 4 numbers, one for each pair of the 8 dimensions" in faults
    missing = LongropeScaling(type="longrope", scale=4.0, long_factor=None, attention_factor=None)
    (fault,) = change_faults(*plan(config_of("glm4"), missing), max_length=512, dim=16)
    assert "long_factor is null, which takes the base's own, but the base has none; state 8 numbers" in fault


def test_factors_must_be_positive_and_all_faults_are_named():
    with pytest.raises(ValidationError) as caught:
        LongropeScaling(type="longrope", scale=0.5, long_factor=[1.0, 0.0, -1.0], attention_factor=0.0)
    places = {error["loc"] for error in caught.value.errors()}
    assert places == {("scale",), ("long_factor", 1), ("long_factor", 2), ("attention_factor",)}


def test_layers_without_full_attention_are_refused():
    frequencies = {"sliding_attention_inv_freq": (1.0, 0.5)}
    own = keep_scaling({"sliding_attention": SLIDING}, 128, frequencies)
    rope = build_scaling("linear", 4.0, 10000.0, 128)
    (fault,) = change_faults(rope, own, max_length=512, dim=2)
    assert "the base model has RoPE for sliding_attention. Set superhot: false" in fault


@pytest.mark.parametrize(
    ("layout", "rows", "max_length", "is_refused"),
    [("packed", 1, 65, True), ("padded", 2, 65, True), ("padded", 1, 65, False), ("packed", 2, 64, False)],
)
def test_a_kept_longrope_gives_no_text_the_factors_of_its_neighbors(layout, rows, max_length, is_refused):
    profile = SimpleNamespace(layout=layout, per_device_train_batch_size=rows, max_length=max_length)
    if not is_refused:
        check_rows(longrope_base(), profile)
        return
    with pytest.raises(ConfigError, match=r"short_factor up to 64 tokens and long_factor beyond.*long_factor: null"):
        check_rows(longrope_base(), profile)


def test_a_package_of_an_earlier_version_is_checked_with_the_keys_that_it_has():
    own = own_of(config_of("stablelm", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}))
    probe = {"dtype": "fp32", "stops": {}, "rope": own.to_json()}
    written = {"dtype": "float32", "torch_dtype": "float32", "use_cache": True, "max_position_embeddings": 128}
    assert not list(config_faults({**written, **own.to_config_keys()}, probe))
    old = {**written, "rope_parameters": own.to_config(), "rope_theta": 10000.0, "rope_scaling": {"type": "linear"}}
    assert len(list(config_faults(old, probe))) == 2
    earlier = {name: value for name, value in own.to_json().items() if name not in ("is_flat", "factors", "replaced")}
    assert not list(config_faults(old, {**probe, "rope": earlier}))


def test_a_kept_scaling_per_layer_type_is_stated_as_the_family_reads_it():
    full = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}  # as Gemma 3 4B
    config = config_of("gemma3_text", rope_parameters={"full_attention": full, "sliding_attention": SLIDING})
    own = own_of(config)
    keys = own.to_config_keys()
    assert keys["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    old = {key: value for key, value in (config.to_dict() | keys).items() if key != "rope_parameters"}
    assert measure_frequencies(type(config).from_dict(old)) == measure_frequencies(config)
    assert set_rope(config, own).to_dict() == config.to_dict()
    unread = keep_scaling(config.rope_parameters, 128, measure_frequencies(config), is_flat=False)
    assert "rope_scaling" not in unread.to_config_keys()  # a null would be read as no RoPE by Gemma 4
