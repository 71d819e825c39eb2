"""A published version made again from git, dvc and the registry: the same weights, or a word on why not."""

import json
import shutil

import pytest

from tests.support.main_job import STEPS, MainJob, make_main_job

# Two or three whole runs, on a machine that may do other work: `make test-slow`.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def _published(tmp_path_factory):
    job = make_main_job(tmp_path_factory.mktemp("reproduce") / "workspace")
    job.do("ropeway", "run", "--no-prefect")
    # The workspace changes: a version is reproduced from git and DVC, not from the current files.
    job.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 3e-3")
    job.do("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-qam", "another rate")
    shutil.rmtree(job.run)
    shutil.rmtree(job.root / ".checkpoints")
    return job


@pytest.fixture
def published(_published, tmp_path):
    shutil.copytree(_published.root, tmp_path / "workspace", symlinks=True)
    return MainJob(tmp_path / "workspace")


def reproduce(job, *options, code=0):
    text = job.do("ropeway", "reproduce", "tiny@v1", "--json", *options, code=code)
    return json.loads(text[text.index("{\n") :])


def test_in_the_same_environment_the_weights_are_bit_identical_and_were_computed_again(published):
    done = reproduce(published)
    assert done["weights"] == "same"
    assert done["differences"] == []
    clone = MainJob(published.root / ".work" / "reproduce" / f"tiny-{done['digest'][:12]}")
    assert str(clone.root) == done["folder"]
    log = (clone.root / ".work" / "logs" / "train.log").read_text()
    assert f"step {STEPS}/{STEPS}" in log
    assert "Running stage 'train'" in log
    assert not (clone.root / ".work" / "logs" / "fetch.log").exists()  # the data came by digest
    assert not published.run.exists()  # the workspace itself was left alone


def test_another_rank_count_is_reported(published, tmp_path):
    published.environment["ROPEWAY_RANKS"] = "1"
    shutil.rmtree(published.root / ".dvc" / "cache")  # no data by digest either: it is fetched again
    done = reproduce(published, "--to", str(tmp_path / "again"), code=1)
    assert done["weights"] == "other"
    assert done["other_weights"] == ["model.safetensors"]
    assert done["differences"][0] == "ranks: published with 2, now 1"
    assert (tmp_path / "again" / ".work" / "logs" / "fetch.log").exists()
    assert any(
        line.startswith("stage train: equal inputs, different output runs/tiny/model") for line in done["differences"]
    )
