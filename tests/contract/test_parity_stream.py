"""Whole streams: three corpora through the prepare stage, then every micro-batch of several ranks and epochs.

The original draws its order and its windows from one global generator, batch after batch; the product draws windows
from a generator of their own. So the plan is drawn here with one generator passed from function to function.
"""

import random
import shutil

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ropeway.config.sections import DatasetOptions
from ropeway.data.batches import Piece, collate, locate, plan_window
from ropeway.data.mixture import draw_order, epoch_count, rank_order
from ropeway.data.raw_records import RawWriter
from ropeway.data.shards import open_shards
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.models.rope import build_scaling
from ropeway.models.supervised_loss import SupervisedLoss
from ropeway.models.tokenizer import count_tokens, open_tokenizer
from ropeway.runtime.manifest import write_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.base.stage import plan_vocabulary
from ropeway.stages.evaluate.token_scores import sum_batch
from ropeway.stages.train.loss import micro_batch_loss
from tests.support.tokenizing import tokenize_and_prepare
from tests.support.vectors import TOKENIZER, bits, compared, conversation, published, same, sha256, vectors


@pytest.fixture(scope="module")
def stream():
    return vectors("stream")


@pytest.fixture(scope="module")
def profile(stream):
    datasets = [{name: DatasetOptions(**values)} for entry in stream["datasets"] for name, values in entry.items()]
    keys = ("rng_seed", "val_split", "max_length", "random_offset_probability", "per_device_train_batch_size")
    asked = published().contamination.model_copy(update={"prompts": []})
    return published(datasets=datasets, contamination=asked, **{key: stream[key] for key in keys})


@pytest.fixture(scope="module")
def shards(stream, profile, tmp_path_factory):
    """What the prepare stage itself makes of the corpora."""
    workspace = Workspace(tmp_path_factory.mktemp("stream"), "stream")
    facts = {}
    for name, records in stream["corpora"].items():
        kind = "conversation" if "conversation" in records[0] else "document"
        with RawWriter(workspace.raw / name, kind) as writer:
            for record in records:
                writer.add(
                    conversation(record) if kind == "conversation" else record[vectors("lm")["text_column"][name]]
                )
        facts[name] = {"kind": kind, "read": len(records), "kept": len(records), "refused": {}}
    write_manifest(workspace.raw, {"sources": facts})
    shutil.copytree(TOKENIZER, workspace.base)
    (workspace.base / "chat_template.jinja").write_text(OPEN_ASSISTANT.jinja)
    tokenize_and_prepare(workspace, profile)
    return open_shards(workspace.data)


def row_of(shards, profile, source, sequence, generator):
    part = shards.sources[source]
    begin, end = plan_window(
        int(part.lengths[sequence]),
        max_length=profile.max_length,
        probability=profile.random_offset_probability,
        generator=generator,
        is_document=part.is_document,
    )
    return (Piece(source, int(sequence), begin, end),)


def batches_of(run, shards, profile):
    """Yield (places in the order, batch) of one rank in one epoch."""
    sizes = [len(source.train) for source in shards.sources]
    counts = [
        epoch_count(size, options, name=name) for size, (name, options) in zip(sizes, profile.mixture, strict=True)
    ]
    generator = random.Random(profile.rng_seed + run["epoch"])
    order = draw_order(sizes, counts, generator=generator)
    mine = rank_order(order, rank=run["rank"], world_size=run["world_size"])
    size = profile.per_device_train_batch_size
    for at in range(0, len(mine), size):
        places = [locate(sizes, index) for index in mine[at : at + size]]
        rows = [
            row_of(shards, profile, source, shards.sources[source].train[position], generator)
            for source, position in places
        ]
        yield mine[at : at + size], collate(rows, shards, profile)


def test_training_and_validation_entries_equal_the_originals(stream, shards):
    for source in shards.sources:
        same("stream", source.train, stream["train_entries"][source.name], source.name)
        same("stream", source.validation, stream["eval_entries"][source.name], source.name)


