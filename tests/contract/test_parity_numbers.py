"""Numbers of the model and the optimizer: RoPE, padded vocabulary, loss, accuracy, learning rate."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ropeway.data.batches import Batch
from ropeway.models.rope import build_scaling
from ropeway.models.supervised_loss import chunked_losses
from ropeway.stages.base.stage import plan_vocabulary
from ropeway.stages.evaluate.token_scores import Score, sum_batch
from ropeway.stages.train.loss import micro_batch_loss, token_loss
from ropeway.stages.train.training_run import learning_rate
from tests.support.vectors import cases, compared, published, same, vectors


def close(file, found, expected, tolerance):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    compared[file] += 1


@pytest.mark.parametrize(("name", "case"), cases("rope"))
def test_rope_turns_every_position_like_the_original(name, case):  # noqa: ARG001
    rope = build_scaling("linear", case["factor"], float(case["theta"]), 4096)
    angles = np.outer(np.asarray(case["positions"], dtype=np.float32), rope.inv_freq(case["head_dim"]))
    angles = np.concatenate([angles, angles], axis=1)[:, case["dims"]]
    close("rope", np.cos(angles), case["cos"], vectors("rope")["tolerance"])
    close("rope", np.sin(angles), case["sin"], vectors("rope")["tolerance"])


@pytest.mark.parametrize(("name", "case"), cases("vocab"))
def test_the_vocabulary_is_padded_like_the_originals(name, case):
    same("vocab", plan_vocabulary(case["len_tokenizer"], vectors("vocab")["multiple_of"]), case["padded"], name)
    assert published().pad_vocab_to_multiple_of == vectors("vocab")["multiple_of"]


def losses_of(case):
    logits, targets = torch.tensor(case["logits"]), torch.tensor(case["targets"])
    if case["mask"] is None:
        mask = torch.ones(targets.shape, dtype=torch.bool)
    else:
        mask = torch.tensor([[sign == "1" for sign in row] for row in case["mask"]])
    return chunked_losses(logits[mask], torch.nn.Identity(), targets[mask], chunk=3)


@pytest.mark.parametrize(("name", "case"), cases("loss"))
def test_a_micro_batch_has_the_originals_loss(name, case):  # noqa: ARG001
    found = losses_of(case)
    total = found if case["reduction"] == "none" else micro_batch_loss(found)
    close("loss", total.tolist(), case["loss"], vectors("loss")["tolerance"])


def test_accumulation_averages_micro_batches_or_tokens_as_asked():
    expected = vectors("loss")["accumulation"]
    parts = [losses_of(case) for case in expected["micro_batches"]]
    total = sum(map(len, parts))
    by_batch = [micro_batch_loss(part) for part in parts]
    by_token = [token_loss(part, total=total, micro_batches=len(parts)) for part in parts]
    tolerance = vectors("loss")["tolerance"]
    close("loss", float(torch.stack(by_batch).mean()), expected["step_loss"], tolerance)
    close("loss", float(torch.stack(by_token).mean()), expected["token_weighted_instead"], tolerance)


@pytest.mark.parametrize(("name", "case"), cases("lr"))
def test_every_step_has_the_learning_rate_that_deepspeed_0_19_gives_it(name, case):  # noqa: ARG001
    profile = published(learning_rate=case["lr"], warmup_steps=case["warmup_steps"])
    expected = case["deepspeed_0_19_8"]
    found = [learning_rate(profile, applied, total_steps=3319) for applied in range(len(expected))]
    close("lr", found, expected, 1e-12)


class Oracle(torch.nn.Module):
    """A model that is sure of the predictions it was given, in the shape of transformers'."""

    base_model_prefix, device = "model", "cpu"

    def __init__(self, predictions):
        super().__init__()
        self.model = torch.nn.Module()
        states = torch.nn.functional.one_hot(torch.tensor(predictions)).float()
        self.model.forward = lambda **_: SimpleNamespace(last_hidden_state=states)

    def forward(self, **_):
        return SimpleNamespace(logits=self.model().last_hidden_state)


@pytest.mark.parametrize(("name", "case"), cases("metric"))
def test_accuracy_counts_what_the_original_counts(name, case):
    """The original counts labels above 0; id 0 is no target of real text, so there the mask says the same."""
    labels = np.asarray(case["labels"])
    zeros = np.zeros_like(labels)
    batch = Batch(zeros, zeros, labels, labels > 0, zeros.astype(np.int16))
    loss, correct, counted = sum_batch(Oracle(case["predictions"]), batch, groups=1)[:, 0]
    same("metric", (int(counted), int(correct)), (case["counted"], case["correct"]), name)
    close("metric", Score(loss, int(correct), int(counted)).metrics(0)["accuracy"], case["accuracy"], 1e-6)
