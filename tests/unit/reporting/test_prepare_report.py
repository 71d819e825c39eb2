import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ropeway.data.batches import plan_epoch
from ropeway.data.shards import Shards, SourceShards, open_shards
from ropeway.models.conversation import Conversation
from ropeway.models.tokenizer import open_tokenizer
from ropeway.reporting.ledger_steps import ledger_rows, list_steps, split_tokens
from ropeway.reporting.pictures import count_lengths, draw_lengths
from ropeway.reporting.report_data import Page, choose_samples, find_overlong, render_report
from ropeway.reporting.token_view import Vocabulary
from ropeway.runtime.manifest import load_manifest
from tests.support.prepared_run import TALKS, TEXTS, make_prepared, reckon_supervised

EVIL = "<script>alert('x')</script> & \"quoted\" \u202eabc\x00 😀"
VOID = {"meta", "input", "img", "br", "hr", "source"}


class Reader(HTMLParser):
    """Reads a page as a browser nests it; raises where tags do not match."""

    def __init__(self):
        super().__init__()
        self.stack, self.scripts, self.tokens, self.title, self.opened = [], 0, {}, "", []

    def handle_starttag(self, tag, attrs):
        self.opened.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self.stack.append((tag, dict(attrs)))
        self.scripts += tag == "script"
        if self._inside("sample") and tag in ("b", "i") and self._inside("tokens"):
            self.tokens[self.title].append([tag == "b", dict(attrs).get("class"), ""])

    def handle_startendtag(self, tag, attrs):
        self.opened.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        if self._inside("tokens") and self._inside("sample") and self.stack[-1][0] in ("b", "i", "u", "em"):
            self.tokens[self.title][-1][2] += data
        elif self._inside("sample") and self.stack[-1][0] == "b":
            source = next(attrs["id"] for _, attrs in reversed(self.stack) if "id" in attrs) if self._ids() else "rows"
            self.title = f"{source} {data}"
            self.tokens[self.title] = []

    def _inside(self, kind):
        return any(attrs.get("class") == kind for _, attrs in self.stack)

    def _ids(self):
        return any("id" in attrs for _, attrs in self.stack)


def read(page):
    reader = Reader()
    reader.feed(page)
    assert reader.stack == []
    return reader


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    workspace, profile = make_prepared(tmp_path_factory.mktemp("report"))
    return workspace, profile, workspace.report.read_text(encoding="utf-8")


def test_each_source_shows_samples_filled_where_a_reckoning_from_roles_says_learned(made):
    workspace, _, page = made
    shards, tokens = open_shards(workspace.data), read(page).tokens
    titles = [title for title in tokens if title.startswith("s0")]
    assert titles[0].startswith("s0 First")
    assert any("ongest" in title for title in titles)
    found = tokens[titles[0]]
    ids = shards.sources[0].read(0)[0].tolist()
    assert [supervised for supervised, *_ in found] == reckon_supervised(ids)
    special = [text for _, kind, text in found if kind == "x"]
    assert special == ["<s>", *["<|prompter|>", "</s>", "<|assistant|>", "</s>"] * 2]
    text = "".join(text for *_, text in found).replace("·", " ")
    assert text == "<s> <|prompter|> Is lamp 0 lit?</s><|assistant|> Yes. </s>".replace("<s> ", "<s>") + (
        "<|prompter|> Really?</s><|assistant|> No.</s>"
    )
    documents = next(found for title, found in tokens.items() if title.startswith("s1 First"))
    assert [supervised for supervised, *_ in documents] == [False] + [True] * (len(documents) - 1)


def test_an_overlong_sequence_is_shown_as_epoch_0_reads_it(tmp_path):
    workspace, profile = make_prepared(tmp_path, max_length=44)
    page = workspace.report.read_text(encoding="utf-8")
    plan = plan_epoch(open_shards(workspace.data), profile, epoch=0)
    first, by_hand = {}, {}
    for index in range(plan.rows):
        (piece,) = plan.row(index)
        first.setdefault(piece.source, piece)
        if plan.shards.sources[piece.source].lengths[piece.sequence] > 44:
            by_hand.setdefault(piece.source, piece)
    assert find_overlong(plan) == by_hand
    assert len(by_hand) == 2
    assert by_hand != first
    for number, piece in by_hand.items():
        assert len(read(page).tokens[f"s{number} Longer than max_length"]) == 44
        assert f"holds tokens {piece.begin} to {piece.end - 1}<" in page