@pytest.mark.parametrize("number", range(len(vectors("stream")["runs"])))
def test_every_micro_batch_equals_the_originals(stream, shards, profile, number):
    run = stream["runs"][number]
    found = list(batches_of(run, shards, profile))
    same("stream", [index for order, _ in found for index in order], run["indices"])
    for (_, batch), expected in zip(found, run["batches"], strict=True):
        same("stream", list(batch.input_ids.shape), expected["shape"])
        same("stream", sha256(batch.input_ids), expected["input_ids_sha256"])
        same("stream", sha256(batch.loss_mask), expected["label_masks_sha256"])
        same("stream", sha256(batch.targets), expected["targets_sha256"])
        same("stream", int(batch.loss_mask.sum()), expected["tokens_in_loss"])
        if "input_ids" in expected:
            same("stream", batch.input_ids, expected["input_ids"])
            same("stream", [bits(row) for row in batch.loss_mask], expected["label_masks"])


@pytest.fixture(scope="module")
def tiny():
    return vectors("tiny_model")


@pytest.fixture(scope="module")
def model(tiny, profile):
    """A Llama whose weights are a formula, padded and stretched by the product's own functions."""
    shape = {k: v for k, v in tiny["config"].items() if k not in ("rope_linear_factor", "base_vocab", "rope_theta")}
    tokens = count_tokens(open_tokenizer(TOKENIZER))
    rope = build_scaling("linear", tiny["config"]["rope_linear_factor"], tiny["config"]["rope_theta"], 64)
    same("tiny_model", tokens, tiny["tokenizer_len"])
    same("tiny_model", plan_vocabulary(tokens, profile.pad_vocab_to_multiple_of), tiny["padded_vocab"])
    config = LlamaConfig(**shape, vocab_size=tiny["padded_vocab"], rope_parameters=rope.to_config())
    model = LlamaForCausalLM(config).eval()
    weights = dict(sorted(model.named_parameters()))
    same("tiny_model", list(weights), tiny["parameter_names_sorted"])
    with torch.no_grad():
        for j, (name, weight) in enumerate(weights.items()):
            i = np.arange(weight.numel(), dtype=np.float64)
            values = np.ones_like(i) if "norm" in name else 0.25 * np.sin(1.0 + 0.31 * j + 0.61803398875 * i)
            weight.copy_(torch.from_numpy(values.astype(np.float32)).view_as(weight))
        model.lm_head.weight[tiny["lm_head_rows_times_4"]] *= 4
    return model


def close(tiny, found, expected):
    assert found == pytest.approx(expected, abs=tiny["tolerance"])
    compared["tiny_model"] += 1


def test_the_model_of_the_formula_is_the_originals(tiny, model):
    with torch.inference_mode():
        logits = model(torch.tensor([tiny["probe_input_ids"]])).logits[0]
    close(tiny, logits[-1, :16].tolist(), tiny["probe_logits_last_position_first_16"])
    close(tiny, logits[0, :8].tolist(), tiny["probe_logits_position_0_first_8"])


def test_every_micro_batch_has_the_originals_training_loss(tiny, model, stream, shards, profile):
    run = next(r for r in stream["runs"] if all(r[k] == v for k, v in tiny["train_micro_batches_from"].items()))
    loss = SupervisedLoss(model)
    for (_, batch), expected in zip(batches_of(run, shards, profile), tiny["train_micro_batch_losses"], strict=True):
        parts = (batch.input_ids, batch.position_ids, batch.targets, batch.loss_mask)
        with torch.inference_mode():
            close(tiny, float(micro_batch_loss(loss(*map(torch.from_numpy, parts)))), expected)


def test_every_source_has_the_originals_validation_loss_and_accuracy(tiny, model, shards, profile):
    """The original's evaluation windows its rows as well, and averages rows, not tokens."""
    groups = len(shards.sources)
    for number, source in enumerate(shards.sources):
        generator = random.Random(tiny["evaluation_seed_each"])
        rows = [row_of(shards, profile, number, sequence, generator) for sequence in source.validation]
        sums = [
            sum_batch(model, collate([row], shards, profile, pad_to_multiple_of=None), groups=groups)[:, number]
            for row in rows
        ]
        expected = tiny["evaluation"][source.name]
        losses, correct, tokens = np.array(sums).T
        close(tiny, float(np.mean(losses / tokens)), expected[f"eval_{source.name}_loss"])
        close(tiny, float(correct.sum() / tokens.sum()), expected[f"eval_{source.name}_accuracy"])
