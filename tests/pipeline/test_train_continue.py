"""A run that resumes from another run's checkpoint: equal bytes if nothing changed, else the new params."""

import csv
import hashlib
import json
import re
import shutil

import pytest
import torch

from tests.support.main_job import STEPS

AT = 20  # a checkpoint of the tiny run
NULL = "resume_from: null"


@pytest.fixture
def again(main_jobs, tmp_path):
    """Return (a copy of a workspace with a finished training, the training's fingerprint)."""
    return main_jobs.finished.copy(tmp_path / "workspace"), re.search(r"training run ([0-9a-f]{16})", main_jobs.said)[1]


def sha256(job):
    return hashlib.sha256(job.weights()).hexdigest()


def lines(job):
    with (job.run / "steps.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_resuming_unchanged_params_gives_the_same_bytes_and_records_the_source(again, main_jobs):
    job, name = again
    job.edit("params.yaml", NULL, f'resume_from: "{name}@{AT}"')
    said = job.do("dvc", "repro", "train")
    assert f"from step {AT} of run {name}: nothing changed" in said
    assert f"resuming after step {AT} of {STEPS}" in said
    assert sha256(job) == sha256(main_jobs.finished)
    record = json.loads((job.run / "train.json").read_text())["continued_from"]
    assert (record["fingerprint"], record["step"], record["changed"]) == (name, AT, {})
    assert f"{name}@{AT}" in job.do("dvc", "params", "diff")
    job.do("dvc", "metrics", "show")
    assert "didn't change" in job.do("dvc", "repro", "train")


def test_changed_params_apply_from_the_checkpoint_and_no_row_is_read_twice(again, main_jobs):
    job, name = again
    before = lines(job)
    job.edit("params.yaml", NULL, f'resume_from: "{name}@{AT}"')
    job.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 1e-3\n  weight_decay: 0.25\n  max_grad_norm: 0.5")
    said = job.stage("train")
    assert (
        f"from step {AT} of run {name}: learning_rate 0.002 -> 0.001, max_grad_norm 2.0 -> 0.5, weight_decay "
        "0.0 -> 0.25" in said
    )
    after = lines(job)
    assert after[:AT] == before[:AT]
    assert [line["rows"] for line in after] == [line["rows"] for line in before]
    assert {float(line["learning_rate"]) for line in after[AT:]} == {0.001}
    assert sha256(job) != sha256(main_jobs.finished)
    fingerprint = json.loads((job.run / "train.json").read_text())["fingerprint"]
    shards = job.root / ".checkpoints" / fingerprint / f"step-{STEPS:06d}" / "state"
    shard = torch.load(next(shards.glob("*zero_pp_rank_0*optim_states.pt")), weights_only=False)
    saved = shard["optimizer_state_dict"]
    assert saved["clip_grad"] == 0.5
    (group,) = saved["base_optimizer_state"]["param_groups"]
    assert (group["weight_decay"], group["lr"], group["betas"]) == (0.25, 0.001, (0.9, 0.95))


def test_other_rows_are_refused_with_the_keys_named(again):
    job, name = again
    job.edit("params.yaml", NULL, f'resume_from: "{name}"')
    job.edit("params.yaml", "global_batch_size: 4", "global_batch_size: 8")
    job.edit("params.yaml", "gradient_accumulation_steps: 1", "gradient_accumulation_steps: 2")
    said = job.stage("train", code=64)
    assert f"cannot continue from run {name}, set resume_from to null" in said
    assert "global_batch_size: 4 in that run, 8 in this one" in said


@pytest.mark.parametrize("how", ["the line", pytest.param("the flag", marks=pytest.mark.slow)])
def test_one_more_epoch_is_trained_and_the_card_names_the_checkpoint(again, how):
    job, name = again
    job.edit("params.yaml", "num_train_epochs: 1", "num_train_epochs: 2")
    if how == "the flag":
        said = job.do("ropeway", "run", "--no-prefect", "--resume-from", name)
        assert f"params.yaml: set resume_from of profile tiny to {name}" in said
    else:
        job.edit("params.yaml", NULL, f'resume_from: "{name}"')
        shutil.rmtree(job.run / "package")
        said = "".join(map(job.stage, ("train", "evaluate", "report_eval", "package", "report_package")))
    assert f"from step {STEPS} of run {name}: num_train_epochs 1 -> 2" in said
    assert [int(line["epoch"]) for line in lines(job)] == [0] * STEPS + [1] * STEPS
    card = (job.run / "pages" / "README.md").read_text()
    assert f"continued from step {STEPS} of the run {name}" in card
    metrics = json.loads((job.run / "package" / "run.json").read_text())["metrics"]["train"]
    assert metrics["continued_from"]["step"] == STEPS