def test_text_from_data_can_neither_open_a_tag_nor_turn_the_page_around(tmp_path):
    talks = [Conversation((EVIL, EVIL), EVIL), *TALKS[1:]]
    refused = [{"where": "a<b>\u202e.jsonl:3", "reason": "<script>bad()</script>"}]
    workspace, _ = make_prepared(tmp_path, talks=talks, texts=[EVIL, *TEXTS], refused=refused, max_refused_fraction=0.5)
    page = workspace.report.read_text(encoding="utf-8")
    reader = read(page)
    assert reader.scripts == 1
    assert page.count("<script>") == 1
    assert "alert('x')" not in page.partition("<main>")[0]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", page)
    first = next(found for title, found in reader.tokens.items() if title.startswith("s0 First"))
    text = "".join(part for *_, part in first)
    assert "<script>alert('x')</script>" in text.replace("·", " ")
    assert "U+202E" in text
    seen = [part for _, kind, part in first if kind == "y"]
    assert seen[:7] == ["E2", "80", "AEU+202E", "F0", "9F", "98", "80😀"]
    assert "a&lt;b&gt;U+202E.jsonl:3" in page


def test_refused_records_are_counted_by_reason_and_the_first_are_named(tmp_path):
    refused = [{"where": f"chats.jsonl:{line}", "reason": reason} for line, reason in ((3, "no text"), (9, "bad JSON"))]
    workspace, _ = make_prepared(tmp_path, refused=[*refused, refused[1]], max_refused_fraction=0.5)
    page = re.sub(r"<[^>]+>", " ", workspace.report.read_text(encoding="utf-8"))
    assert re.search(r"3 of 23 records read:", page)
    assert re.search(r"2 +bad JSON +fetch", page)
    assert re.search(r"1 +no text +fetch", page)
    assert re.search(r"chats.jsonl:3 +no text", page)
    assert "No record was refused." in page  # of the other source


def test_what_repeats_is_shown_as_the_ledger_counts_it(tmp_path):
    workspace, _ = make_prepared(tmp_path, talks=[*TALKS, TALKS[3], TALKS[4]])
    found = json.loads(workspace.ledger.read_bytes())["sources"][0]["findings"]["exact"]
    page = re.sub(r"<[^>]+>", " ", workspace.report.read_text(encoding="utf-8"))
    assert found["records"] == 2
    done = {"off": "not checked", "count": "counted, kept", "remove": "removed"}[found["action"]]
    assert re.search(rf"exact duplicates\s+2\s+{found['sequences']}\s+{found['tokens']}\s+{done}", page)


def test_equal_data_gives_equal_bytes_and_nothing_from_outside_is_loaded(made, tmp_path):
    _, _, page = made
    again, _ = make_prepared(tmp_path)
    assert again.report.read_text(encoding="utf-8") == page
    loading = [attrs for tag, attrs in read(page).opened if tag in ("link", "img", "iframe") or "src" in attrs]
    assert len(loading) == 2  # a histogram per source
    assert all(attrs["alt"] and attrs["src"].startswith("data:image/svg+xml;base64,") for attrs in loading)
    dark = [attrs["srcset"] for tag, attrs in read(page).opened if tag == "source"]
    assert len(dark) == 2
    assert all(uri.startswith("data:image/svg+xml;base64,") for uri in dark)
    assert not set(dark) & {attrs["src"] for attrs in loading}
    assert not re.search(r"https?:|url\(|@import", page)


def test_the_random_sample_follows_the_seed(made):
    workspace, profile, _ = made
    shards = open_shards(workspace.data)

    def drawn(seed):
        changed = profile.model_copy(update={"rng_seed": seed})
        return [
            sample.readings[0].piece.sequence
            for sample in choose_samples(0, shards, changed, None)
            if "random" in sample.title.lower()
        ]

    assert drawn(5) == drawn(5)
    assert len({drawn(seed)[0] for seed in range(8)}) > 3


