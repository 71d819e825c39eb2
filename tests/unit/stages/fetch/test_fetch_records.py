"""Each kind of rows, read from a record of its published shape; columns mapped by params."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from ropeway.config.sections import FilesSource
from ropeway.models.conversation import Conversation
from ropeway.runtime.errors import DataError
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch.decompress import InputFile
from ropeway.stages.fetch.files import iterate_objects
from ropeway.stages.fetch.records import find_unused, required_columns, to_record
from ropeway.stages.fetch.sources import RefusedRecord, SourceCounts, open_source
from ropeway.stages.fetch.values import UnreadableError

GOOD = [
    (
        "orca_chat",
        {
            "conversation": [{"input": "Hi", "output": "Hello"}, {"input": "Why?", "output": "So."}],
            "instruction": "Be kind.",
        },
        {},
        Conversation(("Hi", "Hello", "Why?", "So."), "Be kind."),
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": "A"},
            ]
        },
        {},
        Conversation(("Q", "A"), "S"),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {},
        Conversation(("Q", "A")),
    ),
    ("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, {}, Conversation(("Add.\n\n1 2", "3"))),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}, {}, Conversation(("Hi", "Hello"))),
    ("text", {"TEXT": "Once upon a time", "meta": 1}, {"text": "TEXT"}, "Once upon a time"),
]


@pytest.mark.parametrize(("rows", "value", "columns", "record"), GOOD)
def test_a_record_of_each_kind_is_read(rows, value, columns, record):
    assert to_record(value, rows, columns) == record


@pytest.mark.parametrize(
    ("rows", "value", "reason"),
    [
        ("messages", {"messages": [{"role": "user", "content": None}]}, "null text"),
        ("messages", {"messages": [{"role": "system", "content": "S"}]}, "no turns"),
        ("messages", {"messages": "Q"}, "turns are not a list"),
        ("alpaca", {"instruction": "Q", "input": "", "output": " "}, "empty turn"),
        ("alpaca", {"instruction": "Q", "input": ""}, "missing column 'output'"),
        ("text", {"text": 7}, "not text"),
        ("text", {"text": "a\0b"}, "NUL"),
        ("text", {"text": "\ud800"}, "lone surrogate"),
        ("text", ["a"], "not an object"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(rows, value, reason):
    with pytest.raises(UnreadableError, match=f"^{reason}$"):
        to_record(value, rows, {})


def test_parquet_gives_whole_rows_and_names_a_column_that_is_missing(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"TEXT": ["one", "two"], "other": [1, 2]}), path)
    assert list(iterate_objects(InputFile.of(path), required_columns("text", {"text": "TEXT"}))) == [
        (f"{path}: row 1", {"TEXT": "one", "other": 1}),
        (f"{path}: row 2", {"TEXT": "two", "other": 2}),
    ]
    with pytest.raises(DataError, match=r"no column \['text'\]; found \['TEXT', 'other'\]"):
        list(iterate_objects(InputFile.of(path), ["text"]))


def test_a_list_of_records_is_read_over_chunk_borders_and_a_cut_one_is_an_error(tmp_path, monkeypatch):
    from ropeway.stages.fetch import values

    monkeypatch.setattr(values, "CHUNK_BYTES", 7)
    path = tmp_path / "a.json"
    records = [{"text": f"ü {number}" * number} for number in range(20)]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    assert [value for _, value in iterate_objects(InputFile.of(path), ["text"])] == records
    path.write_text(json.dumps(records, ensure_ascii=False)[:-1], encoding="utf-8")
    with pytest.raises(DataError, match="after record 20: the file ends early"):
        list(iterate_objects(InputFile.of(path), ["text"]))


QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def said(**fields):
    """A conversation whose answer carries more than its text."""
    return {"messages": [QA[0], {**QA[1], **fields}]}


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
# (what, rows, record, the reason to refuse it; None: it is kept)
CARRYING = [
    ("tool calls", "messages", said(tool_calls=[CALL]), None),
    ("weight 0", "messages", said(weight=0), None),
    ("reasoning", "messages", said(reasoning_content="two and two"), None),
    ("system beside", "messages", {"system": "You are Kai.", "messages": QA}, "unused field 'system'"),
    ("images", "messages", {"messages": QA, "images": ["a.png"]}, "unused field 'images'"),
    ("a name", "messages", said(name="Ann"), None),
    ("false", "messages", said(train=False), "unused field 'train' of a turn"),
    ("tools", "sharegpt", {"conversations": [], "tools": "[]"}, "no turns"),
    (
        "sharegpt system",
        "sharegpt",
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "unused field 'system'",
    ),
    (
        "sharegpt turn",
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "score": 0.5}]},
        "unused field 'score' of a turn",
    ),
    (
        "orca turn",
        "orca_chat",
        {"conversation": [{"input": "q", "output": "a", "score": 1}]},
        "unused field 'score' of a turn",
    ),
    (
        "orca system column",
        "orca_chat",
        {"conversation": [{"input": "q", "output": "a"}], "system": "s"},
        "unused field 'system'",
    ),
    ("alpaca", "alpaca", {"instruction": "q", "output": "a", "text": "q a"}, "unused field 'text'"),
    ("text", "text", {"text": "t", "meta": {"url": "x"}}, "unused field 'meta'"),
    ("weight 1", "messages", said(weight=1), None),
    ("no tool calls", "messages", said(tool_calls=[], function_call=None, refusal="", audio={}), None),
    ("ids", "messages", {"messages": [{**QA[0], "id": "m1"}, QA[1]], "id": 7, "prompt_id": "x", "uuid": "u"}, None),
    ("pandas index", "text", {"text": "t", "__index_level_0__": 3}, None),
    ("nothing more", "messages", {"messages": QA, "images": None, "tools": []}, None),
]


@pytest.mark.parametrize(("rows", "record", "reason"), [row[1:] for row in CARRYING], ids=[row[0] for row in CARRYING])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_field_that_carries_something_is_never_passed_over_in_silence(tmp_path, form, rows, record, reason):
    path = tmp_path / f"a.{form}"
    if form == "jsonl":
        path.write_text(json.dumps(record) + "\n")
    else:
        try:
            parquet.write_table(pa.Table.from_pylist([record]), path)
        except pa.ArrowException:
            pytest.skip("no column has this type")

    def read(*ignored):
        seen = SourceCounts()
        source = FilesSource(
            kind="files", paths=[path.name], rows=rows, columns={}, expected_rows=None, ignored_keys=list(ignored)
        )
        found = list(open_source(source, Workspace(tmp_path, "x"), {"files": {}}, seen))
        assert seen.files == {path.name: 1}
        return found, dict(seen.ignored)

    (found,), counts = read()
    assert not counts
    if reason is None:
        assert not isinstance(found, RefusedRecord)
        return
    assert isinstance(found, RefusedRecord)
    assert found.reason == reason
    if "unused" in reason:
        name = reason.split("'")[1]
        for ignored in ((name,), ("*",)):
            (kept,), counts = read("other", *ignored)
            assert not isinstance(kept, RefusedRecord)
            assert counts == {name: 1}
        assert isinstance(read("other")[0][0], RefusedRecord)


def test_names_that_a_file_chooses_are_counted_up_to_a_limit(tmp_path):
    lines = [json.dumps({"text": "t", f"key-{number}" * 9: number + 1}) for number in range(1500)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    seen = SourceCounts()
    source = FilesSource(
        kind="files", paths=["a.jsonl"], rows="text", columns={}, expected_rows=None, ignored_keys=["*"]
    )
    assert len(list(open_source(source, Workspace(tmp_path, "x"), {"files": {}}, seen))) == 1500
    counts = seen.ignored
    assert len(counts) == 1001
    assert counts.total() == 1500
    assert counts["others"] == 500


def test_a_field_name_that_cannot_be_written_is_counted_by_a_name_that_can():
    found = find_unused({"text": "a", "\ud800key": 1, "b\n\x1b": 2, "c" * 5000: 3}, "text", {})
    assert list(found) == ["\\ud800key", "b\\n\\x1b", "c" * 100 + "…"]
