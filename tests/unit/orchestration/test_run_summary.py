"""The last lines of a run: what it produced, whether that is better than production, what to do next."""

from dataclasses import replace

import pytest

from ropeway.orchestration.gate import GateCheck, GateVerdict
from ropeway.orchestration.publish import Publication
from ropeway.orchestration.run_summary import Result, draw_report, draw_table, print_result, write_history
from ropeway.runtime.manifest import write_json
from ropeway.runtime.workspace import Workspace

DIGEST = "5f3e32449fdc" + "0" * 52


def make_result(root, state, *, reviewable=False, review=None):
    workspace = Workspace(root, "laptop")
    write_json(workspace.evaluation, {"sources": {"docs": {"base": {"loss": 8.347005}, "tuned": {"loss": 5.249392}}}})
    verdict = None if state == "Unchanged" else GateVerdict(state == "Published", ())
    words, comparison = "registered laptop@v2 and moved candidate to it", "better than production (laptop@v1): ..."
    publication = Publication(state, "laptop@v2", DIGEST, verdict, words, comparison, reviewable=reviewable)
    return Result(workspace, {}, publication, 61.2, review)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_run_ends_with_its_version_the_comparison_and_the_next_command(tmp_path, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    page = f"http://127.0.0.1:4200/runs/flow-run/{'0' * 8}-0000-0000-0000-{'0' * 12}"
    print_result(make_result(tmp_path, "Published", reviewable=True), page)
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert "laptop: Published in 61 s" in words
    assert "docs 8.347 -> 5.249 nats/token" in words
    assert "laptop@v2 (5f3e32449fdc)" in words
    assert "compared better than production (laptop@v1)" in words
    assert words.endswith("next ropeway review 5f3e32449fdc")
    whole = (page, str(tmp_path))
    assert all(len(line) <= width for line in out.splitlines() if not any(word in line for word in whole))
    assert page in words


def test_the_first_questions_are_shown_with_the_answers_of_base_and_tuned(tmp_path, capsys):
    result = make_result(tmp_path, "Published")
    prompts = [
        {
            "prompt": f"Question {number}?",
            "results": [
                {"sampling_config": f"{model}/{config}", "outputs": [f"{model}\n {config} {number} {'long ' * 40}"]}
                for model in ("base", "tuned")
                for config in ("greedy", "k50")
            ],
        }
        for number in range(3)
    ]
    write_json(result.workspace.samples, {"prompts": prompts})
    print_result(result, None)
    words = " ".join(capsys.readouterr().out.split())
    assert "asked Question 0? base base greedy 0 long" in words
    assert "tuned tuned greedy 1 long" in words
    assert "…" in words
    assert "Question 2" not in words
    assert "k50" not in words


def test_a_rejected_run_ends_with_the_comparisons_that_failed(tmp_path, capsys):
    result = make_result(tmp_path, "Rejected")
    checks = tuple(GateCheck(passed=not number, words=f"check {number}: worse") for number in range(3))
    verdict = GateVerdict(passed=False, checks=checks)
    print_result(replace(result, publication=replace(result.publication, verdict=verdict)), None)
    words = " ".join(capsys.readouterr().out.split())
    assert "gate NOT PASSED, 2 of 3 comparisons failed check 1: worse check 2: worse package" in words


def test_the_page_of_a_run_has_the_comparisons_as_a_table_and_failed_ones_first(tmp_path):
    result = make_result(tmp_path, "Rejected")
    good, bad = (
        GateCheck(passed, f"{name}: …", name, "1.000", "2.000", "laptop@v1", "-1.000", "-0.100")
        for passed, name in ((True, "docs, accuracy"), (False, "quiz, acc"))
    )
    verdict = GateVerdict(passed=False, checks=(good, GateCheck(passed=True, words="tasks: none"), bad))
    report = draw_report(replace(result, publication=replace(result.publication, verdict=verdict)))
    _, _, gate = report.partition("## Gate\n\n")
    assert gate.splitlines()[:6] == [
        "- passed: tasks: none",
        "",
        "| check | this version | compared with | change | allowed | result |",
        "| --- | --- | --- | --- | --- | --- |",
        "| quiz, acc | 1.000 | 2.000 (laptop@v1) | -1.000 | -0.100 | **not passed** |",
        "| docs, accuracy | 1.000 | 2.000 (laptop@v1) | -1.000 | -0.100 | passed |",
    ]
    assert "## Gate" not in draw_report(make_result(tmp_path, "Unchanged"))


@pytest.mark.parametrize(
    ("state", "options", "command"),
    [
        ("Rejected", {}, "ropeway review 5f3e32449fdc"),
        ("Unchanged", {}, "ropeway chat laptop@v2"),
        ("Published", {"review": "http://x/review"}, "answer the review at http://x/review"),
    ],
)
def test_the_next_command_follows_from_how_the_run_ended(tmp_path, capsys, state, options, command):
    print_result(make_result(tmp_path, state, **options), None)
    assert " ".join(capsys.readouterr().out.split()).endswith(f"next {command}")


def test_the_plan_of_the_stages_is_a_table_that_fits(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    rows = [{"stage": "train", "will run": "yes", "why": "params.yaml changed: learning_rate; " * 3}] * 2
    assert all(len(line) <= 60 for line in draw_table(rows).splitlines())
    assert draw_table([]) == ""


def test_a_registry_that_cannot_be_read_leaves_a_run_without_history_and_not_without_its_end(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ROPEWAY_REGISTRY", (tmp_path / "none").as_uri())
    workspace = Workspace(tmp_path, "laptop")
    assert write_history(workspace) == ""
    assert not workspace.history.exists()
    assert capsys.readouterr().out.startswith("history: not written")
    monkeypatch.setenv("ROPEWAY_GPU_HOUR_PRICE", "cheap")
    assert write_history(workspace) == ""
