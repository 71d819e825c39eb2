"""`ropeway drift` and `ropeway history`: text and JSON over a registry of versions with stated data."""

import json

import pytest
from typer.testing import CliRunner

from ropeway.cli.main import app
from ropeway.runtime.errors import NotFoundError, RegistryError
from ropeway.runtime.workspace import Workspace
from tests.support.drift_world import ENGLISH, RUSSIAN, make_drifting


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.delenv("ROPEWAY_REGISTRY", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").touch()
    return Workspace(tmp_path, "laptop")


def ask(*arguments, width=160):
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(width)})
    if result.exception:
        raise result.exception
    return result.stdout


def ask_json(*arguments):
    return json.loads(ask(*arguments, "--json"))


def test_drift_of_a_version_with_itself_is_0_and_of_other_data_is_above_its_limits(workspace):
    for number, texts in enumerate((ENGLISH, RUSSIAN)):
        make_drifting(workspace, number, texts)
    same = ask_json("drift", "laptop@v1", "laptop@v1")
    assert same["above_limit"] == 0
    assert {one["psi"] for one in same["measures"]} == {None, 0.0}
    found = ask_json("drift", "laptop@v1", "laptop@candidate")
    assert (found["old"]["version"], found["new"]["version"]) == ("laptop@v1", "laptop@v2")
    assert found["above_limit"] == sum(bool(one["exceeds"]) for one in found["measures"]) > 0
    assert found["limits"]["window"] == 4
    lines = ask("drift", "laptop@v1", "laptop@v2").splitlines()
    assert lines[0] == "data of laptop@v1 → laptop@v2"
    assert "above 0.25" in lines[2], "what is above a limit comes first"


def test_drift_without_recorded_limits_says_so(workspace):
    for number in range(2):
        make_drifting(workspace, number, ENGLISH, limits=None)
    assert ask_json("drift", "laptop@v1", "laptop@v2")["limits"] is None
    assert "no limits" in ask("drift", "laptop@v1", "laptop@v2")


def test_drift_of_a_version_without_a_profile_is_an_error_of_one_sentence(workspace):
    make_drifting(workspace, 1, None)
    make_drifting(workspace, 2, ENGLISH)
    with pytest.raises(NotFoundError, match=r"laptop@v1 has no data_profile\.json"):
        ask("drift", "laptop@v1", "laptop@v2")
    with pytest.raises(RegistryError, match="no such version"):
        ask("drift", "laptop@v1", "laptop@v9")
