"""On a GPU: what `make bench-gpu` measures is also right. On a CPU: the bench resumes, and names what failed."""

import json

import pytest

from benchmarks import gpu
from benchmarks.gpu import PARTS, describe, load_results, run_part, write


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench-gpu")

    def run(name):
        result = run_part(name, folder, is_dry=False, seconds=600)
        assert "failed" not in result, result
        return result

    return run


@pytest.mark.gpu
def test_flash_kernels_are_right_forward_and_backward_with_grouped_heads_and_deterministic(part):
    rows = [row for row in part("kernels")["kernels"] if not row["kernel"].startswith("SDPA")]
    assert rows
    assert not [row for row in rows if row.get("fault")]
    assert all(row["same_bytes_twice_deterministic"] for row in rows)


@pytest.mark.gpu
def test_the_engine_keeps_rope_in_fp32_and_uses_torchs_fused_adamw(part):
    found = part("engine")
    assert found["rope_dtype"] == "torch.float32"
    assert (found["optimizer"], found["fused"]) == ("torch.optim.adamw.AdamW", True)
    assert found["applied"][-1] == 1


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_a_killed_training_resumes_to_the_same_weights_padded_and_packed(part):
    rows = part("training")["trainings"]
    assert [row["layout"] for row in rows] == ["padded", "packed"]
    assert all(row["killed_and_resumed_equal"] and row["last_loss"] < row["first_loss"] for row in rows)


@pytest.mark.gpu
def test_packed_rows_are_isolated_at_the_depth_of_the_published_model(part):
    for row in part("isolation")["isolation"]:
        assert row["layers"] == 40
        assert row["packed"] <= row["allowed"]


def test_the_same_command_continues_with_the_parts_that_failed_or_had_no_time(tmp_path):
    results = {
        "versions": {"part": "versions", "python": "3.11", "seconds": 1.0},
        "kernels": {"part": "kernels", "failed": "ended with exit code 1", "last_lines": ["x"], "seconds": 2.0},
        "shard": {"part": "shard", "skipped": "3 s left"},
    }
    write(tmp_path, results, is_dry=False)
    assert list(load_results(tmp_path)) == ["versions"]
    page = describe(results, is_dry=False)
    assert "ended with exit code 1" in page
    assert "Not run: 3 s left" in page


def test_a_part_that_fails_or_exceeds_its_limit_is_a_result_with_its_last_lines(tmp_path, monkeypatch):
    monkeypatch.setitem(PARTS, "absent", 60)
    failed = run_part("absent", tmp_path, is_dry=True, seconds=60)
    assert "KeyError: 'absent'" in failed["last_lines"][-1]
    late = run_part("versions", tmp_path, is_dry=True, seconds=0.01)
    assert late["failed"] == "ended after its limit of 0 s"


def test_a_dry_part_writes_its_result_and_says_that_its_figures_mean_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu", "--dry", "--only", "shard", "--folder", str(tmp_path)])
    assert gpu.main() == 0
    assert json.loads(capsys.readouterr().out)["missing"] == []
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"]["shard"]["gigabytes"] == 0.004
    assert "mean nothing" in (tmp_path / "gpu.md").read_text()
