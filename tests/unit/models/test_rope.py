import json
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ropeway.config.load_params import load_profile
from ropeway.config.sections import (
    Llama3Scaling,
    StretchScaling,
    SuperhotConfig,
    ThetaScaling,
    YarnScaling,
)
from ropeway.models.base_rope import scaling_from_json
from ropeway.models.rope import build_scaling, known_kinds, longest_independent
from ropeway.models.rope_plan import plan_scaling
from tests.support.tiny_run import ROOT

KINDS = [
    StretchScaling(type="linear", scale=2.0),
    StretchScaling(type="dynamic", scale=4.0),
    YarnScaling(type="yarn", scale=4.0, beta_fast=32.0, beta_slow=1.0),
    YarnScaling(type="yarn", scale=16.0, beta_fast=20.0, beta_slow=2.0),
    Llama3Scaling(type="llama3", scale=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    ThetaScaling(type="theta", scale=4.0, rope_theta=1e6),
]


def scaling_of(stated, *, theta=10000.0, original=4096):
    profile = load_profile(ROOT / "params.yaml", "llama2_13b_orca_8k")[1]
    return plan_scaling(profile.model_copy(update={"superhot_config": stated}), theta=theta, original=original)


@pytest.mark.parametrize("stated", KINDS, ids=lambda stated: f"{stated.type}-{stated.scale:g}")
@pytest.mark.parametrize(("head_dim", "theta", "original"), [(128, 10000.0, 4096), (64, 500000.0, 8192), (8, 1e4, 64)])
def test_frequencies_are_those_of_a_live_transformers_llama(stated, head_dim, theta, original):
    scaling = scaling_of(stated, theta=theta, original=original)
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=scaling.stated_positions,
        rope_parameters=scaling.to_config(),
    )
    live = LlamaRotaryEmbedding(config)
    assert torch.allclose(live.inv_freq, torch.from_numpy(scaling.inv_freq(head_dim)), rtol=1e-6, atol=0)
    assert live.attention_scaling == pytest.approx(scaling.attention_factor, rel=1e-9)


def test_llama3_and_theta_state_the_whole_reach_as_their_positions():
    assert [scaling_of(stated).stated_positions for stated in KINDS] == [4096, 4096, 4096, 4096, 4096 * 8, 4096 * 4]
    assert scaling_of(KINDS[0]).reach == 8192


def test_a_loader_of_transformers_4_31_is_told_type_and_factor_alone():
    assert scaling_of(KINDS[0]).to_legacy_config() == {"type": "linear", "factor": 2.0}
    assert scaling_of(KINDS[1]).to_legacy_config() == {"type": "dynamic", "factor": 4.0}


def test_a_scaling_survives_json():
    for stated in KINDS:
        scaling = scaling_of(stated)
        assert scaling_from_json(json.loads(json.dumps(scaling.to_json()))) == scaling


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    scaling = scaling_of(KINDS[2])
    plain = build_scaling("default", 1.0, 10000.0, 4096).inv_freq(128)
    found = scaling.inv_freq(128)
    assert found[0] == plain[0]
    assert np.isclose(found[-1], plain[-1] / 4, rtol=1e-6)


def test_llama3_wants_its_low_factor_below_its_high_one():
    with pytest.raises(ValueError, match="must be below"):
        Llama3Scaling(type="llama3", scale=8.0, low_freq_factor=4.0, high_freq_factor=4.0)


def test_every_kind_that_params_may_name_can_be_computed_and_described():
    schemas = get_args(get_args(SuperhotConfig)[0])
    asked = {name for one in schemas for name in get_args(one.model_fields["type"].annotation)}
    assert asked == known_kinds() - {"default"}
    assert all(build_scaling(kind, 2.0, 10000.0, 4096).stretch for kind in known_kinds())


@pytest.mark.parametrize(
    ("stated", "longest"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 2.0}, None),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096),
        (
            {
                "rope_type": "longrope",
                "original_max_position_embeddings": 2048,
                "short_factor": [1],
                "long_factor": [2],
            },
            2048,
        ),
        (
            {
                "rope_type": "longrope",
                "original_max_position_embeddings": 2048,
                "short_factor": [2],
                "long_factor": [2],
            },
            None,
        ),
    ],
)
def test_only_frequencies_that_follow_the_batchs_longest_row_depend_on_it(stated, longest):
    assert longest_independent(stated, 4096) == longest
