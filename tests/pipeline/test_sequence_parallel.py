"""`sequence_parallel`: ranks that share rows take the step that one rank takes, and resume to the same bytes."""

import json
import os
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.forked import run_ranks
from tests.support.tiny_run import BLOCK
from tests.support.training import forget, make_many_rows, start, train, zero


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """4 query and 2 key-value heads: two ranks split them, four need them twice."""
    return make_many_rows(
        tmp_path_factory.mktemp("shared"), BLOCK.replace("num_key_value_heads: 4", "num_key_value_heads: 2")
    )


def step(root, folder, ranks, shared, **changes):
    """Return the log line of one optimizer step and the gradient of every weight."""
    kept = folder / f"{ranks}-{shared}.pt"
    changes = {"sequence_parallel": shared, "gradients": str(kept), "rows": 8, **changes}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    said = run_ranks("tests.support.splits", root, json.dumps(changes), 2, ranks=ranks, env=environment)
    (line,) = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return line, torch.load(kept)


# (ranks, of which share a row): each case starts as many ranks. `make test-slow` has every split in every layout.
SPLITS = ((2, 2), (4, 4), (4, 2))


@pytest.mark.parametrize(
    ("layout", "normalisation", "splits"),
    [
        ("padded", "micro_batch", ((4, 2),)),
        ("packed", "token", ((4, 4),)),
        *(
            pytest.param(layout, normalisation, SPLITS, marks=pytest.mark.slow)
            for layout in ("padded", "packed")
            for normalisation in ("micro_batch", "token")
        ),
    ],
)
def test_ranks_that_share_rows_have_the_loss_and_gradients_of_one_rank(root, tmp_path, layout, normalisation, splits):
    changes = {"layout": layout, "loss_normalisation": normalisation}
    groups = {ranks // shared for ranks, shared in splits}
    alone = {count: step(root, tmp_path, count, 1, **changes) for count in groups}
    for ranks, shared in splits:
        expected, gradients = alone[ranks // shared]
        line, found = step(root, tmp_path, ranks, shared, **changes)
        for key in ("rows", "tokens", "supervised_tokens"):
            assert line[key] == expected[key]
        for key in ("loss", "grad_norm", "loss_talk", "loss_text"):
            assert line[key] == pytest.approx(expected[key], rel=1e-5), (key, ranks, shared)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), name


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_with_shared_rows_is_checked_resumes_to_the_same_bytes_and_learns_what_one_rank_learns(tmp_path, stage):
    said, workspace = train(tmp_path, zero(stage), "layout: packed", "sequence_parallel: 2")
    assert "2 ranks share each row" in said
    assert "each sequence's losses equal those without packing" in said
    exported = (workspace.model / "model.safetensors").read_bytes()
    log = forget(workspace, 1)
    assert "resuming after step" in start(workspace)
    assert (workspace.model / "model.safetensors").read_bytes() == exported
    _, alone = train(tmp_path / "alone", zero(stage), "layout: packed", ranks=1)
    expected = forget(alone, 1)
    assert [line["rows"] for line in log] == [line["rows"] for line in expected]
    for mine, one in zip(log, expected, strict=True):
        assert mine["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert mine["tokens"] == one["tokens"]
    found, of_one = (
        AutoModelForCausalLM.from_pretrained(where.model, dtype=torch.float32).state_dict()
        for where in (workspace, alone)
    )
    for name, part in of_one.items():
        assert torch.allclose(found[name], part, atol=1e-5), name
