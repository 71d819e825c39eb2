import json
import os
import subprocess
import sys
from typing import get_args

import pytest

from ropeway.config.load_params import load_profile
from ropeway.config.sections import (
    FilesSource,
    HuggingfaceSource,
    PythonDocsSource,
    RowsSource,
)
from ropeway.config.stages import READS
from ropeway.data.raw_records import RawWriter, iterate_records
from ropeway.models.conversation import Conversation
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.manifest import file_sha256, load_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch import local
from ropeway.stages.fetch import stage as fetch
from ropeway.stages.fetch.files import READERS
from ropeway.stages.fetch.formats import check_format
from ropeway.stages.fetch.local import digest_files, find_files
from ropeway.stages.fetch.python_docs import (
    MODULES,
    SYSTEM_MESSAGES,
    iterate_docstrings,
    iterate_topics,
    plan_conversations,
)
from ropeway.stages.fetch.records import ROW_KINDS, check_columns, required_columns, to_record
from ropeway.stages.fetch.sources import KINDS, source_identity
from tests.support.freezing import run_fetch
from tests.support.tiny_run import ROOT

DOCSTRINGS = PythonDocsSource(kind="python_docs", part="docstrings", expected_rows=None)
TOPICS = PythonDocsSource(kind="python_docs", part="topics", expected_rows=None)
_, LAPTOP = load_profile(ROOT / "params.yaml", "laptop")


def profile(**sources):
    return LAPTOP.model_copy(update={"sources": sources}).reading(READS["fetch"])


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("fetch"), "laptop")
    run_fetch(workspace, profile(docstrings=DOCSTRINGS, topics=TOPICS))
    return workspace


def test_the_table_holds_every_record_in_order_and_a_manifest_that_counts_them(fetched):
    manifest = load_manifest(fetched.raw, remedy="")
    talks = list(iterate_records(fetched.raw / "docstrings"))
    texts = list(iterate_records(fetched.raw / "topics"))
    assert talks == list(iterate_docstrings())
    assert texts == list(iterate_topics())
    for name, records in (("docstrings", talks), ("topics", texts)):
        facts = manifest["sources"][name]
        assert facts["read"] == facts["kept"] == len(records) > 0
        assert facts["refused"] == {}
        assert manifest["files"][f"{name}/part-00000.parquet"]["rows"] == len(records)


def test_fetching_twice_gives_the_same_bytes(fetched, tmp_path):
    again = Workspace(tmp_path, "laptop")
    run_fetch(again, profile(docstrings=DOCSTRINGS, topics=TOPICS))
    assert file_sha256(again.raw / "manifest.json") == file_sha256(fetched.raw / "manifest.json")


def test_the_columns_are_those_that_others_read(fetched):
    from pyarrow import parquet

    schema = parquet.read_schema(fetched.raw / "docstrings" / "part-00000.parquet")
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "index": "int64",
        "system": "string",
        "turns": "list<element: string>",
        "form": "string",
    }
    schema = parquet.read_schema(fetched.raw / "topics" / "part-00000.parquet")
    assert {name: str(schema.field(name).type) for name in schema.names} == {"index": "int64", "text": "string"}


def test_docstrings_become_conversations_of_several_turns_under_the_cards_system_messages():
    talks = list(iterate_docstrings())
    card = (ROOT / "tests" / "contract" / "model-card.txt").read_text(encoding="utf-8")
    assert {talk.system for talk in talks} == set(SYSTEM_MESSAGES)
    assert all(message in card for message in SYSTEM_MESSAGES)
    assert "" in SYSTEM_MESSAGES
    assert all(len(talk.turns) % 2 == 0 and all(talk.turns) for talk in talks)
    assert sum(len(talk.turns) >= 6 for talk in talks) > len(talks) / 2


