"""`loss_normalisation: token`: ten ways to cut the same rows into micro-batches and ranks give the same step."""

import json
import os
import sys

import pytest

from tests.support.forked import run_ranks
from tests.support.tiny_run import BLOCK, make_data, make_run, talks, texts


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("splits")
    workspace, _ = make_run(root, "train", block=BLOCK.replace("fraction: 0.5", "fraction: 1.0"))
    for path in sorted(workspace.data.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    from ropeway.config.load_params import load_profile

    make_data(workspace, load_profile(root / "params.yaml")[1], talks() * 3, texts() * 2)
    return root


def cut(root, normalisation, ranks, sizes):
    """Return one log line per micro-batch size."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    said = run_ranks("tests.support.splits", root, normalisation, *sizes, ranks=ranks, env=environment)
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def test_token_normalisation_gives_the_same_step_over_ten_splits(root):
    lines = cut(root, "token", 1, (32, 16, 8, 4, 2)) + cut(root, "token", 2, (16, 8, 4, 2, 1))
    assert len({(line["micro"], line["accumulation"], line["ranks"]) for line in lines}) == 10
    for line in lines:
        assert line["rows"] == lines[0]["rows"]
        assert line["supervised_tokens"] == lines[0]["supervised_tokens"]
        assert line["loss"] == pytest.approx(lines[0]["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-5)


def test_the_published_normalisation_depends_on_the_split_as_the_original_did(root):
    lines = cut(root, "micro_batch", 1, (32, 1))
    assert abs(lines[0]["loss"] - lines[1]["loss"]) > 1e-3
