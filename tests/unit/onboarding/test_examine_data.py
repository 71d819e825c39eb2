import gzip
import json
import zipfile

import pytest

from ropeway.onboarding.examine_data import MOST_RECORDS, examine_data
from ropeway.runtime.errors import RopewayError

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
SAID = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(name, *records):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
        return name

    return make


@pytest.mark.parametrize(
    ("record", "rows", "columns", "kind"),
    [
        ({"messages": [HI, HELLO]}, "messages", {}, "conversation"),
        ({"chat": [HI, HELLO]}, "messages", {"messages": "chat"}, "conversation"),
        ({"conversations": SAID}, "sharegpt", {}, "conversation"),
        ({"dialog": SAID}, "sharegpt", {"conversations": "dialog"}, "conversation"),
        ({"conversation": [{"input": "Hi", "output": "Hello"}]}, "orca_chat", {}, "conversation"),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt_completion", {}, "conversation"),
        ({"Question": "Hi", "answer": "Hello"}, "prompt_completion", {"prompt": "Question", "completion": "answer"},
         "conversation"),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "alpaca", {}, "conversation"),
        ({"text": "A text."}, "text", {}, "document"),
        ({"body": "A text.", "url": "x"}, "text", {"text": "body"}, "document"),
        ({"anything": "A text."}, "text", {"text": "anything"}, "document"),
    ],
)  # fmt: skip
def test_the_layout_is_that_of_the_first_record(write, tmp_path, record, rows, columns, kind):
    found = examine_data(write("my data.jsonl", record, record), tmp_path)
    assert (found.source["rows"], found.source["columns"], found.kind) == (rows, columns, kind)
    assert (found.name, found.read, len(found.records), found.is_complete) == ("my_data", 2, 2, True)
    assert found.source["paths"] == ["my data.jsonl"]


def test_fields_that_are_not_read_are_named_and_counted(write, tmp_path):
    path = write("a.jsonl", {"messages": [HI, HELLO], "topic": "x"}, {"messages": [HI, HELLO], "source": "y", "id": 3})
    found = examine_data(path, tmp_path)
    assert found.ignored == {"source": 1, "topic": 1}
    assert found.source["ignored_keys"] == ["source", "topic"]


def test_refused_records_are_counted_by_reason(write, tmp_path):
    path = write("a.jsonl", {"messages": [HI, HELLO]}, {"messages": [HI, HELLO]}, {"messages": [{"role": "x"}]}, {})
    found = examine_data(path, tmp_path)
    assert (found.read, len(found.records), sum(found.refused.values())) == (4, 2, 2)


def test_tools_and_reasoning_are_seen(write, tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [HI, {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]}]
    found = examine_data(write("a.jsonl", {"messages": messages}), tmp_path)
    assert found.has_tools
    assert found.has_reasoning
    assert found.roles == {"user": 1, "assistant": 1}
    plain = examine_data(write("b.jsonl", {"messages": [HI, HELLO]}), tmp_path)
    assert not plain.has_tools
    assert not plain.has_reasoning


def test_a_folder_of_documents_and_one_of_records(write, tmp_path):
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    for name in ("a.md", "deep/b.md", "c.txt"):
        (tmp_path / "notes" / name).write_text("# A note")
    (tmp_path / "notes" / "picture.png").write_bytes(b"\x89PNG")
    found = examine_data("notes", tmp_path)
    assert found.source["paths"] == ["notes/**/*.md", "notes/**/*.txt"]
    assert (found.source["rows"], len(found.records), found.not_read) == ("text", 3, {".png": 1})
    write("chats/x.jsonl", {"messages": [HI, HELLO]})
    (tmp_path / "chats" / "README.md").write_text("# About")
    assert examine_data("chats/", tmp_path).source["paths"] == ["chats/**/*.jsonl"]