def test_the_library_is_parsed_and_never_imported():
    talked = ["turtle", "tkinter", "argparse", "sched"]
    code = (
        "import sys; from ropeway.stages.fetch.python_docs import iterate_docstrings as i\n"
        f"n = len(list(i(modules=('sched', 'turtle')))); assert n > 20\n"
        f"sys.exit(any(m in sys.modules for m in {talked[:2] + talked[3:]}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_talk_asks_what_how_and_more_of_each_member(tmp_path):
    (tmp_path / "lamp.py").write_text(
        '"""Lamps."""\n\ndef light(wick, *, oil=1):\n    """Light it.\n\n    Mind the draught.\n    """\n\n'
        'def _hidden():\n    """No."""\n\nclass Wick:\n    """A wick."""\n    def trim(self):\n        """Trim it."""\n'
        "    def bare(self): pass\n"
    )
    (tmp_path / "tests").mkdir()
    first, second = iterate_docstrings(tmp_path, modules=("lamp",))
    assert first == Conversation(
        (
            "What does lamp do?",
            "Lamps.",
            "Please explain lamp.light.",
            "Light it.",
            "What are its arguments?",
            "lamp.light(wick, *, oil=1)",
            "What else should I know about it?",
            "Mind the draught.",
        ),
        SYSTEM_MESSAGES[0],
    )
    assert second.turns[::2] == ("Please explain lamp.Wick.", "What is lamp.Wick.trim for?", "Show me its signature.")
    assert second.system == SYSTEM_MESSAGES[1]


def test_test_packages_are_left_out(tmp_path):
    for name in ("pack/__init__.py", "pack/tests/test_x.py", "pack/test/y.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('"""Text."""\n')
    assert [talk.turns[0] for talk in iterate_docstrings(tmp_path, modules=("pack",))] == ["What does pack do?"]


def test_no_module_of_the_list_is_missing_or_silent():
    for module in MODULES:
        assert list(iterate_docstrings(modules=(module,))), module


def test_a_module_without_docstrings_gives_no_talk():
    assert plan_conversations("x = 1\ndef f(): pass\n", "m") == []


def test_more_refused_records_than_allowed_end_the_fetch_and_leave_no_table(tmp_path, monkeypatch):
    records = [Conversation(("q", "a")), *[fetch.RefusedRecord(f"x.jsonl:{n}", "not JSON") for n in range(3)]]
    monkeypatch.setattr(fetch, "open_source", lambda *_: iter(records))
    workspace = Workspace(tmp_path, "laptop")
    with pytest.raises(
        DataError, match=r"(?s)source docstrings: 3 of 4 records refused.*not JSON: 3 records, first x.jsonl:0"
    ):
        run_fetch(workspace, profile(docstrings=DOCSTRINGS))
    assert not workspace.raw.exists()


def test_few_refused_records_are_counted_and_the_first_are_shown(tmp_path, monkeypatch):
    records = [*[Conversation(("q", "a"))] * 99, fetch.RefusedRecord("x.jsonl:100", "not JSON")]
    monkeypatch.setattr(fetch, "open_source", lambda *_: iter(records))
    workspace = Workspace(tmp_path, "laptop")
    run_fetch(workspace, profile(docstrings=DOCSTRINGS))
    facts = json.loads((workspace.raw / "manifest.json").read_bytes())["sources"]["docstrings"]
    assert (facts["read"], facts["kept"], facts["refused"]) == (100, 99, {"not JSON": 1})
    assert facts["first_refused"] == [{"where": "x.jsonl:100", "reason": "not JSON"}]


def test_a_long_source_is_cut_into_parts_that_read_back_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("ropeway.data.raw_records.PART_CHARACTERS", 100)
    monkeypatch.setattr("ropeway.data.raw_records._ROW_GROUP_CHARACTERS", 30)
    texts = [f"{number:010}" for number in range(57)]
    with RawWriter(tmp_path / "s", "document") as writer:
        for text in texts:
            writer.add(text)
    assert len(writer.parts) > 3
    assert sum(writer.parts.values()) == 57
    assert list(iterate_records(tmp_path / "s")) == texts


def test_an_empty_source_is_one_empty_part(tmp_path):
    with RawWriter(tmp_path / "s", "conversation") as writer:
        pass
    assert writer.parts == {"part-00000.parquet": 0}
    assert list(iterate_records(tmp_path / "s")) == []


def test_identities_are_the_python_version_the_files_and_the_commit(tmp_path):
    assert source_identity(TOPICS, tmp_path)["python"] == ".".join(map(str, sys.version_info[:3]))
    (tmp_path / "a.jsonl").write_text("1")
    files = FilesSource(kind="files", paths=["*.jsonl"], rows="text", columns={}, expected_rows=None)
    before = source_identity(files, tmp_path)
    assert list(before["files"]) == ["a.jsonl"]
    (tmp_path / "b.jsonl").write_text("2")
    assert source_identity(files, tmp_path) != before
    hub = HuggingfaceSource(
        kind="huggingface", repo="r", revision="a" * 40, files=["x"], rows="text", columns={}, expected_rows=None
    )
    assert source_identity(hub, tmp_path)["commit"] == "a" * 40


def test_the_published_sources_map_the_columns_that_their_publishers_use():
    _, published = load_profile(ROOT / "params.yaml", "llama2_13b_orca_8k")
    found = {}
    for name, source in published.sources.items():
        check_columns(source.rows, source.columns)
        found[name] = required_columns(source.rows, source.columns)
    assert found == {"orca-chat": ["conversation"], "fanfics": ["TEXT"], "red_pajama": ["text"]}
    record = {"conversation": [{"input": "q", "output": "a"}], "instruction": "s"}
    orca = published.sources["orca-chat"]
    assert to_record(record, orca.rows, orca.columns) == Conversation(("q", "a"), "s")


def test_a_file_is_hashed_again_only_when_it_may_have_changed(tmp_path, monkeypatch):
    path, cache = tmp_path / "a.jsonl", tmp_path / "sha256.json"
    hashed = []
    monkeypatch.setattr(local, "file_sha256", lambda path: hashed.append(path) or file_sha256(path))
    path.write_text("1")
    first = digest_files({"a": path}, cache)
    assert digest_files({"a": path}, cache) == first
    assert len(hashed) == 2  # touched just now: its clock could not tell
    monkeypatch.setattr(local, "_TICK_NS", 0)
    assert digest_files({"a": path}, cache) == digest_files({"a": path}, cache) == first
    assert len(hashed) == 3
    os.utime(path, ns=(1, path.stat().st_mtime_ns))
    path.write_text("2")
    assert digest_files({"a": path}, cache)["a"] == file_sha256(path) != first["a"]
    for broken in ("{", "[]", json.dumps({str(path): 3}), json.dumps({str(path): [[]]})):
        cache.write_text(broken)
        assert digest_files({"a": path}, cache)["a"] == file_sha256(path)


def test_a_pattern_that_names_no_file_is_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"'new/.*jsonl' matches no file"):
        find_files(["new/*.jsonl"], tmp_path)


def test_asking_for_an_identity_imports_nothing_heavy():
    code = (
        "import sys, ropeway.stages.fetch.sources\n"
        "heavy = ('pyarrow', 'torch', 'transformers', 'numpy', 'huggingface_hub')\n"
        "sys.exit(any(name in sys.modules for name in heavy))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_registries_hold_what_params_may_name():
    sections = (HuggingfaceSource, FilesSource, PythonDocsSource)
    assert set(KINDS) == {kind for one in sections for kind in get_args(one.model_fields["kind"].annotation)}
    assert set(ROW_KINDS) == set(get_args(RowsSource.model_fields["rows"].annotation))
    assert all(check_format(f"a{ending}") == ending for ending in READERS)


@pytest.mark.parametrize("name", ROW_KINDS)
def test_a_row_kind_says_of_what_kind_its_records_are(name):
    kind = ROW_KINDS[name]
    pair = dict.fromkeys(kind.turn_fields, "q")
    turns = [{**pair, "role": "user", "from": "human"}, {**pair, "role": "assistant", "from": "gpt"}]
    record = to_record(dict.fromkeys(kind.required, turns if kind.turn_fields else "a"), name, {})
    assert isinstance(record, str if kind.record_kind == "document" else Conversation)
