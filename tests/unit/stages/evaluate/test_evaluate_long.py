"""Loss by position and passkey retrieval, checked on models with known outputs."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from ropeway.config.sections import Passkey, Positions
from ropeway.config.stages import READS
from ropeway.data.shards import open_shards
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.open_model import rope_of
from ropeway.reporting.report_eval import passkey_grids, write_plots
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.stages.evaluate import passkey
from ropeway.stages.evaluate.evaluation_workers import Share
from ropeway.stages.evaluate.load_model import open_model
from ropeway.stages.evaluate.passkey import (
    PasskeyQuestion,
    answer_questions,
    encode_passkey_question,
    plan_passkey_questions,
)
from ropeway.stages.evaluate.positions import (
    LongRow,
    plan_long_rows,
    report_positions,
    score_positions,
    sum_positions,
    table_positions,
)
from ropeway.stages.evaluate.stage import plan_tables, write_tables
from tests.support.speaking_model import speaker
from tests.support.tiny_run import make_run, measure

ROWS = Positions(rows=2, row_tokens=128, bucket_tokens=32)
KEYS = Passkey(lengths=[256, 192], depths=[0.0, 0.5, 1.0], repeats=2)
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workspace, profile = make_run(tmp_path_factory.mktemp("run"))
    return workspace, profile, open_shards(workspace.data), *open_model(workspace.model, like=workspace.model)


def with_positions(profile, **changes):
    evaluation = profile.evaluation.model_copy(update={"positions": ROWS.model_copy(update=changes)})
    values = {name: getattr(profile, name) for name in READS["evaluate"]}
    return profile.model_construct(**values | {"evaluation": evaluation})


def measure_positions(model, rows, wanted):
    return score_positions(sum_positions(model, rows, wanted, share=Share(0, 1)))


def unigram(model, logits):
    """Return a Llama whose logits are these for every input."""
    copy = LlamaForCausalLM(model.config).eval()
    for part in copy.model.layers:
        torch.nn.init.zeros_(part.self_attn.o_proj.weight)  # nothing is added to the embedding,
        torch.nn.init.zeros_(part.mlp.down_proj.weight)
    torch.nn.init.ones_(copy.model.embed_tokens.weight)  # which is all ones, and so is its norm
    copy.lm_head.weight.data = logits[:, None].expand(-1, model.config.hidden_size) / model.config.hidden_size
    return copy


def test_a_unigram_model_has_the_perplexity_of_its_formula(run):
    _, profile, shards, model, _ = run
    weights = torch.linspace(-4, 4, model.config.vocab_size, dtype=torch.float64)
    logits = weights * (1 + model.config.rms_norm_eps) ** -0.5  # what RMSNorm leaves of a one
    norm = float(torch.logsumexp(logits, 0))
    scores = measure(unigram(model, weights.float()), shards, profile, name="tuned")
    for number, score in enumerate(scores):
        losses = []
        for sequence in shards.sources[number].validation:
            tokens, kinds = shards.sources[number].read(int(sequence))
            ids = tokens[: profile.max_length]
            counted = kinds[: len(ids) - 1] != 1  # all but the prompter's turns
            losses += [norm - float(logits[target]) for target in ids[1:][counted]]
        assert score.tokens == len(losses)
        assert score.metrics(1)["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_a_model_that_ignores_position_has_a_flat_curve_with_any_scaling(run):
    _, _, _, model, _ = run
    logits = torch.linspace(-3, 3, model.config.vocab_size)
    ids = np.tile(np.arange(100, 116), 8)  # period 16: every bucket holds the same tokens
    mask = np.append(np.ones(127, bool), [False])
    curves = measure_positions(unigram(model, logits), [LongRow(ids, mask)] * 2, ROWS)
    assert set(curves) == {"", "_unscaled"}
    for scores in curves.values():
        assert [score.tokens for score in scores] == [64, 64, 64, 62]
        assert [score.loss for score in scores[:3]] == pytest.approx([scores[0].loss] * 3, abs=1e-6)
        assert scores[3].loss == pytest.approx(scores[0].loss, abs=0.01)  # one target fewer
    moved = measure_positions(model, [LongRow(ids, mask)], ROWS)[""]
    assert np.ptp([score.loss for score in moved]) > 0.05


def test_each_bucket_has_the_loss_of_exactly_its_positions(run):
    _, profile, shards, model, _ = run
    rows = plan_long_rows(shards, profile)
    scores = measure_positions(model, rows, ROWS)[""]
    expected = np.zeros((2, 4))
    for row in rows:
        with torch.inference_mode():
            logits = model(torch.from_numpy(row.ids)[None], use_cache=False).logits[0].double()
        for at in np.flatnonzero(row.mask):
            loss = float(torch.logsumexp(logits[at], 0) - logits[at, int(row.ids[at + 1])])
            expected[:, at // 32] += [loss, 1]
    np.testing.assert_allclose([score.loss_sum for score in scores], expected[0], rtol=1e-5)
    assert [score.tokens for score in scores] == expected[1].tolist()


def test_rope_of_gives_the_logits_of_a_model_loaded_with_that_scaling(run):
    workspace, *_, model, _ = run
    row = torch.arange(3, 120)[None]
    config = AutoConfig.from_pretrained(workspace.model)
    config.rope_parameters = PLAIN
    plain = LlamaForCausalLM.from_pretrained(workspace.model, config=config, dtype=torch.float32).eval()
    with torch.inference_mode():
        own, expected = (one(row, use_cache=False).logits for one in (model, plain))
        with rope_of(model, PLAIN):
            assert torch.equal(model(row, use_cache=False).logits, expected)
        assert torch.equal(model(row, use_cache=False).logits, own)
    assert not torch.allclose(own, expected, atol=1e-3)


def test_long_rows_are_concatenated_texts_with_one_bos_per_row(run):
    _, profile, shards, *_ = run
    rows = plan_long_rows(shards, profile)
    assert [len(row.ids) for row in rows] == [128]  # 208 tokens of text and six BOS: no second one is filled
    assert all(row.ids[0] == 1 and (row.ids == 1).sum() == 1 for row in rows)
    lengths = shards.sources[1].lengths[shards.sources[1].validation]
    longest = max(lengths)
    assert rows[0].mask[: longest - 1].all()
    assert not rows[0].mask[longest - 1]  # the next text's first token is no target
    assert not rows[0].mask[-1]


def test_without_documents_long_rows_are_made_of_conversations(run):
    _, profile, shards, *_ = run
    rows = plan_long_rows(replace(shards, sources=shards.sources[:1]), profile)
    assert 0 < rows[0].mask.mean() < 1


def test_too_little_text_for_one_row_is_an_error_with_both_numbers(run):
    _, profile, shards, *_ = run
    with pytest.raises(DataError, match=r"row_tokens: 5,000 tokens, but all validation texts together have \d+"):
        plan_long_rows(shards, with_positions(profile, row_tokens=5000))


def test_the_report_has_the_mean_loss_up_to_max_length_and_beyond(run):
    *_, model, _ = run
    ids = np.tile(np.arange(100, 116), 8)
    curves = measure_positions(model, [LongRow(ids, np.append(np.ones(127, bool), [False]))], ROWS)
    report = report_positions({"tuned": curves[""]}, ROWS, 96)
    first = curves[""][:3]
    mean = sum(one.loss_sum for one in first) / sum(one.tokens for one in first)
    assert report["up_to_max_length"]["tuned"] == pytest.approx(mean, abs=1e-6)
    assert report["beyond"]["tuned"] == pytest.approx(curves[""][3].loss, abs=1e-6)
    assert set(report_positions({"tuned": curves[""]}, ROWS, 128)) == {"up_to_max_length"}
    assert [line["position"] for line in table_positions({"tuned": curves[""]}, ROWS)] == [16, 48, 80, 112]


def test_a_lookup_table_finds_every_key_and_a_constant_model_none(run):
    *_, model, tokenizer = run
    questions = plan_passkey_questions(KEYS, seed=7)
    table = {}
    for one in questions:
        answer = tokenizer(f" {one.key}", add_special_tokens=False)["input_ids"]
        table[tuple(encode_passkey_question(tokenizer, OPEN_ASSISTANT, one))] = [*answer, tokenizer.eos_token_id]
    found = answer_questions(
        speaker(model, lambda prompt, said: table[tuple(prompt)][said]),
        tokenizer,
        OPEN_ASSISTANT,
        plan_passkey_questions(KEYS, seed=7),
        seed=7,
    )
    assert [one.question for one in found] == questions
    assert passkey.report_passkey({"tuned": found})["tuned"] == {
        "asked": 12,
        "right": 12,
        "accuracy": 1.0,
        "by_length": {"192": 1.0, "256": 1.0},
    }
    constant = tokenizer("7", add_special_tokens=False)["input_ids"][-1]
    wrong = answer_questions(
        speaker(model, lambda *_: constant), tokenizer, OPEN_ASSISTANT, plan_passkey_questions(KEYS, seed=7), seed=7
    )
    assert passkey.report_passkey({"tuned": wrong})["tuned"]["right"] == 0
    lines = list(passkey.table_answers({"tuned": wrong}))
    assert len(lines) == 12
    assert all("7777" in line["answer"] and line["right"] == 0 for line in lines)


def test_a_passkey_prompt_fills_its_length_and_has_its_key_at_its_depth(run):
    *_, tokenizer = run
    shares = []
    for depth in (0.0, 0.5, 1.0):
        ids = encode_passkey_question(tokenizer, OPEN_ASSISTANT, PasskeyQuestion(256, depth, 0, "48151"))
        text = tokenizer.decode(ids)
        assert 256 - 12 - 40 < len(ids) <= 256 - 12
        assert text.count("48151") == 2
        assert text.endswith(("<|assistant|> The pass key is", "<|assistant|>The pass key is"))
        shares.append(text.index("48151") / len(text))
    assert shares == sorted(shares)
    assert shares[2] - shares[0] > 0.3


def test_a_length_too_short_for_the_question_is_an_error(run):
    *_, model, tokenizer = run
    with pytest.raises(ConfigError, match=r"lengths: 40 tokens are too few: the question alone has \d+"):
        answer_questions(model, tokenizer, OPEN_ASSISTANT, [PasskeyQuestion(40, 0.5, 0, "48151")], seed=7)


def test_a_key_depends_only_on_seed_length_depth_and_repeat():
    fewer = plan_passkey_questions(KEYS.model_copy(update={"lengths": [256], "depths": [1.0]}), seed=7)
    assert set(fewer) <= set(plan_passkey_questions(KEYS, seed=7))
    assert fewer != plan_passkey_questions(KEYS.model_copy(update={"lengths": [256], "depths": [1.0]}), seed=8)
    assert len({one.key for one in plan_passkey_questions(KEYS, seed=7)}) == 12


def test_tables_and_plots_are_reproducible_byte_by_byte(run, tmp_path):
    *_, model, tokenizer = run
    sources = {name: {m: {"loss": 2.0, "tokens": 5} for m in ("base", "tuned")} for name in ("2023", "b,c")}
    curves = [
        {"position": 16 + 32 * n, "tokens": 64, "base": 5.0, "tuned": 3.0 + n, "base_unscaled": ""} for n in (0, 1)
    ]
    keys = dict.fromkeys(
        ("base", "tuned"),
        answer_questions(model, tokenizer, OPEN_ASSISTANT, plan_passkey_questions(KEYS, seed=7), seed=7),
    )
    (tmp_path / "steps.csv").write_text("step,loss,validation_a\n0,9.0,\n1,8.0,7.5\n2,7.0,7.5\n")
    for name in ("one", "two"):
        write_tables(tmp_path / name / "tables", plan_tables(sources, curves, keys))
        write_plots(tmp_path / name / "plots", tmp_path / name / "tables", tmp_path / "steps.csv", max_length=32)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*/*")} for n in ("one", "two"))
    assert first == second
    for name in ("loss", "sources", "positions", "passkey"):
        assert first[f"{name}.png"].startswith(b"\x89PNG")
        assert b"<svg" in first[f"{name}.svg"]
        assert b"<dc:date>" not in first[f"{name}.svg"]
    with (tmp_path / "one" / "tables" / "passkey.csv").open() as file:
        assert [line["length"] for line in csv.DictReader(file)] == ["192", "256"]
    with (tmp_path / "one" / "tables" / "scores.csv").open() as file:
        assert [line["source"] for line in csv.DictReader(file)] == ["2023", "2023", "b,c", "b,c"]


def test_the_passkey_grid_has_the_accuracy_by_depth_and_length():
    lines = [
        {"model": model, "length": length, "depth": depth, "right": right}
        for model, length, depth, right in (
            ("base", "96", "0.5", "0"), ("base", "800", "0.5", "1"), ("base", "96", "1.0", "1"),
            ("base", "800", "1.0", "1"), ("base", "96", "0.5", "1"), ("tuned", "96", "0.5", "1"),
        )
    ]  # fmt: skip
    assert passkey_grids(lines) == {
        "base": ([96, 800], [0.5, 1.0], [[0.5, 1.0], [1.0, 1.0]]),
        "tuned": ([96], [0.5], [[1.0]]),
    }
