"""Packed rows are isolated, measured on the model itself; the warm-up runs until Adam's moments exist."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from ropeway.config.load_params import load_profile
from ropeway.data.shards import open_shards
from ropeway.models.attention import VARLEN, attend_each, register_attention
from ropeway.models.supervised_loss import SupervisedLoss
from ropeway.runtime.errors import ConfigError
from ropeway.stages.train import warm_up
from ropeway.stages.train.training_run import Run
from ropeway.stages.train.warm_up import NOT_APPLIED, check_isolation, measure_isolation, run_worst_step
from tests.support.tiny_run import PACKED_BLOCK, make_run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Return (workspace, profile, shards) of the tiny run with packed rows."""
    root = tmp_path_factory.mktemp("packed")
    workspace, _ = make_run(root, block=PACKED_BLOCK)
    return workspace, load_profile(root / "params.yaml")[1], open_shards(workspace.data)


class Engine:
    """A model in place of DeepSpeed's engine; `outcomes` says which optimizer steps are applied."""

    device = torch.device("cpu")

    def __init__(self, module, outcomes=()):
        self.module, self.outcomes, self.steps = module, iter(outcomes), 0

    def eval(self):
        self.module.eval()

    def train(self):
        self.module.train()

    def step(self):
        self.steps += 1
        self.applied = next(self.outcomes)

    def set_gradient_accumulation_boundary(self, value):
        self.boundaries = [*getattr(self, "boundaries", []), value]

    def was_step_applied(self):
        return self.applied

    def load_checkpoint(self, folder, tag):
        self.loaded = folder, tag


def open_run(packed, kernel, dtype="fp32"):
    workspace, profile, shards = packed
    register_attention(kernel)
    model = AutoModelForCausalLM.from_pretrained(workspace.base, dtype=DTYPES[dtype], attn_implementation=VARLEN)
    return Run(profile.model_copy(update={"dtype": dtype}), shards, Engine(SupervisedLoss(model)), 0, 1, 1)


def shifted(by):
    """Return a kernel whose sequence boundaries are `by` tokens off."""

    def attend(q, k, v, cu, _longest, scale):
        moved = cu.clone()
        moved[1:-1] -= by
        lengths = moved[1:] - moved[:-1]
        return attend_each(q, k, v, moved[: len(lengths) + 1], int(lengths.max()), scale)

    return attend


def joined(q, k, v, _cu, longest, scale):
    return attend_each(q, k, v, torch.tensor([0, len(q)], dtype=torch.int32), longest, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_isolated_rows_pass_in_every_dtype_without_a_constant(packed, dtype):
    found = check_isolation(open_run(packed, attend_each, dtype))
    assert found.packed <= found.allowed
    assert found.joined > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [joined, shifted(2)], ids=["boundaries ignored", "boundaries two tokens off"])
def test_sequences_that_attend_to_each_other_are_refused_in_every_dtype(packed, kernel, dtype):
    with pytest.raises(ConfigError, match="attend to each other"):
        check_isolation(open_run(packed, kernel, dtype))


def test_rounding_is_measured_where_all_later_sequences_are_short(packed):
    def rounded(q, k, v, cu, longest, scale):  # kernels round differently for other numbers of tokens
        return attend_each(q, k, v, cu, longest, scale) * (1 + 0.001 * (len(q) % 7))

    run = open_run(packed, rounded)
    first, second = next(row for row in run.plan(0).packed if len(row) > 1)[:2]
    row = (first, replace(second, begin=0, end=8))
    with torch.no_grad():
        found = measure_isolation(run, row)
    assert 0 < found.rounding < found.joined
    assert found.packed <= found.allowed


def test_rounding_of_rows_of_another_size_refuses_no_sound_run(packed):
    def rounded(q, k, v, cu, longest, scale):  # other kernels for many tokens than for few, as BLAS libraries have
        return attend_each(q, k, v, cu, longest, scale) * (1.1 if len(q) >= len_of_first else 1)

    run = open_run(packed, rounded)
    first, second = next(row for row in run.plan(0).packed if len(row) > 1)[:2]
    row = (first, replace(second, begin=0, end=(first.end - first.begin) // 2))
    len_of_first = first.end - first.begin
    with torch.no_grad():
        found = measure_isolation(run, row)
    assert 0 < found.packed <= 3 * found.rounding


def test_padded_rows_need_no_isolation(packed):
    run = open_run(packed, attend_each)
    assert check_isolation(replace(run, profile=run.profile.model_copy(update={"layout": "padded"}), plans={})) is None


@pytest.mark.parametrize(
    ("outcomes", "steps", "said"),
    [
        ((1, 1), 2, "the longest rows fit: "),
        ((0, 0, 1, 0, 1), 5, "3 steps skipped by fp16 overflow"),
        ((0,) * NOT_APPLIED, NOT_APPLIED, "without the optimizer's step"),
        ((1, *(0,) * NOT_APPLIED), NOT_APPLIED + 1, "without the optimizer's step"),
    ],
    ids=["two applied", "after overflows", "only overflows", "one applied"],
)
def test_the_warm_up_runs_until_two_steps_are_applied(packed, monkeypatch, tmp_path, outcomes, steps, said):
    run = open_run(packed, attend_each)
    run.engine.outcomes = iter(outcomes)
    monkeypatch.setattr(warm_up, "forward_backward", lambda _run, batches: ((one, 1.5, None) for one in batches))
    monkeypatch.setattr(warm_up.torch, "distributed", SimpleNamespace(barrier=lambda: None))
    monkeypatch.setattr(warm_up.checkpoints, "remove", lambda _: None)
    assert said in run_worst_step(run, lambda: tmp_path)
    assert run.engine.steps == steps
    assert run.engine.loaded[0] == str(tmp_path)


def test_a_step_of_the_warm_up_has_two_micro_batches_and_the_next_step_all(packed, monkeypatch, tmp_path):
    run = replace(open_run(packed, attend_each), accumulation_steps=8)
    run.engine.outcomes, run.engine.micro_steps = iter((0, 1, 0, 1)), 0
    monkeypatch.setattr(warm_up, "forward_backward", lambda _run, batches: ((one, 1.5, None) for one in batches))
    monkeypatch.setattr(warm_up.torch, "distributed", SimpleNamespace(barrier=lambda: None))
    monkeypatch.setattr(warm_up.checkpoints, "remove", lambda _: None)
    step = run.engine.step
    run.engine.step = lambda: (step(), setattr(run.engine, "micro_steps", run.engine.micro_steps + 1))
    run_worst_step(run, lambda: tmp_path)
    assert run.engine.steps == 4
    assert run.engine.boundaries == [False, True, False, False, True, False, None]
    assert run.engine.micro_steps == 0
