import json
import shutil

import pytest

from ropeway.runtime.errors import DataError
from ropeway.stages.evaluate import stage as evaluate
from ropeway.stages.evaluate.champion import measure_champion
from tests.support.tiny_run import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def test_a_champion_gets_the_scores_that_this_run_computes_for_its_model(run, tmp_path):
    workspace, profile = run
    evaluate.run(workspace, profile)
    own = json.loads(workspace.evaluation.read_text())
    measure_champion(workspace, profile, workspace.base, tmp_path / "champion.json")
    found = json.loads((tmp_path / "champion.json").read_text())
    assert found["validation"] == own["validation"]
    assert {name: source["tuned"] for name, source in found["sources"].items()} == {
        name: source["base"] for name, source in own["sources"].items()
    }


def test_a_champion_with_another_template_is_refused(run, tmp_path):
    workspace, profile = run
    shutil.copytree(workspace.model, tmp_path / "other")
    path = tmp_path / "other" / "chat_template.jinja"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DataError, match="is not that of the data"):
        measure_champion(workspace, profile, tmp_path / "other", tmp_path / "champion.json")
    assert not (tmp_path / "champion.json").exists()
