"""A row that spoils the weights is left out, the run ends, and however it was interrupted it ends with the same bytes.

The poison is real: the base's embedding of one token is NaN, and one step's rows alone hold that token.
"""

import csv
import json
import re
from collections import Counter, defaultdict

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file

from ropeway.config.load_params import load_profile
from ropeway.data.batches import plan_epoch, validation_rows
from ropeway.data.shards import open_shards
from ropeway.runtime.manifest import write_manifest
from ropeway.runtime.workspace import Workspace
from tests.support.processes import kill_all

NEVER, ONCE = "rewinds: 0", "rewinds: 1"


@pytest.fixture(scope="module")
def prepared(main_jobs):
    return main_jobs.prepared


@pytest.fixture(
    scope="module", params=["packed", *(pytest.param(each, marks=pytest.mark.slow) for each in ("padded", "zero3"))]
)
def once(request, prepared, tmp_path_factory):
    """Return (workspace that went back once, the step at fault, a workspace before that training)."""
    job = prepared.copy(tmp_path_factory.mktemp(request.param) / "before")
    if request.param == "zero3":
        job.edit("params.yaml", "deepspeed_config: configs/zero2_cpu.json", "deepspeed_config: configs/zero3_cpu.json")
        job.stage("identity")
    else:
        job.edit("params.yaml", "max_length: 64", f"max_length: 64\n  layout: {request.param}")
    bad = poison(job.root)
    after = job.copy(job.root.with_name("after"))
    after.edit("params.yaml", NEVER, ONCE)
    after.said = after.stage("train")
    return after, bad, job


def poison(root):
    """Make one token's embedding NaN; return the only step whose rows hold it, some steps behind a checkpoint."""
    workspace, (_, profile) = Workspace(root, "tiny"), load_profile(root / "params.yaml")
    shards = open_shards(workspace.data, verify=False)
    plan = plan_epoch(shards, profile, epoch=0)
    steps = defaultdict(set)
    for position in range(plan.rows):
        for token in tokens(shards, plan.row(position)):
            steps[token].add(position // profile.global_batch_size + 1)
    lengths = [sum(piece.end - piece.begin for piece in plan.row(position)) for position in range(plan.rows)]
    tried = [plan.row(int(position)) for position in np.argsort(lengths)[-4:]]
    tried += [row for _, rows in validation_rows(shards, profile) for row in rows]
    tried += [plan.row(position) for position in range(profile.global_batch_size)]
    kept = {token for row in tried for token in tokens(shards, row)}
    lone = [(min(at), token) for token, at in steps.items() if len(at) == 1 and token not in kept]
    bad, token = next((step, token) for step, token in sorted(lone) if step > 4 and step % 4 in (2, 3))
    path = workspace.base / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][token] = float("nan")
    path.unlink()  # DVC made it read-only
    save_file(weights, path, metadata={"format": "pt"})
    facts = json.loads((workspace.base / "manifest.json").read_bytes())
    facts.pop("files")
    write_manifest(workspace.base, facts)
    return bad


def tokens(shards, row):
    return {int(n) for p in row for n in shards.sources[p.source].read(p.sequence)[0][p.begin : p.end]}


