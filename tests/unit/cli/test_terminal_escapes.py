"""Texts that others chose reach the terminal as visible escapes."""

import io
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from ropeway.cli import chat, main
from ropeway.runtime.errors import ConfigError, DataError

HOSTILE = "a\x1b[31mred\x9b0m\u202eb"
SHOWN = "a\\x1b[31mred\\x9b0m\\u202eb"


def test_a_commands_error(monkeypatch, capsys):
    def fail():
        raise DataError(f"{HOSTILE}.jsonl:\nbroken")

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit) as end:
        main.main()
    assert (end.value.code, capsys.readouterr().err) == (65, f"ropeway: {SHOWN}.jsonl:\nbroken\n")


def test_an_error_and_a_calls_name_in_a_chat(capsys):
    def refuse(*_):
        raise ConfigError(HOSTILE)

    session = SimpleNamespace(
        ask=refuse, give_result=lambda *_: None, opening="", states_parts=False, pending_calls=[HOSTILE]
    )
    chat._converse(session, iter(["hello", "/tool f 1"]), io.StringIO())
    said = capsys.readouterr().err
    assert (said.count(SHOWN), "\x1b" in said) == (2, False)


def test_lines_of_a_reproduction(monkeypatch, tmp_path):
    def again(_root, _version, *, target, write_line):
        write_line(f"{target}: {HOSTILE}")
        raise ConfigError("ends here")

    monkeypatch.setattr("ropeway.orchestration.reproduce.reproduce", again)
    monkeypatch.setattr(main, "find_root", lambda: tmp_path)
    monkeypatch.setattr(
        "ropeway.cli.registry_options.open_registry", lambda _address: SimpleNamespace(version=lambda _name: None)
    )
    said = CliRunner().invoke(main.app, ["reproduce", "tiny@v1", "--to", "there"]).output
    assert f"there: {SHOWN}\n" in said
