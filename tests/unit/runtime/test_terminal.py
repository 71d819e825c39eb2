import io
import re
import shlex
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.runtime.terminal import AlignedTable, Command, Paragraph, TerminalMarkdown, render, show

DIGEST = "5f3e32449fdc"
words = st.text("abc.de", min_size=1, max_size=20)
cells = st.lists(words, max_size=8).map(" ".join)


@given(st.lists(st.tuples(words, cells, words, cells), min_size=1, max_size=5), st.sampled_from([60, 80, 200]))
def test_a_table_fits_the_width_and_breaks_no_word(rows, width):
    text = render(AlignedTable(("key", "text", "digest", "why"), rows), width=width)
    assert all(len(line) <= width for line in text.splitlines())
    shown = text.split()
    for row in rows:
        for word in " ".join(row).split():
            assert word in shown


def test_columns_are_aligned_and_numbers_are_set_to_the_right():
    text = render(
        AlignedTable(("name", "bytes", "digest"), [("a", "1", DIGEST), ("bb", "13,257,552", DIGEST)]), width=80
    )
    head, first, second = text.splitlines()
    assert first.index(DIGEST) == second.index(DIGEST) == head.index("digest")
    assert first.index(" 1 ") == second.index("2 ") - 1


def test_a_table_that_is_too_wide_becomes_one_block_of_lines_per_row():
    rows = [("a" * 40, "b" * 40, DIGEST), ("c" * 40, "", DIGEST)]
    lines = render(AlignedTable(("key", "other", "digest"), rows), width=60).splitlines()
    assert lines == ["a" * 40, f"  other   {'b' * 40}", f"  digest  {DIGEST}", "c" * 40, f"  digest  {DIGEST}"]


def test_words_of_others_cannot_steer_the_terminal():
    text = render(AlignedTable(("a", "b"), [("\x1b]0;owned\x07", "[bold]x[/bold] :smile:")]), "\x1b[31m[red]", width=80)
    assert "\x1b" not in text
    assert "[bold]x[/bold] :smile:" in text


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_command_fits_the_width_and_pastes_as_it_was(width):
    command = f"ropeway review {DIGEST} --approve --reviewer NAME --comment WHY --expect none"
    text = render(Command(command), width=width)
    assert all(len(line) <= width for line in text.splitlines())
    assert shlex.split(text.replace("\\\n", "")) == shlex.split(command)


def test_a_path_longer_than_the_width_stays_whole():
    path = "/a/very/long/path" * 6
    assert path in render(Paragraph(f"The package is in {path} now."), width=60).splitlines()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_of_markdown_fit_and_keep_their_keys(width):
    rows = f"| stage | digest |\n| --- | --- |\n| `a.key.of.some.length` | {DIGEST} |\n| b | {'long words ' * 30}|"
    text = render(
        TerminalMarkdown(f"# Title\n\n{rows}\n\n```\nropeway registry pull laptop@{DIGEST}\n```"), width=width
    )
    assert all(len(line) <= width for line in text.splitlines())
    assert "a.key.of.some.length" in text
    assert f"ropeway registry pull laptop@{DIGEST}" in text
    assert "…" not in text


class AlwaysTerminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-256color"}, {"\x1b[1m", "\x1b[31m", "\x1b[0m"}),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, {"\x1b[1m", "\x1b[0m"}),
        ({"TERM": "dumb"}, set()),
    ],
)
def test_a_terminal_gets_the_styles_that_it_and_no_color_allow(monkeypatch, environment, expected):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", AlwaysTerminal())
    show(AlignedTable(("a",), [("b",)], title="bold"), Paragraph("red", style="red"))
    assert set(re.findall(r"\x1b\[[0-9;]*[A-Za-z]", sys.stdout.getvalue())) == expected