def lines(job):
    with (job.run / "steps.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_poisoned_step_is_skipped_and_recorded_and_all_other_rows_are_trained(once):
    job, bad, _ = once
    good = (bad - 1) // 4 * 4
    assert f"step {bad}: the loss is nan" in job.said
    assert f"rewind 1 of 1: resuming after step {good}; the 4 rows of steps {bad} to {bad} are left out (" in job.said
    assert re.search(rf"step {bad}/\d+  not trained: 4 rows left out", job.said)
    log = lines(job)
    assert [int(line["step"]) for line in log] == list(range(1, len(log) + 1))
    assert {line["step"]: line["left_out"] for line in log if line["left_out"]} == {str(bad): "4"}
    assert (log[bad - 1]["loss"], log[bad - 1]["applied"]) == ("", "0")
    assert Counter(line["applied"] for line in log) == {"1": len(log) - 1, "0": 1}
    assert (log[-1]["applied_steps"], log[-1]["skipped_steps"]) == (str(len(log) - 1), "0")
    metrics = json.loads((job.run / "train.json").read_text())
    assert (metrics["rewinds"], metrics["rows_left_out"], metrics["steps"]) == (1, 4, len(log))
    provenance = json.loads((job.run / "provenance.json").read_text())
    (record,) = provenance["rewinds"]
    assert (record["first_step"], record["last_step"], record["checkpoint_step"]) == (bad, bad, good)
    assert sum(map(len, record["sequences"].values())) >= 4
    assert provenance["attempts"][-1]["rewinds"] == 1


@pytest.mark.parametrize("once", ["packed", pytest.param("zero3", marks=pytest.mark.slow)], indirect=True)
def test_killed_right_after_a_rewind_it_skips_the_same_rows(once, tmp_path):
    whole, _, before = once
    job = before.copy(tmp_path / "killed")
    job.edit("params.yaml", NEVER, ONCE)
    process = job.start("ropeway", "stage", "train")
    for line in process.stdout:
        if "rewind 1 of 1" in line:
            break
    kill_all(psutil.Process(process.pid).children(recursive=True))
    process.stdout.read()
    process.stdout.close()
    assert process.wait(300) != 0
    said = job.stage("train")
    assert "rewind 1 of 1" not in said
    assert same(job, whole)


@pytest.mark.parametrize("once", ["padded"], indirect=True)
@pytest.mark.slow
def test_without_rewinds_left_it_stops_and_resumes_once_params_allow_more(once, tmp_path):
    whole, bad, before = once
    job = before.copy(tmp_path / "stopped")
    said = job.stage("train", code=1)
    assert f"step {bad}: the loss is nan" in said
    assert f"The last good checkpoint is step {(bad - 1) // 4 * 4}: " in said
    assert not list(job.root.glob(".checkpoints/*/rewinds.json"))
    job.edit("params.yaml", NEVER, ONCE)
    job.edit("params.yaml", "save_steps: 4", "save_steps: 1")  # where it goes back to changes nothing
    job.stage("train")
    assert same(job, whole)
    job.edit("params.yaml", ONCE, NEVER)
    assert "this run has 1 rewinds, stop.rewinds allows 0" in job.stage("train", code=64)


@pytest.mark.parametrize("once", ["padded"], indirect=True)
@pytest.mark.slow
def test_another_rank_count_rewinds_at_the_next_start(once, tmp_path):
    whole, bad, before = once
    job = before.copy(tmp_path / "other")
    job.environment["ROPEWAY_RANKS"] = "1"
    job.stage("train", code=1)
    job.environment["ROPEWAY_RANKS"] = "2"
    job.edit("params.yaml", NEVER, ONCE)
    said = job.stage("train", code=75)
    assert said.count("rewinds.json: rewind recorded") == 1
    assert f"resuming after step {(bad - 1) // 4 * 4} of" in job.stage("train")
    assert [(line["rows"], line["left_out"]) for line in lines(job)] == [
        (line["rows"], line["left_out"]) for line in lines(whole)
    ]


def test_a_divergence_rewinds_before_its_first_spike_and_ends_if_it_returns(prepared, tmp_path):
    job = prepared.copy(tmp_path / "diverging")
    job.edit("params.yaml", NEVER, ONCE)
    job.edit("params.yaml", "learning_rate: 2e-3", "learning_rate: 1.0")
    job.edit("params.yaml", "spike_window_steps: 8, spike_ratio: 2.0", "spike_window_steps: 3, spike_ratio: 1.2")
    job.edit("params.yaml", "save_steps: 4", "save_steps: 1")
    said = job.stage("train", code=1)
    first, last = map(int, re.search(r"steps (\d+) to (\d+): 3 losses in a row", said).groups())
    assert (last - first, f"after step {first - 1}; the 12 rows of steps {first} to {last}" in said) == (2, True)
    assert "Rewinds used: 1, allowed by stop.rewinds: 1; one more would leave out" in said


def same(job, whole):
    assert (job.run / "steps.csv").read_bytes() == (whole.run / "steps.csv").read_bytes()
    assert (job.run / "train.json").read_bytes() == (whole.run / "train.json").read_bytes()
    return job.weights() == whole.weights()
