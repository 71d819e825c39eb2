import json

import pytest

from ropeway.config.load_params import load_profile
from ropeway.config.sections import FilesSource
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.manifest import load_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch.formats import check_format
from ropeway.stages.fetch.records import to_record
from ropeway.stages.fetch.sources import RefusedRecord, open_source, source_identity
from ropeway.stages.fetch.values import UnreadableError
from tests.support.archives import gz
from tests.support.freezing import run_fetch
from tests.support.tiny_run import ROOT

_, LAPTOP = load_profile(ROOT / "params.yaml", "laptop")
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
        (b"{}", "missing column 'text'"),
        (b'{"text": null}', "null text"),
        (b'{"text": 3}', "not text"),
        (b'{"text": "\xff"}', "bad UTF-8"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": "\\u0000"}', "NUL"),
        (b'{"text": "a", "text": "b"}', "duplicate keys"),
    ],
)
def test_a_bad_line_is_refused_with_its_reason_and_place(tmp_path, line, reason):
    assert read(tmp_path, "a.jsonl", b'{"text": "ok"}\n' + line) == ["ok", RefusedRecord("a.jsonl:2", reason)]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [([], "no turns"), ([("gpt", "a"), ("human", "q")], "turn without an answer"), ([("human", " ")], "empty turn")],
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


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.xlsx", "export its table"),
        ("a.xlsx.gz", "export its table"),
        ("a.feather", "write it as parquet"),
        ("a.7z", "extract it"),
        ("a.jsonl.rar", "extract it"),
        ("a.JSONL", "rename the suffix to lower case"),
        ("a.ZIP", "rename the suffix to lower case"),
        ("a.parquet.gz", "decompress the file"),
        ("data-00000.arrow.zst", "decompress the file"),
        ("a.zip.gz", "decompress the file"),
        ("a.dat", "if it has one of these formats, rename it"),
    ],
)
def test_a_name_of_another_format_says_what_to_do_with_what_is_in_it(name, advice):
    with pytest.raises(ConfigError) as caught:
        check_format(name)
    assert advice in str(caught.value)
    assert ("rename" in str(caught.value)) == ("rename" in advice)


NAMES = ("train-00000.jsonl", "test-00000.jsonl", "validation.jsonl")


@pytest.mark.parametrize(
    ("names", "splits", "refused"),
    [
        (NAMES, [], True),
        (NAMES, ["train", "test", "validation"], False),
        (NAMES, ["train", "test"], True),
        (("train-1.jsonl", "train-2.jsonl"), [], False),
        (("train-1.jsonl", "more.jsonl"), [], False),
        (("talks.jsonl", "test.jsonl"), [], True),
        (("talks.jsonl", "test.jsonl"), ["test"], False),
        (("test-1.jsonl", "test-2.jsonl"), [], False),  # naming the test split is explicit
        (("a.jsonl", "latest.jsonl", "contest.jsonl"), [], False),
        (("train/a.jsonl", "dev/a.jsonl"), [], True),
    ],
)
def test_a_pattern_over_several_splits_is_refused_unless_params_name_them(tmp_path, names, splits, refused):
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text('{"text": "a"}\n')
    source = FilesSource(
        kind="files", paths=["data/**/*.jsonl"], rows="text", columns={}, expected_rows=None, splits=splits
    )
    if not refused:
        assert set(source_identity(source, tmp_path)["files"]) == {f"data/{name}" for name in names}
        return
    with pytest.raises(ConfigError, match=r"'data/\*\*/\*.jsonl' matches files of several splits .*`splits: \["):
        source_identity(source, tmp_path)
    named = source.model_copy(update={"paths": [f"data/{name}" for name in names]})
    assert len(source_identity(named, tmp_path)["files"]) == len(names)  # each named by itself


def test_the_files_that_were_read_are_told_with_their_records_and_stand_in_the_manifest(tmp_path, capsys):
    for number in range(12):
        (tmp_path / f"part-{number:02d}.jsonl").write_text('{"text": "a"}\n' * (number + 1) + "{}\n")
    source = FilesSource(kind="files", paths=["part-*.jsonl"], rows="text", columns={}, expected_rows=None)
    profile = LAPTOP.model_copy(update={"sources": {"s": source}, "max_refused_fraction": 0.5})
    workspace = Workspace(tmp_path, "laptop")
    run_fetch(workspace, profile)
    facts = load_manifest(workspace.raw, remedy="")["sources"]["s"]
    assert facts["files"] == {f"part-{number:02d}.jsonl": number + 2 for number in range(12)}
    printed = capsys.readouterr().out
    assert "s: 90 records read, 78 documents kept, 12 refused (missing column 'text': 12)" in printed
    assert "s: part-00.jsonl: 2 records" in printed
    assert "s: 2 more files; ledger.json lists them" in printed
