"""A step in one line, with how fast and how long; the attempt's record sums it up."""

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from ropeway.data.batches import Piece
from ropeway.runtime.progress import Progress, describe
from ropeway.stages.train.model import step_flops, token_flops


def line(step, **changes):
    return {
        "step": step, "total_steps": 10, "loss": 5.25, "learning_rate": 1e-3, "grad_norm": 0.5, "loss_scale": 1.0,
        "applied": 1, "applied_steps": step, "skipped_steps": 0, "tokens": 1000, "supervised_tokens": 600,
        "seconds": 2.0, "model_flops": 4e12, "peak_memory_bytes": 3 * 2**30, **changes,
    }  # fmt: skip


@pytest.fixture
def progress(tmp_path):
    now = iter([0.0, 4.0, 8.0, 12.0, 16.0])
    mirrored = []
    made = Progress({"ranks": 2}, tmp_path / "p.jsonl", tmp_path / "a.jsonl", 8e12, mirrored.append, lambda: next(now))
    made.mirrored = mirrored
    return made


def test_each_step_is_one_line_with_bar_pace_and_time_left(progress, capsys):
    progress.show(line(1))
    progress.saved(1.5)
    progress.show(line(2, validation_topics=4.5, loss_topics=None))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("[==                  ] step 1/10  loss 5.2500  lr 1.00e-03  norm 0.50")
    # 4 s a step by the clock, what lies between the steps included: 9 are left, then 8.
    assert "500 tokens/s  MFU 25.0%  3.0 GiB  36 s left" in first
    assert second.endswith("32 s left  validation topics 4.500")
    written = [json.loads(text) for text in progress.lines.read_text().splitlines()]
    assert written == progress.mirrored
    assert written[1]["supervised_tokens_per_second"] == 300
    assert (written[0]["checkpoint_seconds"], written[1]["checkpoint_seconds"]) == (0.0, 1.5)


def test_a_skipped_step_says_so_and_claims_no_norm():
    text = describe(
        line(3, applied=0, skipped_steps=2, grad_norm=None, loss_scale=32768.0)
        | {"tokens_per_second": 1.0, "mfu": None, "eta_seconds": 5000}
    )
    assert "norm -  scale 32768  SKIPPED (2)" in text
    assert "MFU" not in text
    assert "1 h 23 min left" in text


def test_a_step_that_was_passed_over_says_so_and_how_many_rows():
    none = {"loss": None, "grad_norm": None, "tokens_per_second": None, "mfu": None, "eta_seconds": 5}
    text = describe(line(5, applied=0, left_out=128, validation_topics=4.5) | none)
    assert text == "[==========          ] step 5/10  its 128 rows are LEFT OUT  validation topics 4.500"


def test_the_record_of_an_attempt_sums_it_up(progress):
    progress.show(line(1))
    progress.saved(2.0)
    progress.show(line(2))
    progress.write(ended="finished", more={"wandb": {"mode": "off"}})
    record = json.loads(progress.attempts.read_text())
    assert record["tokens"] == 2000
    assert record["tokens_per_second"] == 500
    assert record["mfu"] == pytest.approx(0.25)
    assert record["checkpoint_stall_fraction"] == pytest.approx(2 / 12)
    assert record["wandb"] == {"mode": "off"}


def test_flops_are_six_per_multiplying_weight_and_token_and_padding_counts_nothing():
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    layer = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16 + 2 * 8
    weights = 2 * layer + 8 * 50 + 8
    per_token = token_flops(model)
    assert per_token == 6 * weights
    one = step_flops(per_token, config, [(Piece(0, 0, 0, 5),)])
    assert one == 5 * 6 * weights + 6 * 2 * 8 * 25
    # Two sequences in one packed row attend to themselves alone.
    assert step_flops(per_token, config, [(Piece(0, 0, 0, 5), Piece(0, 1, 0, 5))]) == 2 * one
    model.requires_grad_(requires_grad=False)
    assert token_flops(model) == 4 * weights
