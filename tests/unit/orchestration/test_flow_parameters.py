"""What an API client sends as parameters: accepted with one meaning, or refused by name before anything starts."""

import os
from contextlib import suppress

import pytest

from flows.review import Form
from ropeway.orchestration.display import retry_seconds
from ropeway.orchestration.flow_parameters import (
    MAX_CHARACTERS,
    read_hours,
    read_profile,
    read_root,
    read_switch,
    read_text,
)
from ropeway.registry import Registry
from ropeway.registry.aliases import check_text
from ropeway.runtime.environment import read_count
from ropeway.runtime.errors import ConfigError, RegistryError
from ropeway.storage import open_store
from tests.support.fuzz_targets import TARGETS, seeds

TEN_MB = 10_000_000
ODD = [
    None, True, 3, 10**4000, 1e308, float("nan"), [], ["a"], {}, {"a": 1}, b"x", "", " ", "a\nb", "\x1b[2J", "a\0b",
    "\udcff", "\u202eevil", "x" * (MAX_CHARACTERS + 1), "x" * TEN_MB,
]  # fmt: skip


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
def test_a_text_that_is_none_is_refused_by_name_and_the_message_is_short(value):
    for read in (lambda value: read_text("digest", value), read_root):
        with pytest.raises(ConfigError, match=r"^parameter (digest|root): expected ") as caught:
            read(value)
        message = str(caught.value)
        assert len(message) < 300
        assert message.isprintable()


@pytest.mark.parametrize("value", [*ODD[2:], "false", "true", 0, 1], ids=lambda value: type(value).__name__)
def test_a_switch_is_true_or_false_and_no_text_stands_for_it(value):
    with pytest.raises(ConfigError, match="parameter rehearse: expected true or false"):
        read_switch("rehearse", value)


@pytest.mark.parametrize(
    "value", [0, -1, 0.0, float("inf"), float("-inf"), float("nan"), 1e308, 10**400, True, "168", None, []]
)
def test_hours_that_no_review_can_wait_are_refused_by_name(value):
    with pytest.raises(ConfigError, match="parameter expires_hours: expected a number of hours above 0"):
        read_hours("expires_hours", value)


def test_what_is_meant_is_accepted(tmp_path):
    assert read_root(str(tmp_path)) == tmp_path.resolve()
    assert read_profile(None) is None
    assert (read_profile("laptop"), read_switch("rehearse", value=True)) == ("laptop", True)
    assert read_hours("expires_hours", 1) == 1.0
    assert read_text("trigger", "", is_empty_allowed=True) == ""


def test_a_root_that_is_no_folder_is_refused_by_name(tmp_path):
    (tmp_path / "a").symlink_to("a")
    for root in (tmp_path / "none", tmp_path / "a", "y" * 500):
        with pytest.raises(ConfigError, match="parameter root: expected a folder"):
            read_root(str(root))


def test_an_unknown_version_of_ten_megabytes_is_a_short_message(tmp_path):
    registry = Registry.open(tmp_path.as_uri())
    for wanted in ("a" * TEN_MB, "tiny@" + "9" * TEN_MB, "zz"):
        with pytest.raises((RegistryError, ConfigError)) as caught:
            registry.find(wanted)
        assert len(str(caught.value)) < 500


ANSWER = {"decision": "approve", "reviewer": "Ana", "comment": "fine"}


@pytest.mark.parametrize("value", ["", " ", "x" * TEN_MB, 3, None, ["a"]], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("field", ["reviewer", "comment", "decision"])
def test_a_field_of_the_form_that_is_no_answer_is_a_validation_error(field, value):
    with pytest.raises(ValueError, match=field):
        Form(**{**ANSWER, field: value})


@pytest.mark.parametrize("text", ["a\0b", "\x1b[2J", "\u202eevil", "\udcff"])
def test_control_characters_in_an_answer_are_refused_before_it_is_recorded(text):
    try:
        said = Form(**{**ANSWER, "comment": text})
    except ValueError:  # a lone surrogate
        return
    with pytest.raises(ConfigError, match="printable"):
        check_text("comment", said.comment)


@pytest.mark.parametrize("stated", ["0", "-1", "1.5", "x", "9" * 5000, "٣", "1" * 7, "\udcff"])
def test_a_count_in_the_environment_that_is_none_is_refused_by_name(stated):
    with pytest.raises(ConfigError, match="ROPEWAY_RANKS: expected a whole number") as caught:
        read_count({"ROPEWAY_RANKS": stated}, "ROPEWAY_RANKS")
    assert len(str(caught.value)) < 200
    assert read_count({"ROPEWAY_RANKS": ""}, "ROPEWAY_RANKS") is None


@pytest.mark.parametrize("stated", ["x", "nan", "inf", "-1", "1e9", ""])
def test_a_pause_that_is_no_number_of_seconds_is_refused_by_name(monkeypatch, stated):
    monkeypatch.setenv("ROPEWAY_RETRY_SECONDS", stated)
    with pytest.raises(ConfigError, match="ROPEWAY_RETRY_SECONDS"):
        retry_seconds()
    monkeypatch.setenv("ROPEWAY_RETRY_SECONDS", "0")
    assert retry_seconds() == 0


@pytest.mark.parametrize("url", ["http://[::1", "file:///" + "x" * 5000, "s3://[", "file://host/x", "file:///a%00b"])
def test_an_address_of_a_store_that_is_none_is_refused_by_name(url):
    with pytest.raises(ConfigError) as caught:
        open_store(url)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["flow_parameters", "review_form", "environment", "yaml", "gguf"])
def test_the_targets_of_make_fuzz_accept_their_seeds(name):
    before = dict(os.environ)
    for data in [*seeds()[name], b"", b"\xff\xfe", b"\0" * 100]:
        with suppress(ConfigError, RegistryError):
            TARGETS[name](data)
    assert dict(os.environ) == before
