"""Records of unusual_records.jsonl, one a line: the exact record that each becomes, or why it is refused."""

import json
from pathlib import Path

import pytest

from ropeway.models.conversation import Conversation
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch.sources import RefusedRecord, open_source
from tests.support.fetching import files_source

CASES = [
    json.loads(line)
    for line in Path(__file__).with_name("unusual_records.jsonl").read_text(encoding="utf-8").split("\n")
    if line
]


def expected_of(case):
    if "refused" in case:
        return RefusedRecord("a.jsonl:1", case["refused"])
    if "messages" in case:
        return Conversation.from_messages(case["messages"], case.get("tools", ()))
    return case["text"] if "text" in case else Conversation(tuple(case["turns"]), case.get("system", ""))


@pytest.mark.parametrize("case", CASES, ids=[case["what"] for case in CASES])
def test_an_unusual_record_becomes_what_the_table_says(tmp_path, case):
    (tmp_path / "a.jsonl").write_text(case["line"] + "\n", encoding="utf-8", newline="")
    source = files_source("a.jsonl", rows=case["rows"], columns=case.get("columns"), ignored=case.get("ignored", ()))
    (found,) = open_source(source, Workspace(tmp_path, "x"), {"files": {}})
    assert described(found) == described(expected_of(case))


def described(record):
    """A chat's messages, tools and supervised answers; their fields have no order."""
    if not isinstance(record, Conversation):
        return record
    return record.to_messages(), record.read_form().get("tools"), record.supervised_messages()


def test_the_table_has_every_kind_of_rows_and_each_case_once():
    assert {case["rows"] for case in CASES} == {
        "messages", "sharegpt", "prompt_completion", "alpaca", "orca_chat", "text",
    }  # fmt: skip
    keys = {json.dumps([case.get(key) for key in ("rows", "line", "columns", "ignored")]) for case in CASES}
    assert len({case["what"] for case in CASES}) == len(keys) == len(CASES) >= 60
