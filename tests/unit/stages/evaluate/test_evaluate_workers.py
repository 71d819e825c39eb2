"""Results of several processes, merged, are bit-identical to those of one process."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from ropeway.config.sections import LongContext
from ropeway.data.shards import open_shards
from ropeway.models.chat_template import OPEN_ASSISTANT
from ropeway.runtime.errors import ConfigError
from ropeway.stages.evaluate import measuring
from ropeway.stages.evaluate.evaluation_workers import Share, assign_gpus, merge_shares
from ropeway.stages.evaluate.load_model import open_model
from ropeway.stages.evaluate.long_context import plan_long_context
from ropeway.stages.evaluate.measuring import EvalRequest, ShareResult, measure_folder
from ropeway.stages.evaluate.passkey import answer_questions, plan_passkey_questions
from ropeway.stages.evaluate.positions import plan_long_rows
from ropeway.stages.evaluate.samples import generate_samples, plan_samples
from ropeway.stages.evaluate.token_scores import score_sources, sum_batches
from tests.support.tiny_run import make_run

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONG = LongContext(kinds=["common_words", "multi_key", "multi_value"], lengths=[256], repeats=1)
GPUS = ["nvidia0", "nvidia1", "nvidia2", "nvidia3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workspace, profile = make_run(tmp_path_factory.mktemp("run"))
    return profile, open_shards(workspace.data), *open_model(workspace.model, like=workspace.model), workspace.model


def with_rope(model, parameters):
    """Return a newly loaded copy: scaled frequencies persist after a batch."""
    config = type(model.config).from_dict(model.config.to_dict() | {"rope_parameters": parameters})
    copy = LlamaForCausalLM(config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


def shares(count):
    return [Share(number, count) for number in range(count)]


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_scores_from_shares_are_bit_identical_to_those_of_one_process(run, kind):
    profile, shards, model, *_ = run
    rope = DYNAMIC if kind == "dynamic" else dict(model.config.rope_parameters)
    seen = []
    for count in (1, 2, 3, 7):
        parts = [sum_batches(with_rope(model, rope), shards, profile, share=share) for share in shares(count)]
        seen.append(score_sources(merge_shares(parts), shards, name="tuned"))
    assert seen == [seen[0]] * 4


def test_all_results_from_shares_are_bit_identical_to_those_of_one_process(run, monkeypatch):
    profile, shards, *_, folder = run
    ways = {"greedy": {"do_sample": False, "max_new_tokens": 4}, "drawn": {"do_sample": True, "max_new_tokens": 4}}
    request = EvalRequest(
        shards=shards,
        profile=profile,
        long_rows=plan_long_rows(shards, profile) * 3,
        questions=plan_passkey_questions(profile.evaluation.passkey, seed=3),
        long_context=plan_long_context(LONG, seed=3),
        samples=plan_samples(["Hi", "Why?"], ways),
        configurations=ways,
    )

    def run_shares_here(function, arguments, gpus):
        pickled = pickle.dumps(arguments)
        assert len(pickled) < 50_000
        return [function(*pickle.loads(pickled), share) for share in shares(len(gpus))]  # noqa: S301 - our own

    monkeypatch.setattr(measuring, "run_shares", run_shares_here)
    seen = [measure_folder(folder, folder, request, gpus=(None,) * count, name="tuned") for count in (1, 3)]
    assert seen[0] == seen[1]
    assert set(seen[0].curves) == {"", "_unscaled"}
    assert [key.question for key in seen[0].passkeys] == request.questions
    assert [one.question for one in seen[0].long_context] == request.long_context
    assert len(set(seen[0].answers)) > 1


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_sums_are_added_in_the_order_of_the_batches(run, monkeypatch, count):
    profile, shards, *_, folder = run
    losses = [1e16, 1.0, 1.0, -1e16, 3.0, 0.1]
    batches = [np.array([[loss] * 2, [1.0] * 2, [1.0] * 2]) for loss in losses]
    parts = [
        ShareResult(list(share.of(batches)), list(share.of([("", one) for one in batches])), [], [], [], [])
        for share in shares(count)
    ]
    monkeypatch.setattr(measuring, "run_shares", lambda *_: parts)
    found = measure_folder(folder, folder, EvalRequest(shards, profile), gpus=(None,) * count, name="tuned")
    one_by_one = ((((1e16 + 1.0) + 1.0) - 1e16) + 3.0) + 0.1
    assert one_by_one != sum(sorted(losses))
    assert [score.loss_sum for score in (*found.scores, *found.curves[""])] == [one_by_one] * 4


def test_earlier_inputs_change_no_answer(run):
    profile, _, model, tokenizer, _ = run
    stretched = with_rope(model, DYNAMIC)
    ways = {"greedy": {"do_sample": False, "max_new_tokens": 4}, "drawn": {"do_sample": True, "max_new_tokens": 4}}
    questions = plan_passkey_questions(profile.evaluation.passkey, seed=3)[::3]
    draws = plan_samples(["Hi", "word " * 60], ways)  # the second goes beyond the 48 positions of the base
    keys = answer_questions(stretched, tokenizer, OPEN_ASSISTANT, questions, seed=3)
    answers = generate_samples(stretched, tokenizer, OPEN_ASSISTANT, draws, ways, seed=3)
    with torch.inference_mode():
        stretched(torch.arange(3, 400)[None], use_cache=False)
    assert generate_samples(stretched, tokenizer, OPEN_ASSISTANT, draws[::-1], ways, seed=3) == answers[::-1]
    assert answer_questions(stretched, tokenizer, OPEN_ASSISTANT, questions[::-1], seed=3) == keys[::-1]


@given(items=st.lists(st.integers(), max_size=40), count=st.integers(1, 9))
def test_every_item_is_in_one_share_and_is_merged_into_its_position(items, count):
    parts = [share.of(items) for share in shares(count)]
    assert merge_shares(parts) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_share_without_one_of_its_items_is_not_merged():
    with pytest.raises(ValueError, match="attempt to assign sequence of size 0"):
        merge_shares([[np.zeros(3)], [], [np.zeros(3)]])


@pytest.mark.parametrize(
    ("environment", "found", "expected"),
    [
        ({}, [], (None,)),
        ({"ROPEWAY_RANKS": "4"}, [], (None,)),  # threads use the cores already
        ({"ROPEWAY_EVALUATE_WORKERS": "2"}, [], (None, None)),
        ({}, GPUS, ("0", "1", "2", "3")),
        ({}, ["nvidia5"], ("0",)),  # CUDA counts what it finds
        ({"ROPEWAY_RANKS": "2"}, GPUS, ("0", "1")),
        ({"ROPEWAY_RANKS": "16"}, GPUS, ("0", "1", "2", "3")),
        ({"ROPEWAY_RANKS": "2", "ROPEWAY_EVALUATE_WORKERS": "3"}, GPUS, ("0", "1", "2")),
        ({"ROPEWAY_EVALUATE_WORKERS": "3"}, GPUS[:2], ("0", "1", "0")),
        ({"ROPEWAY_EVALUATE_WORKERS": ""}, GPUS, ("0", "1", "2", "3")),
        ({"CUDA_VISIBLE_DEVICES": "6, GPU-ab"}, ["6", " GPU-ab"], ("6", "GPU-ab")),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "4"}, GPUS, ("0", "1")),
    ],
)
def test_the_default_is_one_process_per_gpu_used_in_training(environment, found, expected):
    assert assign_gpus(environment, found) == expected


@pytest.mark.parametrize("stated", ["0", "two", "-1"])
def test_an_invalid_number_of_processes_is_refused(stated):
    with pytest.raises(ConfigError, match=f"ROPEWAY_EVALUATE_WORKERS: .* found '{stated}'"):
        assign_gpus({"ROPEWAY_EVALUATE_WORKERS": stated}, [])
