from dataclasses import replace

import numpy as np
import pytest

from ropeway.onboarding.derive import (
    Machine,
    TokenLengths,
    count_rows,
    derive_batch,
    derive_evaluation,
    derive_gate,
    derive_length,
    derive_rate,
    derive_rope,
    derive_template,
)
from ropeway.onboarding.examine_base import BaseFindings
from ropeway.runtime.errors import ConfigError

CPU, GPUS = Machine(0, 2, None), Machine(8, 8, 80.0)


def base(context=4096, parameters=7e9, *, has_template=True):
    return BaseFindings("llama", context, "default", int(parameters), has_template, 32000, None, None)


def lengths(*tokens, complete=True):
    return {"chats": TokenLengths(np.array(tokens), complete)}


def length_of(tokens, kind="conversation", machine=GPUS, context=None, reach=4096):
    return derive_length(lengths(*tokens), {"chats": kind}, base(reach), machine, context)[0]


def test_a_row_holds_nearly_all_conversations_within_what_base_and_machine_allow():
    assert length_of([100] * 99 + [500] * 2) == 512
    assert length_of([10, 20]) == 128
    assert length_of([9000] * 9) == 4096
    assert length_of([9000] * 9, machine=CPU) == 1024
    assert length_of([9000] * 9, reach=512) == 512
    assert length_of([100], context=2000) == 2000
    assert length_of([100], kind="document") == 2048
    assert length_of([100], kind="document", machine=CPU) == 512


def test_what_is_cut_is_said():
    assert "50.0% are cut" in derive_length(lengths(100, 9000), {"chats": "conversation"}, base(), GPUS, None)[1]


def test_rope_is_scaled_only_where_the_base_does_not_reach():
    assert derive_rope(4096, base()) == []
    scaled = {one.key: one.value for one in derive_rope(10_000, base())}
    assert scaled == {"superhot": True, "superhot_config": {"type": "linear", "scale": 3}}


def test_a_scaled_base_is_not_scaled_by_another_kind():
    scaled = replace(base(), is_scaled=True)
    assert derive_rope(4096, scaled) == []
    with pytest.raises(ConfigError, match="--context 5000"):
        derive_rope(5000, scaled)


def test_a_base_without_a_template_gets_the_published_one():
    assert derive_template(base(), is_scratch=False) == []
    assert derive_template(base(has_template=False), is_scratch=False)[0].value == "open_assistant"
    assert derive_template(base(has_template=False), is_scratch=True) == []


def test_a_small_base_gets_the_measured_rate():
    assert derive_rate(base(), preset="finetune") == []
    assert derive_rate(base(parameters=135e6), preset="finetune")[0].value == 1e-4
    assert derive_rate(base(parameters=135e6), preset="lora") == []


def rows_of(tokens, kind="conversation", *, packed=True, share=0.0):
    return count_rows(lengths(*tokens), {"chats": kind}, 1000, packed=packed, share=share)


def test_rows_are_those_of_packing_or_one_per_sequence():
    assert rows_of([500, 500, 5000]) == 2
    assert rows_of([600] * 10) == 10  # no two of them fit into one row
    assert rows_of([600, 2500], "document") == 4  # 1000, 1000, 500 and 600
    assert rows_of([500, 500, 5000], packed=False) == 3
    assert rows_of([10] * 100, packed=False, share=0.1) == 90


@pytest.mark.parametrize(
    ("rows", "machine", "micro", "size", "epochs"),
    [
        (20_000, GPUS, 2, 128, 1),
        (1_000, GPUS, 2, 16, 1),
        (100, GPUS, 1, 8, 3),
        (212, CPU, 1, 4, 1),
        (3, CPU, 1, 2, 3),
        (5_000, Machine(3, 3, 80.0), 4, 12, 1),
    ],
)
def test_a_batch_is_divided_by_the_ranks_and_gives_enough_steps(rows, machine, micro, size, epochs):
    found = {one.key: one.value for one in derive_batch(rows, machine, micro, length=512, is_complete=True)}
    assert found["global_batch_size"] == size
    assert size % (micro * machine.ranks) == 0
    assert found.get("num_train_epochs") == epochs
    assert found["warmup_steps"] >= 1


def test_fewer_rows_than_ranks_are_refused():
    with pytest.raises(ConfigError, match="do not fill one step of 8 ranks"):
        derive_batch(7, GPUS, 1, length=512, is_complete=True)


def test_evaluation_asks_within_and_beyond_the_row_and_within_what_is_held_out():
    found = derive_evaluation(1024, 100_000, base(), CPU).value
    assert found["passkey"]["lengths"] == [512, 1024, 2048]
    assert found["positions"]["row_tokens"] == 2048
    assert found["long_context"]["lengths"] == [1024]
    small = derive_evaluation(128, 93, base(), CPU).value
    assert small["passkey"]["lengths"] == [512]
    assert small["long_context"] is None
    assert (small["positions"]["row_tokens"], small["positions"]["bucket_tokens"]) == (23, 2)


def test_on_a_cpu_the_gate_does_not_judge_by_one_question():
    assert derive_gate(CPU)[0].value == {"max_passkey_decrease": None, "max_long_context_decrease": None}
    assert derive_gate(GPUS) == []
