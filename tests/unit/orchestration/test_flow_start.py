"""What a run refuses before Prefect's server starts."""

import shutil
from pathlib import Path

import pytest

from ropeway.orchestration import prefect_server
from ropeway.orchestration.sequence import run_retrain
from ropeway.runtime.errors import ConfigError
from tests.support.shipped_params import read_shipped_params

ROOT = Path(__file__).parents[3]


def test_a_missing_base_is_refused_before_a_server_starts(tmp_path, monkeypatch):
    def fail(_root):
        raise AssertionError("a server was started")

    monkeypatch.setattr(prefect_server, "open_server", fail)
    (tmp_path / "params.yaml").write_text(read_shipped_params(), encoding="utf-8")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    before = (tmp_path / "params.yaml").read_bytes()
    with pytest.raises(ConfigError, match="model_name /mnt/data/llama2/Llama-2-13b-hf/ is not a folder"):
        run_retrain(tmp_path, "llama2_13b_orca_8k")
    assert (tmp_path / "params.yaml").read_bytes() == before
