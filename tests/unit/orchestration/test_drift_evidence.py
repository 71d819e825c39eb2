"""Drift at publication: which versions are compared, what is recorded, and what a person is asked to look at."""

import json

import pytest

from ropeway.data.data_profile import FILE
from ropeway.orchestration.decision import ReviewAnswer, decide, describe_case
from ropeway.orchestration.display import RunDisplay
from ropeway.orchestration.drift_evidence import compare_with_earlier
from ropeway.orchestration.publish import Publication, publish_package
from ropeway.orchestration.run_summary import Result, draw_report, result_json
from ropeway.orchestration.sequence import PipelineRun
from ropeway.registry import ANY, Registry
from ropeway.registry.layout import blob_key
from ropeway.registry.signing_keys import make_keys
from ropeway.reporting.evidence import open_case
from ropeway.reporting.review_report import render_review, render_summary
from ropeway.runtime.manifest import write_json, write_manifest
from ropeway.runtime.workspace import Workspace
from tests.support.drift_world import COMMIT, ENGLISH, LIMITS, RUSSIAN, Profile, make_drifting
from tests.support.registry_world import count_requests, flip, make_pages


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.delenv("ROPEWAY_REGISTRY", raising=False)
    return Workspace(tmp_path, "laptop")


@pytest.fixture
def registry(workspace):
    return Registry.open(workspace.registry_url)


def recorded(registry, version):
    return registry.version(version).record["provenance"]


def test_the_first_version_is_compared_with_nothing_and_its_profile_is_part_of_it(workspace, registry):
    done = make_drifting(workspace, 1, ENGLISH)
    assert (done.state, done.drift.references, done.verdict.needs_person) == ("Published", (), ())
    assert FILE in {file.path for file in registry.version("laptop@v1").manifest.files}
    assert recorded(registry, "laptop@v1")["drift"]["note"] == "there is no earlier version"
    assert "data drift | not compared: there is no earlier version" in render_summary(open_case(registry, done.digest))


def test_a_publication_by_a_worker_reaches_the_calling_run_whole(workspace):
    for number, texts in enumerate((ENGLISH, RUSSIAN, RUSSIAN), 1):
        done = make_drifting(workspace, number, texts)
        assert Publication.from_json(json.loads(json.dumps(done.to_json()))) == done


@pytest.mark.parametrize("texts", [ENGLISH, RUSSIAN], ids=["same", "other"])
def test_a_run_reports_drift_above_a_limit_once_and_no_other(workspace, monkeypatch, texts):
    reported = []

    class Display(RunDisplay):
        def report_drift(self, version, digest, words):
            reported.append((version, digest, words))

    make_drifting(workspace, 1, ENGLISH)
    run = PipelineRun.__new__(PipelineRun)
    run.workspace, run.display, run._publication = workspace, Display(), make_drifting(workspace, 2, texts)
    monkeypatch.setattr(PipelineRun, "_result", lambda _run: Result(workspace, {}, run._publication, 1.0, None, ()))
    run.ask_review()
    expected = [("laptop@v2", run._publication.digest, "; ".join(run._publication.verdict.needs_person))]
    assert reported == (expected if texts is RUSSIAN else [])


def test_the_same_data_again_has_no_drift(workspace, registry):
    make_drifting(workspace, 1, ENGLISH)
    done = make_drifting(workspace, 2, ENGLISH)
    (reference,) = done.drift.references
    assert (reference.version, reference.why) == ("laptop@v1", ("the version before", "candidate"))
    assert {one.psi for one in reference.measures} == {None, 0.0}
    assert done.verdict.needs_person == ()
    assert recorded(registry, "laptop@v2")["drift"] == done.drift.to_json()


def test_other_data_asks_for_a_person_in_verdict_record_review_and_result(workspace, registry):
    make_drifting(workspace, 1, ENGLISH)
    done = make_drifting(workspace, 2, RUSSIAN)
    assert (done.state, done.verdict.passed) == ("Published", True)
    assert any(reason.startswith("data drift from laptop@v1") for reason in done.verdict.needs_person)
    assert "a person must look at its data" in done.words
    assert recorded(registry, "laptop@v2")["verdict"]["needs_person"] == list(done.verdict.needs_person)
    assert registry.artifact("laptop").alias("production").digest is None, "nobody has approved anything"
    case = open_case(registry, done.digest)
    report = render_review(case)
    assert "A person must look at this" in render_summary(case)
    assert "## Data drift, old → new" in report
    assert "cyrillic: 0.0% → " in report
    assert "Limits: PSI 0.25, JS 0.1 bits" in report
    assert describe_case(case)["drift"] == done.drift.to_json()
    result = Result(workspace, {}, done, 1.0)
    assert result_json(result, None)["gate"]["needs_person"] == list(done.verdict.needs_person)
    assert "cyrillic: 0.0% → " in draw_report(result)


def test_a_slow_shift_is_seen_against_the_oldest_version_of_the_window(workspace):
    for step in range(5):
        russian = 60 + step * 60
        done = make_drifting(workspace, step, ENGLISH[: 400 - russian] + RUSSIAN[:russian])
        before, oldest = done.drift.references[0:1], done.drift.references[1:]
        assert [one.flagged for one in before] == [()] * len(before)
    (last,) = oldest
    assert (last.version, last.why) == ("laptop@v1", ("oldest of the last 4",))
    assert "scripts of the text" in {one.name for one in last.flagged}


