"""Shells complete profiles, stages and versions; a fault completes nothing and prints nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ropeway.cli import completion
from ropeway.config.load_params import load_profiles
from ropeway.config.stages import STAGES
from tests.support.shipped_params import read_shipped_params

ROOT = Path(__file__).parents[3]
COMPLETERS = [getattr(completion, name) for name in vars(completion) if name.startswith("complete_")]
COMPLETERS.remove(completion.complete_split_words)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A workspace with one version and one alias, as files alone."""
    monkeypatch.delenv("ROPEWAY_REGISTRY", raising=False)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "params.yaml").write_text(read_shipped_params(), encoding="utf-8")
    model = tmp_path / "registry" / "models" / "laptop"
    for name in ("versions/00000012.json", "aliases/candidate/00000001.json"):
        (model / name).parent.mkdir(parents=True)
        (model / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("root")
def test_names_are_those_of_the_files():
    assert completion.complete_profile("") == sorted(load_profiles(ROOT / "params.yaml")[1])
    assert completion.complete_stage("") == sorted(["identity", *(stage.name for stage in STAGES)])
    assert completion.complete_stage("report_") == ["report_data", "report_eval", "report_package"]
    assert completion.complete_model("") == ["laptop"]
    assert completion.complete_alias("l") == ["laptop@candidate"]
    assert completion.complete_version("laptop@") == ["laptop@candidate", "laptop@v12"]


@pytest.mark.parametrize("complete", COMPLETERS)
def test_a_fault_completes_nothing(root, monkeypatch, capfd, complete):
    for name in ("params.yaml", "dvc.yaml"):
        (root / name).write_bytes(b"\xff\xfe")
    monkeypatch.setenv("ROPEWAY_REGISTRY", "s3://bucket/not-asked")
    assert complete("") == []
    assert capfd.readouterr() == ("", "")


def test_bash_itself_completes_a_version_that_it_splits_at_the_at_sign(root):
    script = """
source <(ropeway --show-completion bash)
complete_at() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _ropeway_completion ropeway; echo "${COMPREPLY[*]}"; }
complete_at ropeway review laptop @ c
complete_at ropeway logs tr
"""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "--norc", "-c", script]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("candidate\ntrain\n", "")