def test_packed_rows_show_their_pieces_and_each_begins_unlearned(tmp_path):
    workspace, profile = make_prepared(tmp_path, layout="packed")
    page = workspace.report.read_text(encoding="utf-8")
    plan = plan_epoch(open_shards(workspace.data), profile, epoch=0)
    most = max(plan.packed, key=len)
    found = read(page).tokens["rows Row with the most pieces"]
    assert len(found) == sum(piece.end - piece.begin for piece in most)
    at = 0
    for piece in most:
        assert not found[at][0]
        assert f"#{piece.sequence}, tokens {piece.begin} to {piece.end - 1}</span>" in page
        at += piece.end - piece.begin


def test_a_padded_report_has_no_packed_rows(made):
    assert "Packed rows" not in made[2]


@pytest.mark.parametrize("document_end", ["masked", "eos"])
def test_an_end_that_is_taught_but_not_stored_is_shown_as_such(tmp_path, document_end):
    workspace, _ = make_prepared(tmp_path, document_end=document_end)
    tokens = read(workspace.report.read_text(encoding="utf-8")).tokens
    ghosts = [text for found in tokens.values() for _, kind, text in found if kind == "g"]
    assert set(ghosts) == ({"</s>"} if document_end == "eos" else set())


def test_a_long_sample_is_shortened_and_says_by_how_much(tmp_path):
    workspace, _ = make_prepared(tmp_path, texts=["sail " * 3000, *TEXTS])
    page = workspace.report.read_text(encoding="utf-8")
    length = int(open_shards(workspace.data).sources[1].lengths[0])
    assert len(read(page).tokens["s1 First, longest"]) == 900
    assert f"{length - 900:,} tokens are not shown" in page


def test_a_source_without_a_sequence_has_a_section_of_its_own(made):
    workspace, profile, _ = made
    shards, none = open_shards(workspace.data), np.empty(0, dtype=np.int64)
    empty = SourceShards("talk", "conversation", Path(), (0,), none.astype(np.int32), none, none)
    ledger = json.loads(workspace.ledger.read_bytes())
    account = json.loads(re.sub(r": \d+", ": 0", json.dumps(ledger["sources"][0])))
    page = Page(
        profile=profile,
        name="tiny",
        shards=Shards((empty,), shards.manifest),
        ledger={"sources": [account], "epochs": []},
        raw={"talk": {}},
        vocabulary=Vocabulary(open_tokenizer(workspace.base)),
    )
    text = render_report(page, [choose_samples(0, page.shards, profile, None)], [])
    read(text)
    assert "No sequence: there is nothing to show." in text


def test_with_many_sources_the_sections_begin_folded(made):
    workspace, profile, _ = made
    shards, ledger = open_shards(workspace.data), json.loads(workspace.ledger.read_bytes())
    page = Page(
        profile=profile,
        name="tiny",
        shards=Shards(shards.sources * 3, shards.manifest),
        ledger={"sources": ledger["sources"] * 3, "epochs": ledger["epochs"]},
        raw=load_manifest(workspace.raw, remedy="")["sources"],
        vocabulary=Vocabulary(open_tokenizer(workspace.base)),
    )
    text = render_report(page, [[]] * 6, [])
    sections = [attrs for tag, attrs in read(text).opened if tag == "details" and attrs.get("class") == "card source"]
    assert len(sections) == 6
    assert not any("open" in attrs for attrs in sections)


@pytest.mark.parametrize("longest", [512, 700])
def test_the_histogram_counts_every_sequence_and_splits_at_max_length(longest):
    lengths = np.random.default_rng(1).integers(1, 3000, size=500).astype(np.int32)
    lengths[:2] = longest, longest + 1
    bins = count_lengths(lengths, longest)
    for part in bins:
        assert part.count == ((lengths >= part.begin) & (lengths <= part.end)).sum()
        assert part.is_over == (part.begin > longest)
    assert sum(part.count for part in bins) == 500
    assert sum(part.count for part in bins if part.is_over) == (lengths > longest).sum()


