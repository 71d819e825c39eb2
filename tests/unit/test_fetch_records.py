"""Each kind of rows, read from a record of its published shape; columns mapped by params."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from ropeway.chat import Conversation
from ropeway.errors import DataError
from ropeway.fetch.files import iterate_objects
from ropeway.fetch.records import needed_columns, to_record
from ropeway.fetch.values import UnreadableError

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
        ("messages", {"messages": [{"role": "assistant", "content": "A"}]}, "roles out of order"),
        (
            "messages",
            {"messages": [{"role": "user", "content": "Q"}, {"role": "user", "content": "Q"}]},
            "roles out of order",
        ),
        ("messages", {"messages": [{"role": "user", "content": None}]}, "null text"),
        ("messages", {"messages": [{"role": "system", "content": "S"}]}, "no turns"),
        ("messages", {"messages": "Q"}, "turns are not a list"),
        ("alpaca", {"instruction": "Q", "input": "", "output": " "}, "empty turn"),
        ("alpaca", {"instruction": "Q", "input": ""}, "missing column"),
        ("text", {"text": 7}, "not text"),
        ("text", {"text": "a\0b"}, "NUL"),
        ("text", {"text": "\ud800"}, "lone surrogate"),
        ("text", ["a"], "not an object"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(rows, value, reason):
    with pytest.raises(UnreadableError, match=f"^{reason}$"):
        to_record(value, rows, {})


def test_parquet_gives_the_rows_and_columns_that_are_asked_for(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"TEXT": ["one", "two"], "other": [1, 2]}), path)
    columns = needed_columns("text", {"text": "TEXT"})
    assert list(iterate_objects(path, *columns)) == [
        (f"{path}: row 1", {"TEXT": "one"}),
        (f"{path}: row 2", {"TEXT": "two"}),
    ]
    with pytest.raises(DataError, match=r"no column \['text'\]; found \['TEXT', 'other'\]"):
        list(iterate_objects(path, ["text"], []))


def test_a_list_of_records_is_read_over_chunk_borders_and_a_cut_one_is_an_error(tmp_path, monkeypatch):
    from ropeway.fetch import values

    monkeypatch.setattr(values, "CHUNK_BYTES", 7)
    path = tmp_path / "a.json"
    records = [{"text": f"ü {number}" * number} for number in range(20)]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    assert [value for _, value in iterate_objects(path, ["text"], [])] == records
    path.write_text(json.dumps(records, ensure_ascii=False)[:-1], encoding="utf-8")
    with pytest.raises(DataError, match="after record 20: the file ends early"):
        list(iterate_objects(path, ["text"], []))
