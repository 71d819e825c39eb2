"""Escaping: nothing that a page prints can become markup, and every page can be written as UTF-8."""

import subprocess
import sys

import pytest

from ropeway.reporting import markdown
from ropeway.reporting.colors import DARK, LIGHT
from ropeway.reporting.render import render
from tests.support.pages import assert_only_its_own_script

HOSTILE = [
    "<script>alert(1)</script>",
    "a | b\n\n# heading\n```\n[x](javascript:alert(1)) ![y](z) `code` *b* _i_ $m$ ~s~",
    "\ud83d half a pair",
    "\u202egnp.exe \u2066isolated",
    "\u05e9\u05dc\u05d5\u05dd",
    "\x1b[2J\x00\x07",
    "{{ 7 * 7 }} {% raw %}",
    "x" * 100_000,
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("escape", [markdown.escape, markdown.plain, markdown.code])
def test_markdown_keeps_hostile_text_on_one_line_without_markup(escape, text):
    said = escape(text)
    assert said.encode().decode() == said
    assert said.isprintable()
    assert "<" not in said or escape is markdown.code
    assert not {"\n", "\u202e", "\x1b"} & set(said)
    if escape is not markdown.code:
        assert all(mark not in said.replace(f"\\{mark}", "") for mark in "|`*_[]#$~")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_fence_cannot_be_closed_by_what_is_in_it(text):
    first, *inner, last = markdown.fence(text).split("\n")
    assert first == last
    assert not any(line.startswith(first) for line in inner)
    assert markdown.fence(text).encode()


@pytest.mark.parametrize("text", HOSTILE)
def test_html_shows_hostile_text_and_runs_none_of_it(text):
    page = render("page.html.jinja", title=text)
    assert page.encode().decode() == page
    assert page.count("<script>") == 1
    assert_only_its_own_script(page)
    assert not {"\u202e", "\u2066", "\x1b", "\x00", "\ud83d"} & set(page)
    assert page == render("page.html.jinja", title=text)


def test_a_page_has_the_colors_of_both_modes_from_one_place():
    assert LIGHT.keys() == DARK.keys()
    page = render("page.html.jinja", title="x")
    for colors in (LIGHT, DARK):
        assert all(f"--{name}:{color};" in page for name, color in colors.items())


def test_a_review_for_the_terminal_imports_no_matplotlib():
    code = "import sys, ropeway.orchestration.decision; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
