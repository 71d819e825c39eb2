import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ropeway.config.stages import READS
from ropeway.data.batches import collate
from ropeway.data.shards import open_shards
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.reporting import report_eval
from ropeway.runtime.errors import DataError
from ropeway.runtime.manifest import write_manifest
from ropeway.stages.evaluate import stage as evaluate
from ropeway.stages.evaluate.load_model import check_data, open_model
from ropeway.stages.evaluate.stage import first_rows, score_first_rows, validation_digest
from ropeway.stages.evaluate.token_scores import Score, all_rows, mixing_limit, plan_batches, sum_batch
from tests.support.tiny_run import make_run, measure


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workspace, profile = make_run(tmp_path_factory.mktemp("run"))
    model = AutoModelForCausalLM.from_pretrained(workspace.model, dtype=torch.float32).eval()
    return workspace, profile, open_shards(workspace.data), model


def varied(profile, **changes):
    values = {name: getattr(profile, name) for name in READS["evaluate"]} | changes
    return profile.model_construct(**values)


def with_validation(shards, choose):
    return replace(shards, sources=tuple(replace(source, validation=choose(source)) for source in shards.sources))


def reference(model, shards, profile):
    """Sums per source, row by row, over all logits of the whole model: what the scores must be."""
    sums = np.zeros((3, len(shards.sources)))
    for row in all_rows(shards, profile):
        batch = collate([row], shards, profile, pad_to_multiple_of=None)
        with torch.inference_mode():
            logits = model(input_ids=torch.from_numpy(batch.input_ids), use_cache=False).logits[0].double()
        for at in np.flatnonzero(batch.loss_mask[0]):
            target = int(batch.targets[0, at])
            loss = torch.logsumexp(logits[at], 0) - logits[at, target]
            sums[:, row[0].source] += [float(loss), float(int(logits[at].argmax()) == target), 1.0]
    return sums


def test_scores_equal_those_over_all_logits_row_by_row(run):
    _, profile, shards, model = run
    expected = reference(model, shards, profile)
    scores = measure(model, shards, profile, name="tuned")
    np.testing.assert_allclose([score.loss_sum for score in scores], expected[0], rtol=1e-6)
    assert [score.correct for score in scores] == expected[1].tolist()
    assert [score.tokens for score in scores] == expected[2].tolist()


@pytest.mark.parametrize("document_end", ["masked", "eos", "published"])
def test_batches_of_one_and_of_sixteen_give_the_same_numbers(run, document_end):
    _, profile, shards, model = run
    one, sixteen = (
        measure(
            model, shards, varied(profile, per_device_eval_batch_size=size, document_end=document_end), name="tuned"
        )
        for size in (1, 16)
    )
    for a, b in zip(one, sixteen, strict=True):
        assert a.tokens == b.tokens
        assert a.correct == b.correct
        assert a.loss == pytest.approx(b.loss, abs=1e-6)


def test_under_dynamic_scaling_a_row_s_loss_does_not_depend_on_its_batch(run):
    _, profile, shards, model = run
    config = type(model.config).from_dict(
        model.config.to_dict() | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    )
    losses = []
    for size in (1, 16):
        dynamic = LlamaForCausalLM(config).eval()  # a new model: scaled frequencies persist after a batch
        dynamic.load_state_dict(model.state_dict())
        losses.append(
            [s.loss for s in measure(dynamic, shards, varied(profile, per_device_eval_batch_size=size), name="t")]
        )
    assert mixing_limit(profile, config) == 49
    assert sum(row[0].end > 49 for row in all_rows(shards, profile)) > 3
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_uniform_model_has_the_log_of_the_vocabulary_size_as_loss(run):
    _, profile, shards, model = run
    uniform = LlamaForCausalLM(model.config).eval()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    for score in measure(uniform, shards, profile, name="base"):
        assert score.loss == pytest.approx(math.log(2016), abs=1e-6)
        assert score.metrics(4 * score.tokens)["perplexity"] == pytest.approx(2016, rel=1e-5)


def test_a_model_that_always_predicts_eos_is_correct_exactly_at_the_ends_of_answers(run):
    _, profile, shards, model = run
    constant = LlamaForCausalLM(model.config).eval()
    torch.nn.init.zeros_(constant.lm_head.weight)
    ends = 0
    for row in all_rows(shards, profile):
        batch = collate([row], shards, profile, pad_to_multiple_of=None)
        ends += int(((batch.targets == 2) & batch.loss_mask).sum())
    # All logits are equal, so argmax is id 0; a bias towards id 2 makes it the most likely everywhere.
    constant.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(2), 2016).float() * 20)
    assert ends > 0
    assert sum(score.correct for score in measure(constant, shards, profile, name="base")) == ends


def test_the_loss_mask_decides_what_is_measured(run):
    _, profile, shards, model = run
    talk, everything = (
        measure(model, shards, varied(profile, label_masking=masking), name="tuned")[0] for masking in (True, False)
    )
    answers = measure(model, shards, varied(profile, what_counts="answers"), name="tuned")[0]
    assert answers.tokens < talk.tokens < everything.tokens
    assert len({round(score.loss, 4) for score in (answers, talk, everything)}) == 3


