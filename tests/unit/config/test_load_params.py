from pathlib import Path

import pytest

from ropeway.config.load_params import load_profiles
from ropeway.runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "line", "found"),
    [
        ("\n  name: a\x01b", 3, r"'\\x01'"),
        ("\n  since: 2024-13-45", 3, "2024-13-45"),
        ("\n  since: 2024-01-01T99:00:00", 3, "99:00"),
        ("\n  rows: !!int many", 3, "many"),
        (" *missing", 2, "missing"),
        (" " + "[" * 500 + "]" * 500, 2, "nested"),
        ("\n" + "".join(f"{' ' * level}k:\n" for level in range(1, 500)), 102, "nested"),
    ],
    ids=["control character", "date", "time", "integer", "alias", "500 levels in a line", "500 levels in lines"],
)
def test_invalid_yaml_is_a_config_error_with_file_and_line(value, line, found):
    with pytest.raises(ConfigError, match=rf"^params\.yaml:{line}: .*{found}"):
        load_profiles(Path("params.yaml"), text=f"profile: a\na:{value}\n")


@pytest.mark.parametrize("key", ["1", "? [1]\n"])
def test_profile_names_that_are_no_text_are_listed(key):
    with pytest.raises(ConfigError, match="'a' does not exist"):
        load_profiles(Path("params.yaml"), text=f"profile: a\n{key}: {{}}\n")


def test_a_profile_that_is_no_mapping_is_named():
    with pytest.raises(ConfigError, match=r"profile 'a'(?s:.*)expected a mapping, found list of 1"):
        load_profiles(Path("params.yaml"), text="profile: a\na: [1]\n")


def test_a_key_given_twice_is_refused_also_in_a_profile_that_takes_from_another():
    shipped = (Path(__file__).parents[3] / "params.yaml").read_text(encoding="utf-8")
    text = f"{shipped}mine:\n  <<: *published\n  rng_seed: 7\n"
    assert load_profiles(Path("params.yaml"), text=text)[1]["mine"].rng_seed == 7
    last = text.count("\n")
    with pytest.raises(ConfigError, match=rf"^params\.yaml:{last + 1}: .*'rng_seed' twice.*line {last}"):
        load_profiles(Path("params.yaml"), text=f"{text}  rng_seed: 8\n")
