"""A few lines of YAML that stand for billions of values are refused by name, in milliseconds and in little memory."""

import pytest
from ruamel.yaml.error import MarkedYAMLError

from ropeway.config.load_params import load_profiles, read_stated
from ropeway.config.yaml_limits import MAX_BYTES, load_yaml
from ropeway.orchestration.dvc_graph import parse_lock
from ropeway.orchestration.forecast import _load_yaml
from ropeway.runtime.errors import ConfigError
from tests.support.bounded import run_bounded
from tests.support.tiny_run import ROOT


def levels(first, line, count=12):
    """The text of anchors `x0` to `x<count>`, each of which names the one before it ten times."""
    lines = [line(number, ",".join([f"*x{number - 1}"] * 10)) for number in range(1, count)]
    return "".join([f"x0: &x0 {first}\n", *(f"x{number}: {text}\n" for number, text in enumerate(lines, 1))])


LISTS = levels("[lol]", lambda number, before: f"&x{number} [{before}]")
MERGES = levels("{a: 1}", lambda number, before: f"&x{number} {{<<: [{before}], k{number}: 1}}")
BOMBS = {
    "lists of aliases": LISTS + "a: {forget: *x11}\n",
    "aliases in a profile's preset": LISTS + "a: {preset: *x11}\n",
    "merges of merges": MERGES + "a: {<<: *x11}\n",
    "a value that contains itself": "a: &a {sources: *a}\n",
    "deep lists in one line": "a: " + "[" * 1_000_000 + "\n",
    "deep lists line by line": "a:\n" + "".join(" " * depth + "-\n" for depth in range(1, 1000)),
    "hexadecimal digits": "a: {rng_seed: 0x" + "f" * 3600 + "}\n",
    "an integer of a million digits": "a: {rng_seed: " + "1" * 1_000_000 + "}\n",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_bomb_in_params_is_refused_by_name_in_little_memory(text):
    found = run_bounded(lambda: load_profiles(ROOT / "params.yaml", text="profile: a\n" + text))
    assert found.error == "ConfigError"
    assert f"{ROOT}/params.yaml:" in found.message
    assert found.megabytes < 100


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_bomb_in_dvc_lock_is_refused_by_name_in_little_memory(tmp_path, text):
    (tmp_path / "dvc.lock").write_text(text)
    found = run_bounded(lambda: _load_yaml(tmp_path / "dvc.lock"))
    assert (found.error, found.message.startswith(f"{tmp_path}/dvc.lock: ")) == ("ConfigError", True)
    assert found.megabytes < 100


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_bomb_in_the_lock_of_a_version_is_refused_by_name_in_little_memory(text):
    found = run_bounded(lambda: parse_lock(text.encode()))
    assert (found.error, found.message.startswith("dvc.lock: ")) == ("ConfigError", True)
    assert found.megabytes < 100


def test_another_version_of_yaml_is_refused(tmp_path):
    """In YAML 1.1, numbers to base 60 take quadratic time."""
    bomb = "a: {rng_seed: 1" + ":59" * 100_000 + "}\n"
    path = tmp_path / "params.yaml"
    for version, kind in (("1.1", ConfigError), ("1.2", ConfigError)):
        text = f"%YAML {version}\n---\n{bomb}"
        path.write_text(text)
        with pytest.raises(kind):
            parse_lock(text.encode())
        with pytest.raises(kind):
            load_profiles(path)
    assert load_yaml(b"%YAML 1.2\n---\na: 1\n") == {"a": 1}
    with pytest.raises(MarkedYAMLError, match=r"1\.1"):
        load_yaml(b"%YAML 1.1\n---\na: 1\n")


def test_a_params_file_larger_than_the_limit_is_not_read(tmp_path):
    with (tmp_path / "params.yaml").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ConfigError, match=f"{MAX_BYTES + 1:,} bytes"):
        load_profiles(tmp_path / "params.yaml")
    with pytest.raises(Exception, match="bytes"):
        load_yaml(bytes(MAX_BYTES + 1))


def test_many_values_and_aliases_below_the_limit_are_read(tmp_path):
    digests = ", ".join("0123456789abcdef" for _ in range(3000))
    text = f"all: &all [{digests}]\n" + "".join(f"k{number}: *all\n" for number in range(300))
    assert len(load_yaml(text.encode())["k299"]) == 3000
    with pytest.raises(MarkedYAMLError):
        load_yaml(text.encode() + b"more: [" + b"*all, " * 60 + b"]\n")
    path = tmp_path / "params.yaml"
    path.write_text("profile: a\nx: &x {rng_seed: 1, forget: &f [a, b]}\na: {<<: *x, card: {f: *f}}\n")
    assert read_stated(path, "a")[0] == {"rng_seed": 1, "forget": ["a", "b"], "card": {"f": ["a", "b"]}}
