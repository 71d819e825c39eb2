import json

import pytest

from ropeway.errors import DataError
from ropeway.fetch import Refused, open_source
from ropeway.fetch.records import to_record
from ropeway.fetch.values import UnreadableError
from ropeway.params import FilesSource
from ropeway.workspace import Workspace
from tests.support.archives import gz

ORCA = {"conversation": [{"input": "q", "output": "a"}], "instruction": "s"}


def read(root, name, data, rows="text"):
    (root / name).write_bytes(data)
    source = FilesSource(kind="files", paths=[name], rows=rows, columns={}, expected_rows=None)
    return list(open_source(source, Workspace(root, "tiny"), {"files": {}}))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_records_of_every_json_shape_are_read(tmp_path, name):
    data = json.dumps(ORCA if name == "a.jsonl" else [ORCA, ORCA]).encode()
    talks = read(tmp_path, name, gz(data) if name.endswith("gz") else data, "orca_chat")
    assert {(talk.system, talk.turns) for talk in talks} == {("s", ("q", "a"))}
    assert len(talks) == (1 if name == "a.jsonl" else 2)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "bad JSON"),
        (b'"x"', "not an object"),
        (b"{}", "missing column"),
        (b'{"text": null}', "null text"),
        (b'{"text": 3}', "not text"),
        (b'{"text": "\xff"}', "bad UTF-8"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": "\\u0000"}', "NUL"),
        (b'{"text": "a", "text": "b"}', "duplicate keys"),
    ],
)
def test_a_bad_line_is_refused_with_its_reason_and_place(tmp_path, line, reason):
    assert read(tmp_path, "a.jsonl", b'{"text": "ok"}\n' + line) == ["ok", Refused("a.jsonl:2", reason)]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [([], "no turns"), ([("gpt", "a")], "roles out of order"), ([("human", " ")], "empty turn")],
)
def test_a_bad_conversation_is_refused(turns, reason):
    value = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    with pytest.raises(UnreadableError, match=reason):
        to_record(value, "sharegpt", {})


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b""),
        ("a.json", b"[]"),
        ("a.json", b'[{"text": "a"}'),
        ("a.jsonl.gz", gz(b'{"text": "a"}')[:-4]),
        ("a.parquet", b"PAR1"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(tmp_path, name, data):
    with pytest.raises(DataError, match=name):
        read(tmp_path, name, data)
