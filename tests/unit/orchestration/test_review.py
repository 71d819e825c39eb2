"""The report and the decision, without Prefect: what a reviewer sees, and what a yes and a no do."""

import base64
import json
import re
import xml.etree.ElementTree as ET

import pytest
from typer.testing import CliRunner

from ropeway.cli.main import app
from ropeway.orchestration.decision import ReviewAnswer, decide, read_answer
from ropeway.orchestration.reproduce import check_revision
from ropeway.registry import Registry
from ropeway.registry.aliases import name_author
from ropeway.registry.layout import versions_log
from ropeway.registry.signing import load_signer
from ropeway.registry.signing_keys import make_keys
from ropeway.reporting.evidence import open_case
from ropeway.reporting.review_report import render_review, render_summary
from ropeway.runtime.errors import ConfigError, DataError, RegistryError
from ropeway.runtime.manifest import write_json, write_manifest
from ropeway.runtime.workspace import Workspace
from tests.support.registry_world import change_event, own_fields
from tests.support.review_world import COMMIT, DIRTY, make_version

YES = ReviewAnswer("approve", "anna", "reads well", "terminal")


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.delenv("ROPEWAY_REGISTRY", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").touch()
    return Workspace(tmp_path, "laptop")


@pytest.fixture
def registry(workspace):
    return Registry.open(workspace.registry_url)


def production(registry):
    return registry.artifact("laptop").alias("production").digest


def test_a_review_that_approves_moves_production_and_keeps_who_and_why(workspace, registry):
    digest = make_version(workspace, 5.0)
    outcome = decide(registry, open_case(registry, digest), YES)
    assert (outcome.state, production(registry)) == ("Promoted", digest)
    (event,) = registry.artifact("laptop").alias("production").events
    assert (event["by"], event["reason"], event["prev"]) == ("anna", "reads well", None)
    assert event["review"]["decision"] == "approve"
    assert event["review"]["production"] is None
    assert decide(registry, open_case(registry, digest, expect=None), YES).words.endswith("(unchanged)")
    assert len(registry.artifact("laptop").alias("production").events) == 1
    assert len(registry.artifact("laptop").version(digest).reviews) == 1


def test_an_answer_on_what_is_production_already_moves_nothing_and_says_so(workspace, registry):
    digest = make_version(workspace, 5.0)
    decide(registry, open_case(registry, digest), YES)
    late = ReviewAnswer("approve", "ben", "me too", "another terminal")
    assert decide(registry, open_case(registry, digest, expect=None), late).state == "Promoted"
    outcome = decide(registry, open_case(registry, digest), ReviewAnswer("reject", "ben", "no", "a third"))
    assert outcome.state == "Rejected"
    assert "registry rollback laptop@production" in outcome.words
    assert len(registry.artifact("laptop").alias("production").events) == 1


def test_a_name_in_a_form_is_claimed_and_an_authenticated_one_is_recorded_as_such(workspace, registry):
    form = decide(registry, open_case(registry, make_version(workspace, 5.0)), YES)
    shell = ReviewAnswer("approve", "anna", "better", "a terminal", "authenticated")
    assert form.state == decide(registry, open_case(registry, make_version(workspace, 4.0)), shell).state == "Promoted"
    events = registry.artifact("laptop").alias("production").events
    assert [event["identity"] for event in events] == ["claimed", "authenticated"]
    assert [event["review"]["identity"] for event in events] == ["claimed", "authenticated"]
    assert [name_author(event) for event in events] == ["anna (claimed)", "anna"]
    assert "| anna (claimed) |" in render_review(open_case(registry, "laptop@v1"))


def test_a_reviewer_in_a_terminal_is_authenticated_as_the_account_alone(monkeypatch):
    monkeypatch.setattr("ropeway.orchestration.decision.identity_of", {"anna": "authenticated"}.get)
    found = [read_answer(approve=True, reject=False, reviewer=name, comment="x") for name in (" anna ", "ben")]
    assert [answer.identity for answer in found] == ["authenticated", None]


def test_a_review_that_rejects_moves_nothing_and_is_kept_and_shown_to_the_next_reviewer(workspace, registry):
    digest = make_version(workspace, 5.0)
    outcome = decide(registry, open_case(registry, digest), ReviewAnswer("reject", "ben", "it swears", "terminal"))
    assert (outcome.state, production(registry)) == ("Rejected", None)
    assert "| reject | ben (claimed) | it swears |" in render_review(open_case(registry, digest))


def test_a_review_moves_nothing_when_production_moved_after_the_report(workspace, registry):
    first, second, third = (make_version(workspace, loss) for loss in (5.0, 4.5, 4.0))
    decide(registry, open_case(registry, first), YES)
    case = open_case(registry, third)
    decide(registry, open_case(registry, second), YES)
    with pytest.raises(RegistryError, match=rf"laptop@v3 was approved by anna but is NOT production: .*{second}"):
        decide(registry, case, YES)
    assert production(registry) == second
    assert [kept["decision"] for kept in registry.artifact("laptop").version(third).reviews] == ["approve"]


@pytest.mark.parametrize("answer", [ReviewAnswer("approve", " ", "why", "x"), ReviewAnswer("approve", "anna", "", "x")])
def test_an_empty_answer_to_a_review_is_none(workspace, registry, answer):
    digest = make_version(workspace, 5.0)
    with pytest.raises(ConfigError, match="expected 1 to"):
        decide(registry, open_case(registry, digest), answer)
    assert production(registry) is None
    assert registry.artifact("laptop").version(digest).reviews == []


def test_what_a_dirty_tree_made_never_becomes_production_by_any_way(workspace, registry):
    digest = make_version(workspace, 5.0, revision=DIRTY)
    case = open_case(registry, digest)
    assert "An approval will be refused" in render_summary(case)
    with pytest.raises(RegistryError, match=r"uncommitted changes \(src/ropeway/models/rope.py\)"):
        decide(registry, case, YES)
    with pytest.raises(RegistryError, match="uncommitted changes"):
        registry.artifact("laptop").version(digest).promote("production", expect=None, by="anna", reason="I insist")
    assert production(registry) is None


def test_once_a_commit_makes_the_same_bytes_it_may(workspace, registry):
    digest = make_version(workspace, 5.0, revision=DIRTY)
    assert make_version(workspace, 5.0, revision=COMMIT) == digest
    case = open_case(registry, digest)
    assert decide(registry, case, YES).state == "Promoted"
    # Who looks at it later finds the commit that makes it, and not the dirty tree it was first made with.
    assert case.new.facts["clean_commit"] == COMMIT.commit
    assert f"{COMMIT.commit}, clean" in render_review(case)
    assert (
        check_revision({"dirty": True}, registry.version(f"laptop@{digest}").clean_commit, "laptop@v1") == COMMIT.commit
    )


def test_every_answer_from_a_terminal_is_kept_also_with_equal_words(workspace, registry):
    digest = make_version(workspace, 5.0)
    for _ in range(2):
        decide(
            registry,
            open_case(registry, digest),
            read_answer(approve=False, reject=True, reviewer="anna", comment="no"),
        )
    assert len(registry.artifact("laptop").version(digest).reviews) == 2


def test_the_report_of_a_review_has_all_that_a_decision_needs(workspace, registry):
    first = make_version(workspace, 5.0)
    decide(registry, open_case(registry, first), YES)
    second = make_version(workspace, 4.5, rate=0.003, records=9)
    case = open_case(registry, f"laptop@{second[:10]}")
    report = render_review(case)
    assert "# Promote laptop@v2 to production?" in report
    assert "| docs | loss, nats/token | 8.000 | 5.000 | **4.500** | -0.500 (better) |" in report
    assert "| docs | accuracy | 0.100 | 0.200 | **0.222** | +0.022 (better) |" in report
    assert "| docs | 4.500 | 5.000 (laptop@v1) | -0.500 nats/token | +0.010 | passed |" in report
    assert "| `learning_rate` | 0.002 | 0.003 |" in report
    assert re.search(r"\| `ledger\.sources\.0\.records\.read` \| 8 \| 9 \|", report)
    assert "| docs | epoch 0: supervised | = |  | 30 |" in report
    assert "Resumed: 2 starts." in report
    assert f"ropeway registry pull laptop@{second} --registry {registry.url}" in report
    assert "f" * 64 in report
    prompt = r"What is a list? \| &lt;b&gt;bold&lt;/b&gt;"
    assert rf"| {prompt} | An answer at 5.0. ⏎  ⏎ \| with a table \| | An answer at 4.5." in report


def test_a_review_shows_failed_comparisons_first(workspace, registry):
    decide(registry, open_case(registry, make_version(workspace, 5.0)), YES)
    lost = open_case(registry, make_version(workspace, 5.5))
    report = render_review(lost)
    (table,) = re.findall(r"\| check .*?\n\n", report, re.DOTALL)
    rows = table.strip().splitlines()[2:]
    assert rows == [
        "| docs | 5.500 | 5.000 (laptop@v1) | +0.500 nats/token | +0.010 | **not passed** |",
        "| mean loss over sources | 5.500 | 8.000 (the base) | -2.500 nats/token | -1.000 | passed |",
    ]
    assert "- passed: no champion to compare with" in render_review(open_case(registry, "laptop@v1"))


def test_a_review_of_a_version_without_a_table_of_comparisons_shows_its_sentences(workspace, registry):
    case = open_case(registry, make_version(workspace, 5.0))
    del case.new.facts["provenance"]["verdict"]["checks"]
    report = render_review(case)
    assert "- mean loss over sources: base 8.000, tuned 5.000: gain +3.000 nats/token, required 1.000" in report


def test_the_curves_of_a_review_are_a_picture_inside_the_page(workspace, registry):
    decide(registry, open_case(registry, make_version(workspace, 5.0)), YES)
    report = render_review(open_case(registry, make_version(workspace, 4.5)))
    uri = re.search(r"!\[Loss[^]]+\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)", report)[1]
    picture = ET.fromstring(base64.b64decode(uri))  # noqa: S314 - ours
    assert picture.tag.endswith("svg")
    assert len(uri) < 100_000
    rows = [line.split(" | ")[0] for line in report.partition("curve (nats/token)")[2].split("\n\n")[0].splitlines()]
    assert {"| v2, training", "| v2, validation docs", "| production, v1, training"} <= set(rows)
    assert report == render_review(open_case(registry, "laptop@v2"))


def test_a_review_says_that_losses_on_other_rows_say_little(workspace, registry):
    decide(registry, open_case(registry, make_version(workspace, 5.0)), YES)
    assert "different validation rows" in render_summary(
        open_case(registry, make_version(workspace, 4.5, rows="others"))
    )


def scores(tuned, *, questions=24):
    figures = {"acc,none": 0.25, "acc_stderr,none": 0.05}
    task = {"base": figures, "tuned": figures | {"acc,none": tuned}, "version": "1", "shots": 0, "n": questions}
    return {"metrics": {"tasks": {"python_basics": task}, "harness": "lm-evaluation-harness 0.4.13"}}


def test_the_harness_scores_stand_beside_productions_if_the_questions_were_the_same(workspace, registry):
    old = make_version(workspace, 5.0, also=scores(0.375))
    decide(registry, open_case(registry, old), YES)
    text = render_review(open_case(registry, make_version(workspace, 4.0, also=scores(0.5))))
    assert "| task | metric | base | production (laptop@v1) | **laptop@v2** |" in text
    assert "| python\\_basics | acc,none | 0.25 ± 0.05 | 0.375 ± 0.05 | **0.5 ± 0.05** |" in text
    text = render_review(open_case(registry, make_version(workspace, 3.0, also=scores(0.5, questions=100))))
    assert "| 0.25 ± 0.05 | not evaluated | **0.5 ± 0.05** |" in text
    assert "lm-evaluation-harness" not in render_review(open_case(registry, make_version(workspace, 2.0)))


def test_a_review_says_which_run_the_training_went_on_from(workspace, registry):
    record = {"fingerprint": "0a" * 8, "step": 20, "changed": {"learning_rate": "0.002 -> 0.001"}}
    digest = make_version(workspace, 5.0, also={"history": {"continued_from": record}})
    text = render_review(open_case(registry, digest))
    assert f"Training continued from step 20 of run {'0a' * 8}; changed since then: learning\\_rate 0.002 -" in text


def test_a_withdrawn_version_is_not_reviewed(workspace, registry):
    make_version(workspace, 5.0)
    digest = make_version(workspace, 6.0)
    registry.artifact("laptop").version(digest).withdraw(by="anna", reason="leaks")
    with pytest.raises(RegistryError, match="withdrawn"):
        open_case(registry, digest)


def test_review_in_the_terminal_shows_then_decides(workspace, registry):
    digest = make_version(workspace, 5.0)

    def ask(*arguments):
        done = CliRunner().invoke(app, ["review", *arguments], env={"COLUMNS": "200"})
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.stdout

    facts = json.loads(ask(digest[:12], "--json"))
    assert (facts["version"], facts["digest"], facts["production"]) == ("laptop@v1", digest, None)
    assert facts["metrics"]["mean"] == {"base": 8.0, "tuned": 5.0}
    assert "--approve --reviewer NAME --comment WHY --expect none" in facts["commands"]["approve"]
    shown = ask(digest[:12])
    assert f"ropeway review {digest[:12]} --approve --reviewer NAME --comment WHY --expect none" in shown
    assert "base64" not in shown
    assert digest[:13] not in shown
    assert "production" not in re.search("^Metrics.*$", shown, re.MULTILINE)[0]
    assert production(registry) is None
    assert "laptop@v1 was rejected" in ask(digest[:12], "--reject", "--reviewer", "ben", "--comment", "no")
    words = ask(digest, "--approve", "--reviewer", "anna", "--comment", "yes", "--expect", "none")
    assert "laptop@v1 is laptop@production" in words
    again = json.loads(ask(digest, "--approve", "--reviewer", "anna", "--comment", "yes", "--json"))
    assert (again["state"], again["digest"]) == ("Promoted", digest)
    assert production(registry) == digest
    with pytest.raises(RegistryError, match="NOT production"):
        ask(make_version(workspace, 4.0), "--approve", "--reviewer", "anna", "--comment", "yes", "--expect", "none")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_of_a_review_is_longer_than_the_terminal(workspace, registry, width):
    decide(registry, open_case(registry, make_version(workspace, 5.0)), YES)
    digest = make_version(workspace, 4.5, rate=0.0031234567890123)
    shown = CliRunner().invoke(app, ["review", digest], env={"COLUMNS": str(width)}).stdout
    assert max(len(line) for line in shown.splitlines() if registry.url not in line) <= width
    assert "ledger.sources.0" in shown or "learning_rate" in shown
    assert digest[:12] in shown
    assert digest[:13] not in shown
    assert not re.search(r"\d\.\d{9}", shown.replace("0.0031234567890123", ""))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"approve": True, "reject": True, "reviewer": "a", "comment": "b"}, "choose one"),
        ({"approve": True, "reject": False, "reviewer": "a", "comment": " "}, "--reviewer NAME"),
        ({"approve": False, "reject": False, "reviewer": "a", "comment": None}, "go with"),
    ],
)
def test_half_an_answer_to_a_review_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        read_answer(**given)


