"""A run goes on from another's checkpoint: the same bytes where nothing changed, the new params from there on if so."""

import csv
import hashlib
import json
import re

import pytest
import torch

from tests.support.main_job import STEPS, make_main_job

AT = 12  # a checkpoint of the tiny run
NULL = "resume_from: null"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return (workspace with a finished training, its fingerprint, the sha256 of its weights)."""
    job = make_main_job(tmp_path_factory.mktemp("continue") / "workspace")
    job.edit("params.yaml", "save_total_limit: 2", "save_total_limit: 4")
    said = job.do("dvc", "repro", "train")
    job.params = (job.root / "params.yaml").read_text()
    return job, re.search(r"training run ([0-9a-f]{16})", said)[1], sha256(job)


@pytest.fixture
def again(trained):
    """Give the workspace back with the params it was trained with."""
    job, name, _ = trained
    (job.root / "params.yaml").write_text(job.params)
    return job, name


def sha256(job):
    return hashlib.sha256(job.weights()).hexdigest()


def lines(job):
    with (job.run / "steps.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_nothing_changed_ends_with_the_same_bytes_and_says_where_it_came_from(again, trained):
    job, name = again
    job.edit("params.yaml", NULL, f'resume_from: "{name}@{AT}"')
    said = job.do("dvc", "repro", "train")
    assert f"going on from step {AT} of run {name}: nothing changed" in said
    assert f"resuming after step {AT} of {STEPS}" in said
    assert sha256(job) == trained[2]
    record = json.loads((job.run / "train.json").read_text())["continued_from"]
    assert (record["fingerprint"], record["step"], record["changed"]) == (name, AT, {})
    assert f"{name}@{AT}" in job.do("dvc", "params", "diff")
    job.do("dvc", "metrics", "show")
    assert "didn't change" in job.do("dvc", "repro", "train")


def test_what_changed_holds_from_there_on_and_no_row_is_read_twice(again, trained):
    job, name = again
    before = lines(job)
    job.edit("params.yaml", NULL, f'resume_from: "{name}@{AT}"')
    job.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 1e-3\n  weight_decay: 0.25\n  max_grad_norm: 0.5")
    said = job.do("dvc", "repro", "train")
    assert (
        f"going on from step {AT} of run {name}: learning_rate 0.002 -> 0.001, max_grad_norm 2.0 -> 0.5, weight_decay "
        "0.0 -> 0.25" in said
    )
    after = lines(job)
    assert after[:AT] == before[:AT]
    assert [line["rows"] for line in after] == [line["rows"] for line in before]
    assert {float(line["learning_rate"]) for line in after[AT:]} == {0.001}
    assert sha256(job) != trained[2]
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
    job.do("ropeway", "stage", "identity")
    said = job.do("ropeway", "stage", "train", code=64)
    assert f"run {name} cannot go on as this one, set resume_from to null" in said
    assert "global_batch_size: 4 there, 8 here" in said


def test_the_flag_writes_the_line_and_the_run_goes_on(again):
    job, name = again
    job.edit("params.yaml", "num_train_epochs: 1", "num_train_epochs: 2")
    said = job.do("ropeway", "run", "--no-prefect", "--resume-from", name)
    assert f"params.yaml: resume_from of tiny is {name} now, and stays so" in said
    assert f"going on from step {STEPS} of run {name}: num_train_epochs 1 -> 2" in said
    assert [int(line["epoch"]) for line in lines(job)] == [0] * STEPS + [1] * STEPS
    card = (job.run / "pages" / "README.md").read_text()
    assert f"continued from step {STEPS} of the run {name}" in card
    metrics = json.loads((job.run / "package" / "run.json").read_text())["metrics"]["train"]
    assert metrics["continued_from"]["step"] == STEPS
