"""Markup in a record, an answer, a name or a comment is text on the pages that no other test covers: the review and its
summary, drift, and the moves of an alias. Data, tokens, samples, history and card have tests of their own."""

import json

import pytest

from ropeway.orchestration.decision import ReviewAnswer, decide
from ropeway.registry import Registry
from ropeway.reporting.drift_tables import drift_matrix, list_uncompared, summarize
from ropeway.reporting.evidence import open_case
from ropeway.reporting.markdown import code, fence, plain, table
from ropeway.reporting.review_report import render_review, render_summary
from ropeway.runtime.workspace import Workspace
from tests.support import review_world
from tests.support.markdown_markup import find_markup
from tests.support.review_world import make_version

BAD = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](javascript:alert(1))",
    "a|b\n\n<script>alert(1)</script>\n\n```\n<b>out</b>",
    "`` ` <b>x</b>",
    "&lt;script&gt;<svg/onload=alert(1)>",
    "<javascript:alert(1)>",
]


def test_the_reader_finds_what_acts():
    assert len(find_markup("a <b>x</b>\n\n<script>y</script>\n\n[a](javascript:x)")) >= 3
    assert not find_markup("`<b>`\n\n```\n<script>\n```\n\n\\<b> [a](https://example.org)")


@pytest.mark.parametrize("bad", BAD)
def test_markup_in_a_record_a_comment_or_a_file_name_is_text_in_a_review(tmp_path, monkeypatch, bad):
    monkeypatch.delenv("ROPEWAY_REGISTRY", raising=False)
    workspace = Workspace(tmp_path, "laptop")
    monkeypatch.setattr(review_world, "PROMPT", bad)
    real = review_world._samples

    def samples(loss):
        found = json.loads(json.dumps(real(loss)))
        for result in found["prompts"][0]["results"]:
            result["outputs"] = [bad]
        return found

    monkeypatch.setattr(review_world, "_samples", samples)
    registry = Registry.open(workspace.registry_url)
    revision = review_world.DIRTY.__class__("b" * 40, (bad.replace("\n", " "),))
    digest = make_version(workspace, 5.0, revision=revision, also={"metrics": {"validation": bad}})
    answer = bad.replace("\n", " ")
    decide(registry, open_case(registry, digest), ReviewAnswer("reject", answer[:60], answer, "terminal"))
    case = open_case(registry, digest)
    for page in (render_review(case, with_pictures=False), render_summary(case)):
        assert find_markup(page) == [], page
    assert "alert(1)" in render_review(case, with_pictures=False) or "x" in bad


@pytest.mark.parametrize("bad", BAD)
def test_markup_in_what_a_publication_recorded_of_drift_is_text(bad):
    measure = {
        "name": bad, "kind": "share", "old": 0.1, "new": 0.5, "psi": 1.0, "js": 0.5, "exceeds": True, "note": bad,
        "title": bad, "limit": 0.1, "words": bad, "source": bad,
    }  # fmt: skip
    drift = {
        "note": bad,
        "limits": None,
        "references": [
            {"version": bad, "why": [bad], "note": "", "measures": [], "digest": "0" * 64},
            {"version": bad, "why": [], "note": bad, "measures": [measure], "digest": "0" * 64},
        ],
    }
    page = "\n\n".join([plain(summarize(drift)), table(drift_matrix(drift)), *map(plain, list_uncompared(drift))])
    assert find_markup(page) == []


@pytest.mark.parametrize("bad", BAD)
def test_markup_in_the_moves_of_an_alias_is_text(bad):
    rows = [{"at": "now", "digest": code("0" * 12), "by": code(bad), "reason": code(f"a|{bad}")}]
    assert find_markup(f"# laptop@production\n\n{table(rows)}") == []
    assert find_markup(f"- {plain(bad)}") == []
    assert find_markup(fence(bad)) == []
