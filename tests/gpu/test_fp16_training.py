"""On a GPU: fp16 training with flash attention records its loss scale."""

import csv
import json

import pytest

from tests.support.main_job import STEPS, make_main_job

pytestmark = pytest.mark.gpu


def test_fp16_trains_with_flash_kernels_and_records_its_loss_scale(tmp_path):
    job = make_main_job(tmp_path / "workspace")
    job.environment["ROPEWAY_RANKS"] = "1"
    job.edit("params.yaml", "dtype: fp32\n  learning_rate", "dtype: fp16\n  learning_rate")
    job.edit("params.yaml", "use_flash_attention: false", "use_flash_attention: true")
    job.do("dvc", "repro", "train")
    with (job.run / "steps.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    applied = [line for line in log if line["applied"] == "1"]
    assert len(log) == STEPS
    assert len(applied) > STEPS // 2
    assert all(float(line["loss_scale"]) >= 1 for line in log)
    assert float(applied[-1]["loss"]) < float(applied[0]["loss"])
    (attempt,) = json.loads((job.run / "provenance.json").read_text())["attempts"]
    assert "flash" in attempt["attention"]
    assert attempt["asked_flash_attention"]