def test_digits_that_mean_no_version_or_several_are_refused(workspace, registry):
    make_version(workspace, 5.0)
    with pytest.raises(RegistryError, match="no such version"):
        open_case(registry, "0" * 12)
    with pytest.raises(RegistryError, match="8 digits or more"):
        open_case(registry, "12")


def test_metrics_of_a_changed_event_are_neither_shown_nor_used_by_the_gate(workspace, registry):
    digest = make_version(workspace, 5.0, with_metrics=True)
    decide(registry, open_case(registry, digest), YES)
    signed = open_case(registry, digest).new.metrics
    log = versions_log("laptop")
    provenance = own_fields(registry.store, log.key(1))["provenance"]
    better = {**provenance["evaluation"], "mean": {"base": 8.0, "tuned": 0.01}}
    change_event(registry.store, log, 1, provenance={**provenance, "evaluation": better})
    with pytest.raises(DataError, match=r"other metrics than its eval\.json"):
        open_case(registry, digest)
    assert registry.version("laptop@v1").metrics == signed
    # The champion's loss is 5.0, not 0.01: the next version is better.
    make_version(workspace, 4.0, with_metrics=True)
    assert registry.version("laptop@v2").record["provenance"]["opponent"] == signed
    with pytest.raises(DataError, match=r"laptop@v1 records other metrics"):
        open_case(registry, "laptop@v2")


