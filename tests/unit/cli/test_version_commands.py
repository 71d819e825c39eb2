"""`ropeway drift` and `ropeway history`: text and JSON over a registry of versions with stated data."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ropeway.cli.main import app
from ropeway.data.data_profile import FILE
from ropeway.registry import Registry
from ropeway.runtime.errors import ConfigError, DataError, NotFoundError, RegistryError
from ropeway.runtime.workspace import Workspace
from tests.support.data_profiles import profile_texts
from tests.support.drift_world import ENGLISH, RUSSIAN, make_drifting
from tests.support.history_world import make_history
from tests.support.registry_world import count_requests, make_pages


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


def publish_profile(workspace, profile):
    """Publish a version with this data profile, as another program could."""
    make_drifting(workspace, 1, ENGLISH)
    (workspace.pages / FILE).write_text(json.dumps(profile), encoding="ascii")
    make_pages(workspace.package, workspace.pages, "# 2\n")
    artifact = Registry.open(workspace.registry_url).artifact("laptop")
    return artifact.publish(workspace.package, provenance={}, attachments={}, pages=workspace.pages)


def test_a_source_name_that_utf_8_cannot_encode_is_an_escape_in_json(workspace):
    publish_profile(workspace, profile_texts(ENGLISH, source="chats\ud800"))
    found = ask_json("drift", "laptop@v1", "laptop@v2")
    parts = {name for one in found["measures"] for name, *_ in one["largest"]}
    assert {"docs", "chats\ud800"} <= parts


@pytest.mark.parametrize(
    ("place", "expected"), [("all", 64), ("sources.docs", 48)], ids=["of all sources", "of one source"]
)
def test_a_stored_profile_with_a_list_of_another_length_is_refused_by_name(workspace, place, expected):
    profile = profile_texts(ENGLISH)
    part = profile["all"] if place == "all" else profile["sources"]["docs"]
    key = "systems" if place == "all" else "turns"
    part[key] = part[key][:5]
    publish_profile(workspace, profile)
    words = rf"laptop@v2: data_profile\.json: {place}\.{key}: expected {expected} values, found 5"
    with pytest.raises(DataError, match=words):
        ask("drift", "laptop@v1", "laptop@v2")


@pytest.fixture
def nightly(workspace):
    """Thirty synthetic versions, the last of which is worse."""
    make_history(workspace.root / "registry")
    return Registry.open(workspace.registry_url).artifact("nightly")


@pytest.mark.usefixtures("nightly")
def test_history_is_a_table_json_and_a_page_that_flag_the_same_versions(workspace):
    found = ask_json("history", "nightly")
    assert ask_json("history", "nightly", "--last", "1")["versions"] == found["versions"][-1:]
    flagged = {one["number"]: {bad["metric"] for bad in one["regressions"]} for one in found["versions"]}
    assert {number: bad for number, bad in flagged.items() if bad} == {
        12: {"loss", "accuracy"},
        27: {"tokens_per_second"},
        30: {"loss", "accuracy"},
    }
    text = ask("history", "nightly", width=400)
    (line,) = (line for line in text.splitlines() if line.startswith("nightly@v30 "))
    assert "REGRESSION: mean loss" in line
    assert "cost" not in text.splitlines()[0]
    ask("history", "nightly", "--html", "page.html")
    page = (workspace.root / "page.html").read_text(encoding="utf-8")
    assert page.count('<tbody class="bad">') == 3
    assert page.count("REGRESSION in") == 2
    assert "cost" not in page.partition("</thead>")[0]
    assert 'href="https://wandb.ai/team/runs/29"' in page
    with pytest.raises(ConfigError, match="cannot be written"):
        ask("history", "nightly", "--html", str(workspace.root))
    again = workspace.root / "again.html"
    ask("history", "nightly", "--html", str(again))
    assert again.read_bytes() == (workspace.root / "page.html").read_bytes()


@pytest.mark.usefixtures("nightly")
def test_history_shows_reviews_gate_and_drift_of_each_version():
    versions = {one["number"]: one for one in ask_json("history", "nightly")["versions"]}
    assert (versions[5]["decision"], versions[5]["reviewer"]) == ("approved", "ben")
    assert (versions[12]["decision"], versions[12]["gate"], versions[12]["failed"]) == (
        "rejected",
        "not passed",
        ["docs"],
    )
    assert versions[25]["aliases"] == ["production"]
    assert versions[22]["drifted"] == ["scripts of the text"]
    assert versions[22]["drift_before"] < versions[22]["drift_limit"] < versions[22]["drift_oldest"]
    assert versions[1]["drift_before"] is None


@pytest.mark.usefixtures("nightly")
def test_the_cost_is_that_of_the_price_in_the_environment(monkeypatch):
    monkeypatch.setenv("ROPEWAY_GPU_HOUR_PRICE", "2.5")
    last = ask_json("history", "nightly")["versions"][-1]
    assert last["gpu_hours"] == pytest.approx(8 * last["train_seconds"] / 3600)
    assert last["cost"] == pytest.approx(2.5 * last["gpu_hours"])
    assert "cost" in ask("history", "nightly", width=400).splitlines()[0]
    monkeypatch.setenv("ROPEWAY_GPU_HOUR_PRICE", "cheap")
    with pytest.raises(ConfigError, match="ROPEWAY_GPU_HOUR_PRICE"):
        ask("history", "nightly")


@pytest.mark.usefixtures("nightly")
def test_history_says_how_many_versions_are_not_shown():
    asked = CliRunner().invoke(app, ["history", "nightly", "--last", "7"])
    assert all(part in asked.stderr for part in ("23 earlier", "of 30", "--last 30"))
    assert CliRunner().invoke(app, ["history", "nightly", "--last", "30"]).stderr == ""


@pytest.mark.usefixtures("nightly")
def test_history_of_an_unknown_model_names_the_nearest_one():
    with pytest.raises(NotFoundError, match="nightly"):
        ask("history", "nightli")


def test_history_of_the_newest_versions_needs_no_more_requests_among_many(workspace):
    counted = []
    for count in (30, 90):
        artifact = make_history(workspace.root / f"of-{count}", count)
        with count_requests(artifact.store) as requests:
            total, recent = artifact.describe_recent(20)
        assert (total, [one["number"] for one in recent]) == (count, list(range(count - 19, count + 1)))
        counted.append(dict(requests))
    assert abs(sum(counted[0].values()) - sum(counted[1].values())) <= 1  # the review of v12 is among the newest of 30
    assert sum(counted[0].values()) < 45  # 20 versions, 3 reviews and 3 moves of production, 3 logs and their heads


def test_the_history_as_a_table_loads_no_drawing_library():
    code = (
        "import sys, ropeway.reporting.history_page; print([m for m in ('matplotlib', 'jinja2') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_versions_of_before_are_shown_with_what_they_have(workspace):
    make_drifting(workspace, 1, None)
    make_drifting(workspace, 2, ENGLISH)
    first, second = ask_json("history", "laptop")["versions"]
    assert (first["drift_before"], first["train_seconds"], first["cost"]) == (None, None, None)
    assert second["change"] == pytest.approx(-0.01)
    assert "laptop@v2" in ask("history", "laptop", width=400)
