"""What a keyboard, a screen reader and a browser without a network need of each HTML page."""

import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from ropeway.reporting.report_eval import render_samples
from tests.support.prepared_run import make_prepared

SCROLLING = {"wide", "tokens"}  # classes with `overflow` in style.css.jinja


class Outline(HTMLParser):
    """Collects a page's tags with the tags that they are inside of, and the text of each."""

    VOID = frozenset({"meta", "input", "img", "br", "hr", "source"})

    def __init__(self, page):
        super().__init__()
        self.tags, self._open = [], []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        entry = {"tag": tag, "attrs": dict(attrs), "inside": [one["tag"] for one in self._open], "text": ""}
        self.tags.append(entry)
        if tag not in self.VOID:
            self._open.append(entry)

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        for one in self._open:
            one["text"] += data

    def find(self, *names):
        return [one for one in self.tags if one["tag"] in names]


def make_samples():
    results = [
        {"sampling_config": f"{model}/{config}", "sampling_params": {"top_k": number}, "outputs": ["an answer", " "]}
        for number, config in enumerate(("greedy", "k50"))
        for model in ("base", "tuned")
    ]
    return {"model_name": "tiny", "args": {"seed": 1}, "prompts": [{"prompt": "Why?", "results": results}] * 2}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    refused = [{"where": "a:1", "reason": "no text"}]
    workspace, _ = make_prepared(
        tmp_path_factory.mktemp("page"), layout="packed", refused=refused, max_refused_fraction=0.5
    )
    texts = {
        "report.html": workspace.report.read_text(encoding="utf-8"),
        "samples.html": render_samples(make_samples()),
    }
    return {name: (text, Outline(text)) for name, text in texts.items()}


@pytest.fixture(params=["report.html", "samples.html"])
def outline(request, pages):
    return pages[request.param][1]


def test_a_page_names_its_language_title_and_viewport(outline):
    assert outline.find("html")[0]["attrs"]["lang"] == "en"
    assert outline.find("title")[0]["text"].strip()
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [
        one["attrs"] for one in outline.find("meta")
    ]
    assert len(outline.find("main")) == 1


def test_headings_start_at_one_and_skip_no_level(outline):
    levels = [int(one["tag"][1]) for one in outline.find("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(one["text"].strip() for one in outline.find("h1", "h2", "h3", "h4"))


def test_every_table_has_a_caption_and_every_header_a_scope_and_a_text(outline):
    assert len(outline.find("table")) == len(outline.find("caption")) > 0
    for one in outline.find("th"):
        assert one["attrs"].get("scope") in ("col", "row", "rowgroup")
        assert one["text"].strip()


def test_every_image_and_every_input_has_a_name(outline):
    assert all(one["attrs"].get("alt") for one in outline.find("img"))
    assert all(one["attrs"].get("aria-label") for one in outline.tags if one["attrs"].get("role") == "img")
    for one in outline.find("input"):
        assert one["attrs"].get("aria-label") or "label" in one["inside"]


def test_what_scrolls_is_reached_by_keyboard_and_has_a_name(outline):
    ids = {one["attrs"]["id"] for one in outline.tags if "id" in one["attrs"]}
    scrolling = [one for one in outline.tags if one["tag"] == "div" and one["attrs"].get("class") in SCROLLING]
    assert scrolling
    for one in scrolling:
        attrs = one["attrs"]
        assert (attrs["tabindex"], attrs["role"]) == ("0", "group")
        assert attrs.get("aria-label") or attrs["aria-labelledby"] in ids
    for one in outline.find("table"):
        assert "div" in one["inside"]


def test_ids_are_unique_and_links_inside_the_page_have_a_target(outline):
    counts = Counter(one["attrs"]["id"] for one in outline.tags if "id" in one["attrs"])
    assert [name for name, count in counts.items() if count > 1] == []
    assert all(one["attrs"]["href"].removeprefix("#") in counts for one in outline.find("a"))


def test_keyboard_focus_is_visible(pages):
    for text, _ in pages.values():
        css = text.partition("<style>")[2].partition("</style>")[0]
        assert re.search(r":focus-visible\{outline:2px solid", css)
        assert not re.search(r"outline:(none|0)[;}]", css)


def test_a_page_requests_nothing_and_runs_only_its_own_script(pages):
    for text, outline in pages.values():
        loading = [
            one["attrs"].get(name) for one in outline.tags for name in ("src", "srcset", "data", "poster", "action")
        ]
        assert all(uri.startswith("data:image/svg+xml;base64,") for uri in loading if uri is not None)
        assert not outline.find("link", "iframe", "object", "embed", "base", "form")
        assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|\bimport\b", text)
        assert len(outline.find("script")) == 1
        assert not [name for one in outline.tags for name in one["attrs"] if name.startswith("on")]


def test_each_answer_names_its_model_and_each_config_its_settings(pages):
    text, outline = pages["samples.html"]
    assert text == render_samples(make_samples())
    assert Counter(one["text"] for one in outline.tags if one["attrs"].get("class") == "model") == {
        "base: ": 4,
        "tuned: ": 4,
    }
    assert [one["text"] for one in outline.find("th") if one["attrs"]["scope"] == "row"] == ["greedy", "k50"]
