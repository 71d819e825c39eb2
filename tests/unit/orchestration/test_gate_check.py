"""A verdict of the gate that a writer of the registry changed: the review compares it with the versions' files."""

import hashlib

import pytest
from ruamel.yaml import YAML

from ropeway.orchestration.decision import open_review
from ropeway.registry import Registry
from ropeway.registry.layout import blob_key, versions_log
from ropeway.registry.signing_keys import make_keys
from ropeway.reporting.review_report import render_review, render_summary
from ropeway.runtime.workspace import Workspace
from tests.support.registry_world import change_event, own_fields
from tests.support.review_world import Profile, make_version
from tests.support.shipped_params import read_shipped_params

LOG = versions_log("laptop")


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.delenv("ROPEWAY_REGISTRY", raising=False)
    workspace = Workspace(tmp_path, "laptop")
    workspace.package.mkdir(parents=True)
    tree = YAML(typ="safe", pure=True).load(read_shipped_params("laptop"))
    tree["laptop"]["gate"] = Profile.gate.model_dump()
    with (workspace.package / "run.yaml").open("w") as file:
        YAML().dump(tree, file)
    return workspace


def forge(registry, number, **verdict):
    """State another verdict in an event, as a writer of the store can; its seal goes."""
    provenance = own_fields(registry.store, LOG.key(number))["provenance"]
    change_event(
        registry.store, LOG, number, provenance={**provenance, "verdict": {**provenance["verdict"], **verdict}}
    )


def warning(workspace, number):
    return open_review(Registry.open(workspace.registry_url), f"laptop@v{number}").gate_warning


def test_verdicts_as_they_were_recorded_need_no_warning(workspace):
    for loss in (5.0, 6.0, 4.0):
        make_version(workspace, loss, with_metrics=True)
    assert [warning(workspace, number) for number in (1, 2, 3)] == ["", "", ""]


@pytest.mark.parametrize(
    ("losses", "number", "stated"), [((5.0, 6.0), 2, True), ((5.0, 4.0), 2, False), ((9.0,), 1, True)]
)
def test_a_changed_verdict_is_a_warning_in_report_and_summary(workspace, losses, number, stated):
    for loss in losses:
        make_version(workspace, loss, with_metrics=True)
    registry = Registry.open(workspace.registry_url)
    forge(registry, number, passed=stated, checks=[], lines=["forged"])
    case = open_review(Registry.open(workspace.registry_url), f"laptop@v{number}")
    assert "does not follow" in case.gate_warning
    for text in (render_review(case), render_summary(case)):
        assert "does not follow" in text
        assert "may tell" in text  # not cut


@pytest.mark.parametrize("without", ["run.yaml", "eval.json", "rows"])
@pytest.mark.parametrize("policy", [True, False])
def test_what_cannot_be_computed_again_is_said_under_a_policy(workspace, tmp_path, monkeypatch, without, policy):
    if policy:
        make_keys(tmp_path / "key")
        monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(tmp_path))
        monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "key"))
    make_version(workspace, 5.0, with_metrics=True)
    if without == "run.yaml":
        (workspace.package / "run.yaml").unlink()
    if without == "eval.json":
        (workspace.package / "eval.json").unlink()
    make_version(workspace, 4.0, with_metrics=without != "eval.json", rows="others" if without == "rows" else "rows")
    assert ("no signature covers" in warning(workspace, 2)) is policy


def test_a_verdict_against_another_version_than_production_is_said(workspace):
    for loss in (5.0, 4.0, 3.0):
        make_version(workspace, loss, with_metrics=True)
    assert warning(workspace, 3) == ""
    Registry.open(workspace.registry_url).version("laptop@v1").promote(
        "production", expect=None, by="anna", reason="reviewed"
    )
    assert "compared this version with laptop@v2, not with laptop@v1" in warning(workspace, 3)
    assert [warning(workspace, number) for number in (1, 2)] == ["", ""]
    make_version(workspace, 2.0, with_metrics=True)
    assert warning(workspace, 4) == "", "since then the gate compares with production"


def test_limits_that_no_signature_covers_do_not_confirm_a_verdict(workspace, tmp_path, monkeypatch):
    make_keys(tmp_path / "key")
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(tmp_path))
    monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "key"))
    limits = (workspace.package / "run.yaml").read_bytes()
    make_version(workspace, 5.0, with_metrics=True)
    (workspace.package / "run.yaml").unlink()
    make_version(workspace, 4.0, with_metrics=True)
    registry = Registry.open(workspace.registry_url)
    sha256 = hashlib.sha256(limits).hexdigest()
    registry.store.put_if_absent(blob_key(sha256), limits)
    attached = own_fields(registry.store, LOG.key(2))["attachments"]
    more = {"run.yaml": {"sha256": sha256, "bytes": len(limits)}}
    change_event(registry.store, LOG, 2, attachments={**attached, **more})
    assert Registry.open(workspace.registry_url).version("laptop@v2").read_file("run.yaml", attached=True) == limits
    assert "no signature covers" in warning(workspace, 2)


def test_a_version_without_a_verdict_has_no_warning(workspace):
    make_version(workspace, 5.0, with_metrics=True)
    registry = Registry.open(workspace.registry_url)
    provenance = own_fields(registry.store, LOG.key(1))["provenance"]
    change_event(registry.store, LOG, 1, provenance={**provenance, "verdict": None})
    assert warning(workspace, 1) == ""


def test_a_verdict_that_names_no_champion_is_said_under_a_policy(workspace, tmp_path, monkeypatch):
    make_keys(tmp_path / "key")
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(tmp_path))
    monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "key"))
    for loss in (5.0, 6.0):
        make_version(workspace, loss, with_metrics=True)
    assert warning(workspace, 1) == warning(workspace, 2) == ""
    forge(Registry.open(workspace.registry_url), 2, passed=True, against=None, checks=[], lines=[])
    assert "laptop@v1 was candidate" in warning(workspace, 2)