def test_production_is_compared_where_it_is_neither_the_version_before_nor_the_oldest(workspace, registry):
    digests = [make_drifting(workspace, step, ENGLISH).digest for step in range(3)]
    answer = ReviewAnswer("approve", "anna", "reads well", "terminal")
    decide(registry, open_case(registry, digests[1]), answer)
    done = make_drifting(workspace, 3, ENGLISH)
    assert [(one.version, one.why) for one in done.drift.references] == [
        ("laptop@v3", ("the version before",)),
        ("laptop@v2", ("production",)),
        ("laptop@v1", ("oldest of the last 3",)),
    ]


def test_a_review_compares_with_the_production_of_now_if_the_publication_did_not(workspace, registry):
    first, second = make_drifting(workspace, 1, RUSSIAN).digest, make_drifting(workspace, 2, ENGLISH).digest
    for step in range(3, 9):
        last = make_drifting(workspace, step, ENGLISH).digest
    answer = ReviewAnswer("approve", "anna", "reads well", "terminal")
    decide(registry, open_case(registry, second), answer)
    assert "production now" not in render_review(open_case(registry, second))
    decide(registry, open_case(registry, first), answer)
    report = render_review(open_case(registry, last))
    assert "laptop@v1 (production now)" in report
    assert "cyrillic: " in report


def test_a_review_does_not_believe_an_event_about_the_drift_from_production(workspace, registry):
    first, second = make_drifting(workspace, 1, ENGLISH).digest, make_drifting(workspace, 2, RUSSIAN).digest
    answer = ReviewAnswer("approve", "anna", "reads well", "terminal")
    decide(registry, open_case(registry, first), answer)
    case = open_case(registry, second)
    expected = render_review(case)
    (reference,) = case.new.facts["provenance"]["drift"]["references"]
    for measure in reference["measures"]:
        measure.update(exceeds=[], psi=0.0, js=0.0, largest=[])
    assert render_review(case) == expected
    assert "cyrillic: 0.0% → " in expected


def test_under_a_policy_the_data_of_a_version_that_nobody_trusted_signed_is_not_compared(
    workspace, registry, tmp_path, monkeypatch
):
    make_keys(tmp_path / "keys" / "key")
    monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "keys" / "key"))
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(tmp_path / "keys"))
    make_drifting(workspace, 1, ENGLISH)
    signed = make_drifting(workspace, 2, ENGLISH)
    with monkeypatch.context() as another:
        another.delenv("ROPEWAY_SIGNING_KEY")
        another.delenv("ROPEWAY_TRUSTED_KEYS")
        make_drifting(workspace, 3, RUSSIAN)
    registry.artifact("laptop").version(signed.digest).promote("candidate", expect=ANY, by="b", reason="again")
    done = make_drifting(workspace, 4, RUSSIAN)
    found = {one.version: one for one in done.drift.references}
    assert found["laptop@v3"].measures == ()
    assert "no signature of a trusted key" in found["laptop@v3"].note
    assert found["laptop@v2"].why == ("the version before", "candidate")
    assert [one.version for one in done.drift.references if one.flagged] == ["laptop@v2", "laptop@v1"]


@pytest.mark.parametrize("fault", ["absent", "damaged", "format"])
def test_an_earlier_version_without_a_usable_profile_is_noted_and_stops_nothing(workspace, registry, fault):
    make_drifting(workspace, 1, None if fault == "absent" else ENGLISH)
    version = registry.version("laptop@v1")
    if fault == "damaged":
        (file,) = (one for one in version.manifest.files if one.path == FILE)
        flip(registry.store, blob_key(file.sha256))
    if fault == "format":
        write_json(workspace.pages / FILE, {"format": 99})
        make_pages(workspace.package, workspace.pages, "# 1\n")
        write_json(workspace.package / "weights.json", {"loss": 0})
        write_manifest(workspace.package, {})
        make_pages(workspace.package, workspace.pages, "# 1\n")
        publish_package(workspace, Profile(), COMMIT, lambda *_: None)
    done = make_drifting(workspace, 2, ENGLISH[:390])  # other bytes: a damaged blob is not stored again
    assert done.state == "Published"
    assert done.drift.references[0].note
    assert done.drift.reasons == ()
    assert "not compared" in render_summary(open_case(registry, done.digest)) or fault == "format"


def test_a_new_version_without_a_profile_says_so(workspace, registry):
    make_drifting(workspace, 1, ENGLISH)
    done = make_drifting(workspace, 2, None)
    assert (done.state, done.drift.references) == ("Published", ())
    assert "no data profile" in done.drift.note
    assert "not compared" in render_review(open_case(registry, done.digest))


def test_without_limits_drift_is_recorded_and_asks_nobody(workspace):
    make_drifting(workspace, 1, ENGLISH, limits=None)
    done = make_drifting(workspace, 2, RUSSIAN, limits=None)
    assert done.verdict.needs_person == ()
    assert max(one.js or 0 for one in done.drift.references[0].measures) == 1.0


def test_versions_from_before_drift_was_recorded_are_reviewed(workspace, registry):
    done = make_drifting(workspace, 1, None)
    case = open_case(registry, done.digest)
    case.new.facts["provenance"].pop("drift")
    assert "not recorded" in render_review(case)


def test_the_requests_of_a_comparison_do_not_depend_on_the_number_of_versions(workspace, registry):
    counted = []
    for step in range(12):
        make_drifting(workspace, step, ENGLISH)
        if step in (5, 11):
            artifact = registry.artifact("laptop")
            with count_requests(registry.store) as requests:
                compare_with_earlier(artifact, workspace.pages / FILE, {}, LIMITS)
            counted.append(dict(requests))
    assert counted[0] == counted[1]
    assert json.dumps(counted)  # shown if it fails