def test_an_eval_json_that_is_no_mapping_is_named(workspace, registry):
    make_version(workspace, 5.0)
    write_json(workspace.package / "eval.json", [5.0])
    write_manifest(workspace.package, {"digests": {}})
    registry.artifact("laptop").publish(workspace.package, provenance={}, attachments={})
    with pytest.raises(DataError, match=r"eval\.json of laptop@v2"):
        open_case(registry, "laptop@v2")


def test_a_review_says_who_signed(workspace, registry, tmp_path, monkeypatch):
    keyid = make_keys(tmp_path / "key")
    assert "| signed by | no key |" in render_summary(open_case(registry, make_version(workspace, 5.0)))
    monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "key"))
    digest = make_version(workspace, 4.0)
    assert f"| signed by | `{keyid}` (not checked" in render_summary(open_case(registry, digest))
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(tmp_path))
    assert f"| signed by | `{keyid}` (trusted) |" in render_summary(open_case(registry, digest))
    other = make_keys(tmp_path / "elsewhere" / "key")
    monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "elsewhere" / "key"))
    registry.artifact("laptop").version(digest).sign(load_signer())
    shown = render_summary(open_case(registry, digest))
    assert f"`{keyid}` (trusted)" in shown
    assert f"`{other}` (not checked)" in shown


