"""`loss_normalisation: token`: ten ways to cut the same rows into micro-batches and ranks give the same step."""

import json
import os
import sys

import pytest

from tests.support.forked import run_ranks
from tests.support.tiny_run import BLOCK
from tests.support.training import make_many_rows


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_many_rows(tmp_path_factory.mktemp("splits"), BLOCK)


def cut(root, changes, ranks, sizes):
    """Return one log line per micro-batch size, with these values changed in the profile."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    said = run_ranks("tests.support.splits", root, json.dumps(changes), *sizes, ranks=ranks, env=environment)
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def test_token_normalisation_gives_the_same_step_over_ten_splits(root):
    token = {"loss_normalisation": "token"}
    lines = cut(root, token, 1, (32, 16, 8, 4, 2)) + cut(root, token, 2, (16, 8, 4, 2, 1))
    assert len({(line["micro"], line["accumulation"], line["ranks"]) for line in lines}) == 10
    for line in lines:
        assert line["rows"] == lines[0]["rows"]
        assert line["supervised_tokens"] == lines[0]["supervised_tokens"]
        assert line["loss"] == pytest.approx(lines[0]["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-5)


@pytest.mark.timeout(300)
def test_under_zero3_ranks_may_have_different_numbers_of_loss_chunks(root):
    """Each chunk needs the head, which ZeRO-3 gathers from all ranks: they must ask for it equally often."""
    few = {"loss_normalisation": "token", "chunk": 4, "zero": 3}
    (line,) = cut(root, few, 2, (1,))
    (expected,) = cut(root, {"loss_normalisation": "token"}, 1, (16,))
    assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_the_published_normalisation_depends_on_the_split_as_the_original_did(root):
    lines = cut(root, {"loss_normalisation": "micro_batch"}, 1, (32, 1))
    assert abs(lines[0]["loss"] - lines[1]["loss"]) > 1e-3