def test_padding_changes_no_sum(run):
    _, profile, shards, model = run
    row = all_rows(shards, profile)[:1]
    tight, wide = (
        sum_batch(model, collate(row, shards, profile, pad_to_multiple_of=multiple), groups=2)
        for multiple in (None, 64)
    )
    np.testing.assert_allclose(tight, wide, rtol=1e-6)


def test_batches_group_similar_lengths_and_have_every_row_once():
    lengths = [5, 1, 9, 9, 2, 7, 9]
    batches = plan_batches(lengths, 3)
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert [[lengths[row] for row in batch] for batch in batches] == [[1, 2, 5], [7, 9, 9], [9]]


def test_a_source_without_a_supervised_validation_token_is_an_error(run):
    _, profile, shards, model = run
    empty = with_validation(shards, lambda source: source.validation[: 0 if source.name == "talk" else None])
    with pytest.raises(DataError, match=r"source talk: 0 validation rows with 0 supervised tokens.*val_split"):
        measure(model, empty, profile, name="tuned")


def test_a_nan_loss_is_an_error_that_names_model_and_source(run):
    _, profile, shards, model = run
    broken = LlamaForCausalLM(model.config).eval()
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(DataError, match="source talk: the loss of the tuned model is nan over"):
        measure(broken, shards, profile, name="tuned")


def test_the_perplexity_of_a_huge_loss_is_a_finite_number():
    assert json.loads(json.dumps(Score(9000.0, 0, 1).metrics(0), allow_nan=False))["perplexity"] > 1e300


def test_the_validation_digest_depends_on_rows_and_masks_but_not_on_their_order(run):
    _, profile, shards, _ = run
    usual = validation_digest(shards, profile)
    turned = with_validation(shards, lambda source: source.validation[::-1])
    fewer = with_validation(shards, lambda source: source.validation[1:])
    assert validation_digest(turned, profile) == usual
    assert validation_digest(fewer, profile) != usual
    assert validation_digest(shards, varied(profile, label_masking=False)) != usual


def test_a_model_with_another_template_or_tokenizer_than_the_data_is_refused(tmp_path):
    workspace, profile = make_run(tmp_path)
    template = workspace.model / "chat_template.jinja"
    template.write_text(OPEN_ASSISTANT.jinja.replace("eos_token", "' ' + eos_token", 1))
    write_manifest(workspace.model, {"steps": 3})
    with pytest.raises(DataError, match=r"its template base .*is not that of the data"):
        evaluate.run(workspace, profile)
    template.write_text(OPEN_ASSISTANT.jinja)
    tokenizer = workspace.model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|system|>", "<|System|>"))
    with pytest.raises(DataError, match=r"tokenizer.json: sha256 is .*that of the data is"):
        check_data(workspace.model, open_shards(workspace.data))


def test_two_evaluations_of_one_run_give_the_same_bytes(tmp_path):
    workspace, profile = make_run(tmp_path)
    seen = []
    for _ in range(2):
        evaluate.run(workspace, profile)
        report_eval.run(workspace, profile)
        files = [*workspace.tables.iterdir(), *workspace.plots.iterdir(), workspace.samples_page]
        shown = {path.relative_to(workspace.run): path.read_bytes() for path in files}
        seen.append((workspace.evaluation.read_bytes(), workspace.samples.read_bytes(), shown))
    assert seen[0] == seen[1]
    report = json.loads(seen[0][0])
    assert set(report) == {"sources", "mean", "validation", "tokenizer", "rows", "positions", "passkey", "identities"}
    assert list(report["sources"]) == ["talk", "text"]
    assert report["rows"] == 14
    means = [report["sources"][name]["tuned"]["loss"] for name in ("talk", "text")]
    assert report["mean"]["tuned"] == pytest.approx(sum(means) / 2, abs=1e-6)


def test_the_model_is_opened_in_full_precision_on_a_cpu(run):
    workspace, *_ = run
    model, _ = open_model(workspace.model, like=workspace.model)
    assert torch.cuda.is_available() or model.dtype == torch.float32
    assert not model.training


def test_a_preview_scores_the_first_rows_and_writes_nothing(run):
    workspace, profile, shards, model = run
    before = sorted(workspace.root.rglob("*"))
    rows = score_first_rows(workspace, profile, limit=2)
    score = measure(model, first_rows(shards, 2), profile, name="tuned")[0]
    assert [(row["source"], row["model"]) for row in rows] == [
        (source, model) for source in ("talk", "text") for model in ("base", "tuned")
    ]
    tuned = next(row for row in rows if row["source"] == "talk" and row["model"] == "tuned")
    assert tuned["loss"] == pytest.approx(score.loss, abs=1e-4)
    assert tuned["tokens"] == score.tokens
    assert sorted(workspace.root.rglob("*")) == before


def test_a_preview_of_a_model_that_is_not_trained_is_a_data_error(run, tmp_path):
    workspace, profile, *_ = run
    with pytest.raises(DataError, match="dvc repro base"):
        score_first_rows(replace(workspace, root=tmp_path), profile, limit=2)