def test_an_unsigned_version_is_not_reviewed_under_a_policy(workspace, registry, tmp_path, monkeypatch):
    old, new = (make_version(workspace, loss) for loss in (5.0, 4.0))
    decide(registry, open_case(registry, old), YES)
    make_keys(tmp_path / "key")
    monkeypatch.setenv("ROPEWAY_TRUSTED_KEYS", str(tmp_path))
    monkeypatch.setenv("ROPEWAY_SIGNING_KEY", str(tmp_path / "key"))
    for digest in (new, old):  # production is shown beside it
        with pytest.raises(DataError, match=f"{digest[:12]}… has no signature of a trusted key"):
            open_case(registry, new)
        registry.artifact("laptop").version(digest).sign(load_signer())
    assert open_case(registry, new).old.label == "laptop@v1"


HOSTILE = [
    {"verdict": {"lines": ["x"]}},
    {"verdict": "passed"},
    {"verdict": {"passed": True, "checks": [{"words": "x"}]}},
    {"verdict": {"passed": True, "lines": 7}},
    {"verdict": {"passed": True, "lines": [], "needs_person": 7}},
    {"drift": {"references": [7]}},
    {"opponent": 7},
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_a_review_of_a_record_that_ropeway_did_not_write_ends_by_name(workspace, registry, hostile):
    old, new = (make_version(workspace, loss) for loss in (5.0, 4.0))
    decide(registry, open_case(registry, old), YES)
    log = versions_log("laptop")
    provenance = own_fields(registry.store, log.key(2))["provenance"]
    change_event(registry.store, log, 2, provenance={**provenance, **hostile})
    case = open_case(registry, new)
    with pytest.raises(DataError, match=r"laptop@v2 .* damaged"):
        render_review(case)
    ran = CliRunner().invoke(app, ["review", new[:12]])
    assert not isinstance(ran.exception, KeyError | TypeError | AttributeError | ValueError)
    assert ran.exit_code


def test_a_known_version_with_a_hostile_verdict_is_named_by_a_publication(workspace, registry):
    digest = make_version(workspace, 5.0)
    make_version(workspace, 9.0)
    log = versions_log("laptop")
    provenance = own_fields(registry.store, log.key(2))["provenance"]
    change_event(registry.store, log, 2, provenance={**provenance, "verdict": {"lines": []}})
    with pytest.raises(DataError, match=r"laptop@v2.* damaged"):
        make_version(workspace, 9.0)
    assert registry.artifact("laptop").alias("candidate").digest == digest
