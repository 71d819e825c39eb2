from pathlib import Path

import pytest

from ropeway.config.edit import inherited_names, write_blocks
from ropeway.config.load_params import load_profile, read_block
from ropeway.runtime.errors import ConfigError

ROOT = Path(__file__).parents[3]
FILE = """\
profile: mine
presets:
  small: {preset: other, a: 1, gate: {x: 1, y: 1}, datasets: [{d: {}}], resume_from: old}
  other: &other {b: 2, c: 2, gate: {z: 3}}
mine:
  preset: small
  a: 10
  gate: {y: 20}
  datasets: []
yours:
  preset: mine
  resume_from: own
  sources: {s: {}}
third: &third
  x: 0
fourth:
  preset: twice
  <<: *third
twice:
  preset: twice
small:
  preset: small
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "params.yaml").write_text(FILE, encoding="utf-8")
    return tmp_path / "params.yaml"


def test_a_profile_states_what_differs_from_its_preset_and_nothing_else(path):
    assert read_block(path, "mine") == {
        "a": 10, "b": 2, "c": 2, "gate": {"x": 1, "y": 20, "z": 3}, "datasets": [], "resume_from": None,
    }  # fmt: skip


def test_a_profile_can_be_the_preset_of_another_but_not_what_it_resumes_from(path):
    assert read_block(path, "yours")["a"] == 10
    assert read_block(path, "yours")["resume_from"] == "own"
    assert read_block(path, "mine")["resume_from"] is None


def test_a_preset_may_have_the_name_of_a_profile(path):
    assert read_block(path, "small")["a"] == 1


@pytest.mark.parametrize(
    ("change", "profile", "says"),
    [
        (("preset: mine", "preset: nowhere"), "yours", "'nowhere' does not exist; available: small, other, mine"),
        (("preset: mine", "preset: [mine]"), "yours", "does not exist"),
        (("x: 0", "x: 1"), "twice", "twice -> twice is a circle"),
        (("small: {preset: other", "small: {preset: mine"), "mine", "mine -> small -> mine is a circle"),
        (("presets:", "presets: [1]\nx:"), "mine", "presets: expected a mapping"),
    ],
)
def test_a_preset_that_cannot_be_used_is_named(path, change, profile, says):
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        read_block(path, profile)


def test_faults_of_a_profile_say_which_preset_it_has(tmp_path):
    path = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("learning_rate: 2e-3", "learning_rate: -1"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"profile 'laptop' \(.*preset scratch\)(?s:.*)learning_rate: expected more"):
        load_profile(path)


def test_a_copied_profile_brings_its_presets(path, tmp_path):
    assert inherited_names(FILE, "yours") == ["presets", "mine"]
    assert inherited_names(FILE, "fourth") == ["twice", "third"]
    target = tmp_path / "copy.yaml"
    write_blocks(path, "yours", target)
    assert read_block(target, "yours") == read_block(path, "yours")
    assert "fourth" not in target.read_text()