def test_compressed_files_archives_and_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = json.dumps({"messages": [HI, HELLO]}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line * 3))
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("x/c.jsonl", line * 2)
    (tmp_path / "d.csv").write_text("question,answer,notes\nHi,Hello,x\n")
    assert examine_data("a.jsonl.gz", tmp_path).read == 3
    assert examine_data("b.zip", tmp_path).source["rows"] == "messages"
    table = examine_data("d.csv", tmp_path)
    assert table.source["columns"] == {"prompt": "question", "completion": "answer"}
    assert table.source["ignored_keys"] == ["notes"]


def test_brackets_and_stars_in_names_are_no_pattern(tmp_path):
    folder = tmp_path / "a [draft]"
    folder.mkdir()
    path = folder / "c[1]*.jsonl"
    path.write_text(json.dumps({"text": "A text."}) + "\n")
    (folder / "c1.jsonl").write_text(json.dumps({"text": "Another."}) + "\n")
    assert examine_data(str(path), tmp_path, frozenset()).read == 1
    assert examine_data(str(folder), tmp_path, frozenset()).read == 2
    assert examine_data(str(folder)[:-8] + "*/c[12].jsonl", tmp_path, frozenset()).read == 1


def test_of_a_large_file_the_first_records_are_read(write, tmp_path):
    path = write("a.jsonl", *[{"text": f"Text {number}."} for number in range(MOST_RECORDS + 1)])
    found = examine_data(path, tmp_path)
    assert (found.read, found.is_complete) == (MOST_RECORDS, False)


def test_names_of_sources_differ(write, tmp_path):
    path = write("x/a.jsonl", {"text": "A text."})
    assert examine_data(path, tmp_path, frozenset({"a", "a_2"})).name == "a_3"
    long = examine_data(write(f"{'b' * 100}.jsonl", {"text": "A text."}), tmp_path, frozenset({"b" * 60})).name
    assert long == "b" * 60 + "_2"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda write, _: write("a.jsonl", {"a": 1, "b": [2]}), 'the fields "a", "b"'),
        (
            lambda write, _: write("a.jsonl", {"messages": [{"role": "User", "content": "Hi"}], "ticket": "T1"}),
            "'User'",
        ),
        (lambda write, _: write("a.jsonl", {"foo": 1, "bar": "x"}), 'the fields "foo", "bar"'),
        (lambda write, _: write("a.jsonl", {"chosen": [HI, HELLO], "rejected": [HI, HELLO]}), "preferences"),
        (lambda _, root: (root / "a.csv").write_text("prompt;completion\na;b\n") and "a.csv", "no layout"),
        (lambda _, root: (root / "empty").mkdir() or "empty", "found no files"),
        (lambda _, __: "nothing.jsonl", "no such file or folder"),
        (lambda _, __: "https://example.org/a.jsonl", "addresses are not looked at"),
        (lambda write, _: write("a.xlsx", {"text": "x"}), "export its table"),
        (lambda write, _: write("a.jsonl"), "0 records"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(write, tmp_path, make, says):
    with pytest.raises(RopewayError, match=says):
        examine_data(make(write, tmp_path), tmp_path)


def test_a_first_record_that_lacks_a_value_does_not_choose_the_layout(write, tmp_path):
    good = [{"question": f"{number}?", "answer": "Yes."} for number in range(20)]
    found = examine_data(write("a.jsonl", {"question": None, "answer": "x"}, *good), tmp_path)
    assert found.source["rows"] == "prompt_completion"
    assert (len(found.records), sum(found.refused.values())) == (20, 1)


def test_a_file_of_another_kind_in_a_folder_is_no_silent_end(write, tmp_path):
    write("d/0.jsonl", {"messages": [HI, HELLO]})
    (tmp_path / "d" / "1.csv").write_text("id,label\n1,x\n")
    write("d/2.jsonl", {"messages": [HI, HELLO]})
    with pytest.raises(RopewayError, match=r"1\.csv"):
        examine_data("d", tmp_path)
