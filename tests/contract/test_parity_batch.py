"""Batches of the training collator (width a multiple of 16) and the evaluation collator (none)."""

import numpy as np
import pytest

from ropeway.data.batches import collate
from tests.support.vectors import Bench, bits, cases, published, same, seeded


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize(("name", "case"), cases("batch"))
def test_a_batch_equals_the_originals_in_every_key(bench, name, case):
    generator = seeded(case)
    sequences = [
        bench.talk(feature["conversation"]) if "conversation" in feature else bench.text(feature["lm"])
        for feature in case["features"]
    ]
    shards, rows = bench.rows(
        sequences,
        max_length=case["max_length"],
        probability=case["random_offset_probability"],
        generator=generator,
    )
    profile = published(max_length=case["max_length"])
    batch = collate(rows, shards, profile, pad_to_multiple_of=case["pad_to_multiple_of"])
    same("batch", generator.random(), case["random_after"], name)
    same("batch", batch.input_ids, case["input_ids"], name)
    same("batch", batch.targets, case["targets"], name)
    same("batch", [bits(row >= 0) for row in batch.sources], flat(case["attention_mask"]), name)
    same("batch", [bits(row) for row in batch.loss_mask], flat(case["label_masks"]), name)
    types = {"input_ids": batch.input_ids, "targets": batch.targets, "label_masks": batch.loss_mask}
    for key, found in types.items():
        same("batch", f"torch.{found.dtype}", case["dtypes"][key], name)


def flat(masks):
    return [mask if isinstance(mask, str) else bits(mask) for mask in masks]


@pytest.mark.parametrize(("name", "case"), cases("batch", "left_padding_cases"))
def test_rows_are_padded_on_the_right_whatever_the_tokenizer_asks_for(bench, name, case):
    """The original, told to pad left, kept its masks on the right. Here the side cannot be chosen."""
    sequences = [
        bench.talk(f["conversation"]) if "conversation" in f else bench.text(f["lm"]) for f in case["features"]
    ]
    generator = seeded(case)
    shards, rows = bench.rows(
        sequences,
        max_length=case["max_length"],
        probability=case["random_offset_probability"],
        generator=generator,
    )
    batch = collate(rows, shards, published(max_length=case["max_length"]))
    same("batch", [bits(row) for row in batch.loss_mask], flat(case["label_masks"]), name)
    for ours, theirs in zip(batch.input_ids, np.asarray(case["input_ids"]), strict=True):
        assert sorted(ours) == sorted(theirs)  # the same tokens and padding, put elsewhere
