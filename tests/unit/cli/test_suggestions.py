"""A mistyped name is refused with the nearest known one: profiles, keys, stages, models, aliases."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ropeway.cli.main import app
from ropeway.config.load_params import load_profiles
from ropeway.runtime.errors import ConfigError, NotFoundError, RegistryError
from ropeway.storage import open_store
from tests.support.registry_world import make_package, move, put
from tests.support.shipped_params import read_shipped_params

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A workspace with one version, which is a candidate; only read."""
    root = tmp_path_factory.mktemp("workspace")
    shutil.copy(ROOT / "dvc.yaml", root)
    (root / "params.yaml").write_text(read_shipped_params(), encoding="utf-8")
    store = open_store((root / "registry").as_uri())
    move(store, put(store, make_package(root / "package")).digest)
    return root


@pytest.mark.parametrize(
    ("command", "kind", "nearest"),
    [
        ("run --profile lapto", ConfigError, "laptop"),
        ("plan --profile smolm2", ConfigError, "smollm2"),
        ("params show lapto", ConfigError, "laptop"),
        ("params diff laptop lapto", ConfigError, "laptop"),
        ("params explain learning_rat", ConfigError, "learning_rate"),
        ("stage tran", ConfigError, "train"),
        ("registry show tiney@v1", RegistryError, "tiny"),
        ("registry show tiny@candidat", RegistryError, "candidate"),
        ("registry history tiny@candidat", NotFoundError, "candidate"),
        ("registry list tinny", NotFoundError, "tiny"),
    ],
)
def test_the_nearest_name_is_suggested(workspace, monkeypatch, command, kind, nearest):
    monkeypatch.delenv("ROPEWAY_REGISTRY", raising=False)
    monkeypatch.chdir(workspace)
    done = CliRunner().invoke(app, command.split())
    assert type(done.exception) is kind
    assert f"did you mean {nearest}?" in str(done.exception)


@pytest.mark.parametrize(
    ("old", "new", "nearest"),
    [
        ("profile: laptop", "profile: lapto", "laptop"),
        ("  learning_rate: 1e-5", "  learning_rat: 1e-5", "learning_rate"),
    ],
)
def test_a_mistyped_name_in_params_is_refused_with_the_nearest(workspace, tmp_path, old, new, nearest):
    text = (workspace / "params.yaml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "params.yaml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"did you mean {nearest}"):
        load_profiles(tmp_path / "params.yaml")
