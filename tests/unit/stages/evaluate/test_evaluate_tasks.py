"""Tasks where lm-evaluation-harness is not installed; tests/harness tests the rest."""

import importlib.metadata

import pytest

from ropeway.config.frozen import FrozenInputs
from ropeway.orchestration.stage_process import write_identity
from ropeway.runtime.errors import ConfigError
from ropeway.stages.evaluate import stage as evaluate
from ropeway.stages.evaluate.tasks import TaskScore, report_tasks
from tests.support.tiny_run import BLOCK, ROOT, make_run

NAMED = BLOCK.replace("tasks: []", "tasks: [python_basics]")


@pytest.fixture
def bare(monkeypatch):
    """Simulate an interpreter without the extra `eval`."""
    real = importlib.metadata.version

    def version(name):
        if name == "lm_eval":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def write_configs(root):
    for name in ("zero_config_pretrain.json", "zero2_cpu.json", "zero3_cpu.json"):
        (root / "configs" / name).write_text((ROOT / "configs" / name).read_text())


@pytest.mark.usefixtures("bare")
def test_a_task_without_the_harness_is_an_error_with_the_install_command(tmp_path, monkeypatch):
    workspace, profile = make_run(tmp_path, block=NAMED)
    monkeypatch.setattr(
        "ropeway.stages.evaluate.measuring.open_model", lambda *_, **__: pytest.fail("a model was opened")
    )
    with pytest.raises(ConfigError, match=r"tasks names python_basics, .*make setup EXTRAS=eval"):
        evaluate.run(workspace, profile)


@pytest.mark.usefixtures("bare")
def test_a_missing_harness_is_reported_before_training(tmp_path):
    make_run(tmp_path, block=NAMED)
    write_configs(tmp_path)
    with pytest.raises(ConfigError, match="make setup EXTRAS=eval"):
        write_identity(tmp_path)


@pytest.mark.usefixtures("bare")
def test_without_tasks_neither_the_harness_nor_the_task_folder_is_needed(tmp_path):
    workspace, _ = make_run(tmp_path)
    write_configs(tmp_path)
    workspace.tasks.mkdir()
    (workspace.tasks / "a.yaml").write_text("task: a\n")
    write_identity(tmp_path)
    assert FrozenInputs.load(tmp_path).value("tasks") == {}


def test_the_report_has_the_scores_of_base_and_tuned_model():
    base, tuned = (TaskScore("1.0", 2, 24, {"acc": value, "acc_stderr": 0.1}, ("perplexity",)) for value in (0.25, 0.5))
    assert report_tasks({"base": {"t": base}, "tuned": {"t": tuned}}) == {
        "t": {
            "version": "1.0",
            "shots": 2,
            "n": 24,
            "lower_is_better": ["perplexity"],
            "base": {"acc": 0.25, "acc_stderr": 0.1},
            "tuned": {"acc": 0.5, "acc_stderr": 0.1},
        }
    }