@pytest.mark.parametrize("longest", [1, 2, 9, 700, 65537])
@pytest.mark.parametrize("max_length", [1, 8, 512, 8192])
def test_bins_hold_every_length(longest, max_length):
    bins = count_lengths(np.array([1, longest], dtype=np.int32), max_length)
    assert bins[0].begin == 1
    assert bins[-1].begin <= longest <= bins[-1].end
    assert all(one.end + 1 == other.begin for one, other in pairwise(bins))
    assert longest <= max_length or any(part.begin == max_length + 1 for part in bins)


def test_the_page_has_the_numbers_of_each_histogram_as_a_table(made):
    workspace, profile, page = made
    for source in open_shards(workspace.data).sources:
        bins = [part for part in count_lengths(source.lengths, profile.max_length) if part.count]
        rows = "".join(f"<td>{part.begin}</td><td>{part.end}</td><td>{part.count}</td>" for part in bins)
        assert rows in re.sub(r"</?tr[^>]*>|\n| class=\"n\"", "", page)


def test_equal_lengths_give_an_equal_picture():
    lengths = np.arange(1, 900, dtype=np.int32)
    assert draw_lengths(lengths, 512) == draw_lengths(lengths, 512)


@pytest.mark.parametrize(("layout", "fraction"), [("padded", 0.5), ("packed", 0.5), ("packed", 2.5)])
def test_the_steps_of_the_ledger_add_up_from_each_equal_sign_to_the_next(tmp_path, layout, fraction):
    workspace, _ = make_prepared(
        tmp_path,
        layout=layout,
        fraction=fraction,
        refused=[{"where": "a:1", "reason": "no text"}],
        max_refused_fraction=0.5,
    )
    for account in json.loads(workspace.ledger.read_bytes())["sources"]:
        repeated = account["epochs"][0].get("repeated_tokens", 0)
        assert (repeated > 0) == (account["name"] == "text" and fraction > 1)
        assert sum(split_tokens(account).values()) == account["tokens"]["all"] + repeated
        steps = list_steps(account)
        for measure in ("count", "tokens"):
            left, unit = None, ""
            for step in steps:
                value = getattr(step, measure)
                if value is None or step.name == "padding":
                    continue
                if measure == "count" and step.name in ("outside the sampled window", "truncated"):
                    continue  # these sequences are read, in part
                if step.sign in ("-", "+"):
                    left += value if step.sign == "+" else -value
                elif left is None or (step.unit != unit and measure == "count"):
                    left, unit = value, step.unit
                else:
                    assert left == value, step
                    left = value


def test_the_ledger_has_a_row_for_each_ignored_key_with_its_records(tmp_path):
    workspace, _ = make_prepared(tmp_path, counted={"ignored_keys": {"meta": 7, "<b>tag": 1}})
    talk, text = json.loads(workspace.ledger.read_bytes())["sources"]
    shown = [(step.name, step.sign, step.count, step.unit) for step in list_steps(talk) if "ignored" in step.name]
    assert shown == [("ignored keys: <b>tag", "of", 1, "records"), ("ignored keys: meta", "of", 7, "records")]
    assert [step.name for step in list_steps(text) if step.sign == "of"] == ["personal data: not looked for"]
    page = re.sub(r"</?small>|</?span[^>]*>", "", workspace.report.read_text())
    assert "of which ignored keys: meta</th>" in page
    assert "ignored keys: &lt;b&gt;tag</th>" in page
    assert {"step": "ignored keys: meta", "count": "7 records"}.items() <= {
        key: value for row in ledger_rows({"sources": [talk]}) if "meta" in row["step"] for key, value in row.items()
    }.items()


def test_members_of_archives_that_were_skipped_are_in_the_ledger_and_named_on_the_page(tmp_path):
    skipped = [{"where": f"a.zip/<{n}>\u202e.png", "reason": "no supported format"} for n in range(3)]
    workspace, _ = make_prepared(
        tmp_path, counted={"skipped_members": {"no supported format": 3}, "first_skipped": skipped}
    )
    talk, text = json.loads(workspace.ledger.read_bytes())["sources"]
    assert talk["records"]["skipped_members"] == {"no supported format": 3}
    assert "skipped_members" not in text["records"]
    page = workspace.report.read_text()
    assert page.count("3 members of archives skipped") == 1
    assert "a.zip/&lt;2&gt;" in page
    assert "\u202e" not in page
