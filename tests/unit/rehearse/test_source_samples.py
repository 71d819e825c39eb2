"""Samples: a few of the real records in their own columns, generated ones only where the files are elsewhere."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet
from pydantic import TypeAdapter

from ropeway.config.load_params import load_profile
from ropeway.config.sections import FilesSource, Source
from ropeway.rehearse.source_samples import sample_source
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch.sources import RefusedRecord, open_source, source_identity
from tests.support.tiny_run import ROOT
from tests.support.whole_run import CHATS, TEXTS, jsonl


def source(**stated):
    facts = {"kind": "files", "rows": "text", "columns": {}, "expected_rows": None, **stated}
    return TypeAdapter(Source).validate_python(facts)


def take(tmp_path, stated, *, count=5, may_generate=False):
    (tmp_path / "rehearsal").mkdir(exist_ok=True)
    return sample_source("s", stated, tmp_path, tmp_path / "rehearsal", count=count, may_generate=may_generate)


def fetched(tmp_path, sample):
    """Return the records that stage fetch reads of a sample, and the refused ones."""
    workspace = Workspace(tmp_path / "rehearsal", "p")
    stated = FilesSource.model_validate(sample.block)
    records = list(open_source(stated, workspace, source_identity(stated, workspace.root)))
    return [one for one in records if not isinstance(one, RefusedRecord)], [
        one for one in records if isinstance(one, RefusedRecord)
    ]


def test_records_are_taken_from_every_file_and_long_texts_are_cut(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": f"a{number}"} for number in range(90)]))
    table = pa.Table.from_pylist([{"text": "x" * 20_000}, *({"text": f"b{number}"} for number in range(9))])
    parquet.write_table(table, tmp_path / "b.parquet")
    sample = take(tmp_path, source(paths=["a.jsonl", "b.parquet"]))
    records, refused = fetched(tmp_path, sample)
    assert {one[0] for one in records} == {"a", "b", "x"}
    assert (max(map(len, records)), refused, sample.is_generated) == (8000, [], False)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [([{"message": []}] * 9, "missing column 'messages'"), ([{"messages": "hi"}] * 9, "turns are not a list")],
)
def test_a_record_that_fetch_refuses_is_refused_in_the_rehearsal_too(tmp_path, rows, reason):
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows) + b"{bad\n")
    sample = take(tmp_path, source(paths=["a.jsonl"], rows="messages"), count=10)
    assert sample.refused == {reason: 9, "bad JSON": 1}
    assert {one.reason for one in fetched(tmp_path, sample)[1]} == {reason, "bad JSON"}


def test_values_that_json_does_not_have_are_kept_as_parquet(tmp_path):
    parquet.write_table(pa.Table.from_pylist([{"text": "a", "raw": b"\0"}]), tmp_path / "a.parquet")
    sample = take(tmp_path, source(paths=["a.parquet"], ignored_keys=["raw"]))
    assert sample.block["paths"] == ["rehearsed-samples/s.parquet"]
    assert fetched(tmp_path, sample) == (["a"], [])


def test_a_parquet_file_without_the_column_is_refused(tmp_path):
    parquet.write_table(pa.Table.from_pylist(TEXTS[:2]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="TEXT"):
        take(tmp_path, source(paths=["a.parquet"], columns={"text": "TEXT"}))


def test_a_missing_file_is_an_error_where_the_real_run_would_be(tmp_path):
    stated = source(paths=["gone.jsonl"], rows="messages")
    with pytest.raises(ConfigError, match=r"gone\.jsonl"):
        take(tmp_path, stated)
    sample = take(tmp_path, stated, may_generate=True)
    assert sample.is_generated
    assert len(fetched(tmp_path, sample)[0]) == 5


@pytest.mark.parametrize(
    ("name", "form", "column"),
    [("orca-chat", ".json", "conversation"), ("fanfics", ".parquet", "TEXT"), ("red_pajama", ".jsonl", "text")],
)
def test_the_published_sources_are_generated_in_their_format_and_columns(tmp_path, name, form, column, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    stated = load_profile(ROOT / "params.yaml", "llama2_13b_orca_8k")[1].sources[name]
    sample = take(tmp_path, stated, count=6)
    path = tmp_path / "rehearsal" / sample.block["paths"][0]
    rows = {
        ".json": lambda: json.loads(path.read_text()),
        ".jsonl": lambda: [json.loads(line) for line in path.read_text().splitlines()],
        ".parquet": lambda: parquet.read_table(path).to_pylist(),
    }[form]()
    assert (path.suffix, column in rows[0], sample.is_generated) == (form, True, True)
    records, refused = fetched(tmp_path, sample)
    assert (len(records), refused) == (6, [])


@pytest.mark.parametrize("rows", ["orca_chat", "messages", "sharegpt", "prompt_completion", "alpaca", "text"])
def test_every_layout_can_be_generated_in_other_columns(tmp_path, rows):
    columns = {} if rows == "text" else {"system": "sys"}
    sample = take(tmp_path, source(paths=["s3://bucket/x.csv"] if rows == "text" else ["https://host/x.jsonl"],
                                   rows=rows, columns=columns))  # fmt: skip
    records, refused = fetched(tmp_path, sample)
    assert (len(records), refused) == (5, [])
    if rows != "text":
        assert any(one.system for one in records)


def test_files_in_the_hubs_cache_are_read_without_a_request(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "datasets--me--chats"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    (place / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (place / "snapshots" / ("a" * 40) / "chats.jsonl").write_bytes(jsonl(CHATS))
    stated = source(kind="huggingface", repo="me/chats", revision="main", files=["*.jsonl"], rows="messages")
    sample = take(tmp_path, stated)
    assert not sample.is_generated
    assert len(fetched(tmp_path, sample)[0]) == 5
