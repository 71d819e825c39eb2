import json
import shutil
from dataclasses import replace

import pytest

from ropeway.orchestration.gate import gate
from ropeway.runtime.errors import DataError
from ropeway.stages.evaluate import stage as evaluate
from ropeway.stages.evaluate.champion import measure_champion
from ropeway.stages.evaluate.long_context import LongContextQuestion
from ropeway.stages.evaluate.stage import identify_sections, plan_measurements
from tests.support.gate_limits import make_limits
from tests.support.tiny_run import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def test_a_champion_gets_the_scores_that_this_run_computes_for_its_model(run, tmp_path):
    workspace, profile = run
    evaluate.run(workspace, profile)
    own = json.loads(workspace.evaluation.read_text())
    measure_champion(workspace, profile, workspace.base, tmp_path / "champion.json", ["losses"])
    found = json.loads((tmp_path / "champion.json").read_text())
    assert found["validation"] == own["validation"]
    assert {name: source["tuned"] for name, source in found["sources"].items()} == {
        name: source["base"] for name, source in own["sources"].items()
    }


def test_a_champion_is_measured_only_on_the_sections_that_are_asked(run, tmp_path, monkeypatch):
    workspace, profile = run
    evaluate.run(workspace, profile)
    own = json.loads(workspace.evaluation.read_text())
    monkeypatch.setattr("ropeway.stages.evaluate.measuring.sum_batches", lambda *_, **__: pytest.fail("scored rows"))
    measure_champion(workspace, profile, workspace.model, tmp_path / "champion.json", ["passkey", "positions"])
    found = json.loads((tmp_path / "champion.json").read_text())
    assert found.keys() == {"passkey", "positions", "identities", "tokenizer"}
    assert found["passkey"] == {"tuned": own["passkey"]["tuned"]}
    for part in ("up_to_max_length", "beyond"):
        assert found["positions"][part]["tuned"] == own["positions"][part]["tuned"]
    assert found["identities"] == own["identities"]
    assert found["identities"].keys() == {"passkey", "positions"}
    limits = make_limits(max_passkey_decrease=0.0, max_position_loss_increase_nats=0.0, min_gain_over_base_nats=-9.0)
    verdict = gate(own, {**own, **found}, limits, max_length=256)
    assert verdict.passed, verdict
    assert sum(line.startswith(("passkeys at", "loss beyond")) for line in verdict.lines) == 3


def test_a_package_has_the_tokenizer_of_its_run_though_its_file_differs(run, tmp_path):
    workspace, profile = run
    evaluate.run(workspace, profile)
    own = json.loads(workspace.evaluation.read_text())
    shutil.copytree(workspace.model, tmp_path / "package")
    path = tmp_path / "package" / "tokenizer.json"
    stored = json.loads(path.read_bytes())
    stored["model"]["merges"] = [one.split(" ") for one in stored["model"]["merges"]]  # the other of the two forms
    path.write_text(json.dumps(stored))
    measure_champion(workspace, profile, tmp_path / "package", tmp_path / "champion.json", ["losses", "positions"])
    found = json.loads((tmp_path / "champion.json").read_text())
    assert found["tokenizer"] == own["tokenizer"]
    assert found["positions"]["beyond"]["tuned"] == own["positions"]["beyond"]["tuned"]
    assert {name: source["tuned"] for name, source in found["sources"].items()} == {
        name: source["tuned"] for name, source in own["sources"].items()
    }


def test_identities_differ_where_questions_or_rows_do(run):
    workspace, profile = run
    request = plan_measurements(workspace, profile)
    seen = {section: {one} for section, one in identify_sections(workspace, request).items()}
    for changed in (
        replace(request, questions=request.questions[1:]),
        replace(request, questions=[replace(one, key="11111") for one in request.questions]),
        replace(request, long_context=[LongContextQuestion("multi_key", 256, 0, "seed")]),
        replace(request, long_rows=[replace(row, ids=row.ids + 1) for row in request.long_rows]),
        replace(request, long_rows=[replace(row, mask=~row.mask) for row in request.long_rows]),
    ):
        for section, one in identify_sections(workspace, changed).items():
            seen[section].add(one)
    counts = {section: len(found) for section, found in seen.items()}
    assert counts == {"passkey": 3, "long_context": 2, "positions": 3}


def test_a_champion_with_another_template_is_refused(run, tmp_path):
    workspace, profile = run
    shutil.copytree(workspace.model, tmp_path / "other")
    path = tmp_path / "other" / "chat_template.jinja"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DataError, match="is not that of the data"):
        measure_champion(workspace, profile, tmp_path / "other", tmp_path / "champion.json", ["losses"])
    assert not (tmp_path / "champion.json").exists()
