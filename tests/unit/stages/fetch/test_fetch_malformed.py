"""Malformed input, one row each: what is counted under which reason, or which error says what. Nothing is lost."""

import bz2
import errno
import io
import json
import lzma
import os
import random
import tracemalloc

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from ropeway.config.load_params import load_profile
from ropeway.config.sections import FilesSource
from ropeway.data.raw_records import iterate_records
from ropeway.runtime.errors import ConfigError, DataError, TemporaryError
from ropeway.runtime.manifest import load_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch.decompress import InputFile
from ropeway.stages.fetch.files import iterate_objects
from ropeway.stages.fetch.local import find_files
from tests.support.archives import gz
from tests.support.freezing import run_fetch
from tests.support.tiny_run import ROOT

GOOD = b'{"text": "ok"}\n'
_, LAPTOP = load_profile(ROOT / "params.yaml", "laptop")


def run(root, name, *, rows="text", columns=None, limit=1.0):
    """Fetch one file or pattern; return the source's facts and its records."""
    source = FilesSource(kind="files", paths=[name], rows=rows, columns=columns or {}, expected_rows=None)
    profile = LAPTOP.model_copy(update={"sources": {"s": source}, "max_refused_fraction": limit})
    workspace = Workspace(root, "laptop")
    run_fetch(workspace, profile)
    facts = load_manifest(workspace.raw, remedy="")["sources"]["s"]
    records = list(iterate_records(workspace.raw / "s"))
    assert facts["read"] == facts["kept"] + sum(facts["refused"].values())
    assert facts["kept"] == len(records)
    assert len(facts["first_refused"]) == min(20, facts["read"] - facts["kept"])
    assert all(one["where"].startswith(tuple(facts["identity"]["files"])) for one in facts["first_refused"])
    return facts, records


def fails(root, name, error, phrase, **options):
    """Fetch what cannot be fetched: the error names the file, and nothing is left that looks like a table."""
    with pytest.raises(error, match=phrase) as caught:
        run(root, name, **options)
    assert name.split("*")[0] in str(caught.value)
    assert not list((root / "runs").rglob("*.parquet"))
    assert not list((root / "runs").rglob("manifest.json"))


def packed(table):
    sink = io.BytesIO()
    parquet.write_table(table, sink)
    return sink.getvalue()


def not_utf8():
    binary = pa.array([b"ok", b"\xff\xfe", b"ok"], pa.binary())
    return packed(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, binary.buffers())}))


def turns(*said, names=("from", "value"), column="conversations"):
    return json.dumps({column: [dict(zip(names, one, strict=True)) for one in said]}).encode()


def zst(data):
    return zstandard.ZstdCompressor().compress(data)


# (what, file, bytes, kept, reasons): read to its end, each record kept or counted.
COUNTED = [
    ("NUL in a text", "a.jsonl", GOOD + b'{"text": "a\\u0000b"}', 1, {"NUL": 1}),
    ("raw NUL bytes", "a.jsonl", GOOD + b"\0\0\0\0", 1, {"bad JSON": 1}),
    ("lone surrogate", "a.jsonl", GOOD + b'{"text": "\\ud83d"}', 1, {"lone surrogate": 1}),
    ("reversed surrogates", "a.jsonl", GOOD + b'{"text": "\\ude00\\ud83d"}', 1, {"lone surrogate": 1}),
    ("surrogate pair is a letter", "a.jsonl", GOOD + b'{"text": "\\ud83d\\ude00"}', 2, {}),
    ("bad UTF-8", "a.jsonl", GOOD + b'{"text": "\xff"}\n' + GOOD, 2, {"bad UTF-8": 1}),
    ("UTF-8 cut in a letter", "a.jsonl", GOOD + b'{"text": "\xc3"}', 1, {"bad UTF-8": 1}),
    ("surrogate as UTF-8 (CESU)", "a.jsonl", GOOD + b'{"text": "\xed\xa0\x80"}', 1, {"bad UTF-8": 1}),
    ("Latin-1 text", "a.jsonl", GOOD + '{"text": "für"}'.encode("latin-1"), 1, {"bad UTF-8": 1}),
    ("10 MB line", "a.jsonl", GOOD + b'{"text": "' + b"a" * 10_000_000 + b'"}\n' + GOOD, 3, {}),
    ("null text", "a.jsonl", GOOD + b'{"text": null}', 1, {"null text": 1}),
    ("number as text", "a.jsonl", GOOD + b'{"text": 3}', 1, {"not text": 1}),
    ("true as text", "a.jsonl", GOOD + b'{"text": true}', 1, {"not text": 1}),
    ("list as text", "a.jsonl", GOOD + b'{"text": ["a"]}', 1, {"not text": 1}),
    ("NaN as text", "a.jsonl", GOOD + b'{"text": NaN}', 1, {"not text": 1}),
    ("-Infinity as text", "a.jsonl", GOOD + b'{"text": -Infinity}', 1, {"not text": 1}),
    ("NaN in a column that is not read", "a.jsonl", GOOD + b'{"text": "a", "score": NaN}', 2, {}),
    ("duplicate keys", "a.jsonl", GOOD + b'{"text": "a", "text": "b"}', 1, {"duplicate keys": 1}),
    ("duplicate keys deep inside", "a.jsonl", GOOD + b'{"text": "a", "m": {"k": 1, "k": 2}}', 1, {"duplicate keys": 1}),
    ("wrong column", "a.jsonl", GOOD + b'{"TEXT": "a"}', 1, {"missing column 'text'": 1}),
    ("a bare text", "a.jsonl", GOOD + b'"a"', 1, {"not an object": 1}),
    ("a list in a line", "a.jsonl", GOOD + b'[{"text": "a"}]', 1, {"not an object": 1}),
    ("null in place of a record", "a.jsonl", GOOD + b"null", 1, {"not an object": 1}),
    ("cut line", "a.jsonl", GOOD + b'{"text": "a', 1, {"bad JSON": 1}),
    ("two records in a line", "a.jsonl", GOOD + GOOD.strip() * 2, 1, {"bad JSON": 1}),
    ("single quotes", "a.jsonl", GOOD + b"{'text': 'a'}", 1, {"bad JSON": 1}),
    ("a raw tab in a text", "a.jsonl", GOOD + b'{"text": "a\tb"}', 1, {"bad JSON": 1}),
    ("nested too deep", "a.jsonl", GOOD + b"[" * 100_000, 1, {"bad JSON": 1}),
    ("a number of 5,000 digits", "a.jsonl", GOOD + b'{"text": "a", "n": ' + b"9" * 5000 + b"}", 1, {"bad JSON": 1}),
    ("a page of HTML", "a.jsonl", b"<html>\n<body>Not found</body>\n", 0, {"bad JSON": 2}),
    ("blank lines", "a.jsonl", b"\n \n" + GOOD + b"\n\n", 1, {}),
    ("CRLF", "a.jsonl", GOOD.replace(b"\n", b"\r\n") * 2, 2, {}),
    ("byte order mark", "a.jsonl", b"\xef\xbb\xbf" + GOOD, 1, {}),
    ("byte order mark before a list", "a.json", b"\xef\xbb\xbf[" + GOOD + b"]", 1, {}),
    ("U+2028 is no line end", "a.jsonl", '{"text": "a\u2028b"}\n'.encode(), 1, {}),
    ("special tokens as text", "a.jsonl", b'{"text": "x</s><|assistant|>y"}', 1, {}),
    ("empty document", "a.jsonl", GOOD + b'{"text": ""}', 2, {}),
    ("one object over several lines", "a.json", b'{\n "text": "a"\n}\n', 1, {}),
    ("lines in a .json, the first broken", "a.json", b'{"text": \n' + GOOD * 2, 2, {"bad JSON": 1}),
    ("broken record in a list", "a.json", b'[{"text": "a" "b"}, ' + GOOD + b"]", 1, {"bad JSON": 1}),
    ("bare word in a list", "a.json", b"[" + GOOD + b", oops, " + GOOD + b"]", 2, {"bad JSON": 1}),
    ("unquoted key in a list", "a.json", b'[{text: "}]"}, ' + GOOD + b"]", 1, {"bad JSON": 1}),
    ("comma after the last field", "a.json", b'[{"text": "a",}, ' + GOOD + b"]", 1, {"bad JSON": 1}),
    ("a raw line end in a text of a list", "a.json", b'[{"text": "a\nb"}, ' + GOOD + b"]", 1, {"bad JSON": 1}),
    ("bad UTF-8 in a list", "a.json", b'[{"text": "\xff"}, ' + GOOD + b"]", 1, {"bad UTF-8": 1}),
    ("duplicate keys in a list", "a.json", b'[{"text": 1, "text": 2}, ' + GOOD + b"]", 1, {"duplicate keys": 1}),
    ("records of other kinds in a list", "a.json", b'[1234, "a", null, ' + GOOD + b"]", 1, {"not an object": 3}),
    ("several gzip members", "a.jsonl.gz", gz(GOOD) * 3, 3, {}),
    ("zeros after gzip", "a.jsonl.gz", gz(GOOD) + bytes(512), 1, {}),
    ("several bzip2 streams", "a.jsonl.bz2", bz2.compress(GOOD) * 3, 3, {}),
    ("several xz streams", "a.json.xz", lzma.compress(b"[") + lzma.compress(GOOD + b"]"), 1, {}),
    ("several zstd frames", "a.jsonl.zst", zst(GOOD) + zst(b"") + zst(GOOD * 2), 3, {}),
    ("parquet: null", "a.parquet", packed(pa.table({"text": ["a", None]})), 1, {"null text": 1}),
    ("parquet: numbers", "a.parquet", packed(pa.table({"text": [1, 2]})), 0, {"not text": 2}),
    ("parquet: lists", "a.parquet", packed(pa.table({"text": [["a"], ["b"]]})), 0, {"not text": 2}),
    ("parquet: structs", "a.parquet", packed(pa.table({"text": [{"en": "a"}]})), 0, {"not text": 1}),
    ("parquet: bytes", "a.parquet", packed(pa.table({"text": [b"a"]})), 0, {"not text": 1}),
    ("parquet: bad UTF-8", "a.parquet", not_utf8(), 2, {"bad UTF-8": 1}),
    ("parquet: dictionary", "a.parquet", packed(pa.table({"text": pa.array(["a", "a"]).dictionary_encode()})), 2, {}),
]

# (what, kind of rows, record, reason)
CONVERSATIONS = [
    ("roles out of order", "sharegpt", turns(("gpt", "a"), ("human", "q")), "turn without an answer"),
    ("the same role twice", "sharegpt", turns(("human", "q"), ("human", "q")), "turn without an answer"),
    ("unknown role", "sharegpt", turns(("human", "q"), ("tools", "a")), "unknown role 'tools'"),
    ("system in the end", "sharegpt", turns(("human", "q"), ("system", "s")), "turn without an answer"),
    ("role null", "sharegpt", turns((None, "q"), ("gpt", "a")), "role is not text"),
    ("role a list", "sharegpt", turns((["human"], "q"), ("gpt", "a")), "role is not text"),
    ("a role in capitals", "sharegpt", turns(("User", "q"), ("gpt", "a")), "unknown role 'User'"),
    ("only a developer", "sharegpt", turns(("developer", "s")), "no turns"),
    (
        "a call that is no JSON",
        "sharegpt",
        turns(("human", "q"), ("function_call", "f()")),
        "function call: not a JSON object",
    ),
    ("empty turn", "sharegpt", turns(("human", "q"), ("gpt", "")), "empty turn"),
    ("blank turn", "sharegpt", turns(("human", " \n"), ("gpt", "a")), "empty turn"),
    ("question without an answer", "sharegpt", turns(("human", "q")), "turn without an answer"),
    ("last turn unanswered", "sharegpt", turns(("human", "q"), ("gpt", "a"), ("human", "q")), "turn without an answer"),
    ("no turns", "sharegpt", turns(), "no turns"),
    ("a system message alone", "sharegpt", turns(("system", "s")), "no turns"),
    ("turn null", "sharegpt", b'{"conversations": [null]}', "not an object"),
    ("turns null", "sharegpt", b'{"conversations": null}', "turns are not a list"),
    ("turns a text", "sharegpt", b'{"conversations": "q"}', "turns are not a list"),
    ("turn of another schema", "sharegpt", turns(("user", "q"), names=("role", "content")), "missing column 'from'"),
    ("records of another schema", "messages", turns(("human", "q")), "missing column 'messages'"),
    ("content as parts", "messages", b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "null text"),
    (
        "an image",
        "messages",
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 1}]}]}',
        "content part of type 'image_url'",
    ),
    (
        "a field of a part",
        "messages",
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "cache_control": {}}]}]}',
        "unused field 'cache_control' of a content part",
    ),
    (
        "a part as text",
        "messages",
        b'{"messages": [{"role": "user", "content": ["q"]}]}',
        "content part is not an object",
    ),
    ("answer null", "orca_chat", b'{"conversation": [{"input": "q", "output": null}]}', "null text"),
    ("answer missing", "orca_chat", b'{"conversation": [{"input": "q"}]}', "missing column 'output'"),
    ("question null", "orca_chat", b'{"conversation": [{"input": null, "output": "a"}]}', "null text"),
    ("system a number", "orca_chat", b'{"conversation": [], "instruction": 1}', "not text"),
    ("empty list", "orca_chat", b'{"conversation": [], "instruction": "s"}', "no turns"),
    ("output blank", "alpaca", b'{"instruction": "q", "output": " "}', "empty turn"),
    ("output missing", "alpaca", b'{"instruction": "q", "input": "x"}', "missing column 'output'"),
    ("input a number", "alpaca", b'{"instruction": "q", "input": 2, "output": "a"}', "not text"),
]

LIST = b"[" + GOOD + b", " + GOOD + b"]"
TABLE = packed(pa.table({"text": ["a" * 1000] * 1000}))
# (what, file, bytes, error, phrase): the file as a whole cannot be trusted.
BROKEN = [
    ("empty file", "a.jsonl", b"", DataError, "contains 0 records"),
    ("empty .json", "a.json", b"", DataError, "contains 0 records"),
    ("only white space", "a.json", b" \n\t ", DataError, "contains 0 records"),
    ("empty list", "a.json", b"[ ]", DataError, "contains 0 records"),
    ("empty gzip", "a.jsonl.gz", b"", DataError, "contains 0 records"),
    ("empty zstd", "a.jsonl.zst", b"", DataError, "contains 0 records"),
    ("gzip of nothing", "a.jsonl.gz", gz(b""), DataError, "contains 0 records"),
    (
        "gzip without its trailer",
        "a.jsonl.gz",
        gz(GOOD * 9)[:-4],
        DataError,
        "after 9 records",
    ),
    ("gzip cut in the middle", "a.jsonl.gz", gz(random.Random(0).randbytes(9000))[:4000], DataError, "ended before"),
    ("gzip cut in its head", "a.jsonl.gz", gz(GOOD)[:5], DataError, "ended before"),
    ("gzip: second member cut", "a.jsonl.gz", (gz(GOOD) * 2)[:-4], DataError, "after 2 records"),
    ("gzip: other checksum", "a.jsonl.gz", gz(GOOD)[:-8] + bytes(8), DataError, "CRC check failed"),
    ("gzip by name only", "a.jsonl.gz", GOOD, DataError, "Not a gzipped file"),
    ("garbage after gzip", "a.jsonl.gz", gz(GOOD) + b"xyz", DataError, "Not a gzipped file"),
    ("zstd without its end", "a.jsonl.zst", zst(GOOD * 99)[:-2], DataError, "inside a zstd frame"),
    ("zstd cut in its head", "a.jsonl.zst", zst(GOOD)[:3], DataError, "inside a zstd frame"),
    ("zstd: second frame cut", "a.jsonl.zst", (zst(GOOD) * 2)[:-3], DataError, "after 1 records .*zstd frame"),
    ("zstd: damaged", "a.jsonl.zst", b"\0".join((zst(GOOD)[:6], zst(GOOD)[7:])), DataError, "zstd"),
    ("zstd by name only", "a.jsonl.zst", GOOD, DataError, "zstd"),
    ("bzip2 cut", "a.jsonl.bz2", bz2.compress(GOOD * 99)[:-9], DataError, "reading failed after"),
    ("bzip2 by name only", "a.jsonl.bz2", GOOD, DataError, "reading failed after 0 records"),
    ("xz cut", "a.jsonl.xz", lzma.compress(GOOD * 99)[:-9], DataError, "reading failed after"),
    ("xz by name only", "a.jsonl.xz", GOOD, DataError, "reading failed after 0 records"),
    ("xz under the name of lines", "a.jsonl", lzma.compress(GOOD), DataError, r"found xz data; .*\.xz"),
    ("bzip2 under the name of lines", "a.jsonl", bz2.compress(GOOD), DataError, r"found bzip2 data; .*\.bz2"),
    ("gzip under the name of a list", "a.json", gz(LIST), DataError, r"found gzip data; .*\.gz"),
    ("zstd under the name of lines", "a.jsonl", zst(GOOD), DataError, r"found zstd data; .*\.zst"),
    ("parquet under the name of lines", "a.jsonl", TABLE, DataError, r"found parquet data; .*\.parquet"),
    ("zstd in gzip", "a.jsonl.gz", gz(zst(GOOD)), DataError, "found zstd data"),
    ("parquet cut", "a.parquet", TABLE[:-100], DataError, "reading failed after"),
    ("parquet cut in its data", "a.parquet", TABLE[:50] + TABLE[-400:], DataError, "reading failed after"),
    ("parquet: magic alone", "a.parquet", b"PAR1", DataError, "reading failed after"),
    ("parquet: nothing", "a.parquet", b"", DataError, "reading failed after"),
    ("parquet by name only", "a.parquet", GOOD, DataError, "reading failed after"),
    (
        "parquet: other columns",
        "a.parquet",
        packed(pa.table({"TEXT": ["a"]})),
        DataError,
        r"no column \['text'\]; found",
    ),
    (
        "parquet: zero rows",
        "a.parquet",
        packed(pa.table({"text": pa.array([], pa.string())})),
        DataError,
        "contains 0 records",
    ),
    ("UTF-16", "a.jsonl", '{"text": "a"}'.encode("utf-16"), DataError, "expected UTF-8 text, found UTF-16"),
    (
        "UTF-16 list",
        "a.json",
        '[{"text": "a"}]'.encode("utf-16"),
        DataError,
        "expected UTF-8 text, found UTF-16",
    ),
    ("list cut after a record", "a.json", LIST[:-1], DataError, "after record 2: the file ends early"),
    ("list cut in a record", "a.json", LIST[:-4], DataError, "after record 1: the file ends early"),
    ("list cut after a comma", "a.json", b"[" + GOOD + b",", DataError, "after record 1: the file ends early"),
    (
        "a quote that does not close",
        "a.json",
        b'[{"text": "a}, ' + GOOD + b"]",
        DataError,
        "record 0: the file ends",
    ),
    ("a brace that does not close", "a.json", b'[{"text": "a", ' + GOOD + b"]", DataError, "unmatched ']'"),
    ("one brace too many", "a.json", b"[" + GOOD + b"}, " + GOOD + b"]", DataError, "expected ',' or '\\]', found '}'"),
    ("no comma between records", "a.json", b"[" + GOOD * 2 + b"]", DataError, "expected ',' or '\\]', found '{'"),
    ("two commas", "a.json", b"[" + GOOD + b",," + GOOD + b"]", DataError, "record 2: expected a value, found ','"),
    ("comma before the end", "a.json", b"[" + GOOD + b",]", DataError, "record 2: expected a value, found '\\]'"),
    (
        "text after a list",
        "a.json",
        LIST + b"\nxyz",
        DataError,
        "after the end of the list: expected end of file, found 'x'",
    ),
    ("two lists", "a.json", LIST * 2, DataError, "after the end of the list"),
    ("object cut", "a.json", b'{\n "text": "a"\n', DataError, "the file ends early"),
    ("name without a format", "a.dat", GOOD, ConfigError, "expected a file name in .json, .jsonl"),
    ("parquet in gzip", "a.parquet.gz", gz(TABLE), ConfigError, "expected a file name in"),
]


@pytest.mark.parametrize(("name", "data", "kept", "refused"), [row[1:] for row in COUNTED], ids=[r[0] for r in COUNTED])
def test_each_record_is_kept_or_counted(tmp_path, name, data, kept, refused):
    (tmp_path / name).write_bytes(data)
    facts, _ = run(tmp_path, name)
    assert (facts["kept"], facts["refused"]) == (kept, refused)


@pytest.mark.parametrize(("rows", "line", "reason"), [r[1:] for r in CONVERSATIONS], ids=[r[0] for r in CONVERSATIONS])
def test_a_conversation_that_does_not_fit_is_counted(tmp_path, rows, line, reason):
    (tmp_path / "a.jsonl").write_bytes(line + b"\n" + line)
    facts, _ = run(tmp_path, "a.jsonl", rows=rows)
    assert (facts["kept"], facts["refused"]) == (0, {reason: 2})
    assert facts["first_refused"] == [{"where": f"a.jsonl:{n}", "reason": reason} for n in (1, 2)]


@pytest.mark.parametrize(("name", "data", "error", "phrase"), [row[1:] for row in BROKEN], ids=[r[0] for r in BROKEN])
def test_a_file_that_cannot_be_trusted_is_an_error_and_leaves_nothing(tmp_path, name, data, error, phrase):
    (tmp_path / name).write_bytes(data)
    fails(tmp_path, name, error, phrase)


def test_a_line_longer_than_any_record_is_counted_and_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr("ropeway.stages.fetch.files.MAX_RECORD_SIZE", 100)
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"text": "' + b"a" * 1000 + b'"}\n' + GOOD)
    facts, records = run(tmp_path, "a.jsonl")
    assert (records, facts["refused"]) == (["ok", "ok"], {"record too long": 1})


def test_a_record_of_a_list_longer_than_any_record_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("ropeway.stages.fetch.values.MAX_RECORD_SIZE", 100)
    monkeypatch.setattr("ropeway.stages.fetch.values.CHUNK_BYTES", 64)
    (tmp_path / "a.json").write_bytes(b"[" + GOOD + b', {"text": "' + b"a" * 1000 + b'"}]')
    fails(tmp_path, "a.json", DataError, "record 2: bad JSON, or longer than 100 characters")


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_where_chunks_end_changes_nothing(tmp_path, monkeypatch, chunk):
    data = '[1234, {"text": "ü€😀\\"}"}, 12.5e3, {"text": "a" "b"}, true , {"text": "\\\\"}]\n'.encode()
    (tmp_path / "a.json").write_bytes(data)
    whole = run(tmp_path, "a.json")
    monkeypatch.setattr("ropeway.stages.fetch.values.CHUNK_BYTES", chunk)
    assert run(tmp_path, "a.json") == whole
    assert whole[1] == ['ü€😀"}', "\\"]
    assert whole[0]["refused"] == {"bad JSON": 1, "not an object": 3}


def test_more_refusals_than_allowed_stop_the_stage_with_the_counts(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD * 7 + b"{}\n{}\n{")
    fails(
        tmp_path,
        "a.jsonl",
        DataError,
        r"(?s)s: 3 of 10 records refused.*bad JSON: 1 record, first a\.jsonl:10.*'text': 2 records, first a\.jsonl:8",
        limit=0.29,
    )
    assert run(tmp_path, "a.jsonl", limit=0.3)[0]["read"] == 10


@pytest.mark.parametrize("target", [".env", ".dvc/config.local", "deep/.keys/a"])
def test_a_link_to_a_hidden_file_is_refused_and_one_to_dvcs_cache_is_data(tmp_path, target):
    (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / target).write_text("secret")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").symlink_to(tmp_path / target)
    with pytest.raises(ConfigError, match="which is hidden"):
        find_files(["data/*.txt"], tmp_path)
    (tmp_path / "data" / "a.txt").unlink()
    (tmp_path / "inner").mkdir()
    (tmp_path / "d.txt").symlink_to(tmp_path / target)
    with pytest.raises(ConfigError, match="which is hidden"):
        find_files(["../*.txt"], tmp_path / "inner")
    (tmp_path / "d.txt").unlink()
    cached = tmp_path / ".dvc" / "cache" / "files" / "b"
    cached.parent.mkdir(parents=True)
    cached.write_text("data")
    (tmp_path / "data" / "b.txt").symlink_to(cached)
    (tmp_path / ".own").mkdir()
    (tmp_path / ".own" / "c.txt").write_text("data")
    assert list(find_files(["data/*.txt", ".own/c.txt"], tmp_path)) == [".own/c.txt", "data/b.txt"]
    (tmp_path.parent / f"{tmp_path.name}-link").symlink_to(tmp_path)
    linked = find_files([".own/c.txt"], tmp_path.parent / f"{tmp_path.name}-link")
    assert list(linked) == [".own/c.txt"]


def test_a_link_is_followed_inside_the_workspace_and_refused_outside(tmp_path):
    root, outside = tmp_path / "workspace", tmp_path / "elsewhere"
    root.mkdir()
    outside.mkdir()
    (outside / "b.jsonl").write_bytes(GOOD)
    (root / "real.jsonl").write_bytes(GOOD)
    (root / "near.jsonl").symlink_to("real.jsonl")
    assert run(root, "near.jsonl")[1] == ["ok"]
    (root / "far.jsonl").symlink_to(outside / "b.jsonl")
    (root / "folder").symlink_to(outside)
    for name in ("far.jsonl", "*.jsonl", "folder/b.jsonl", "folder/*.jsonl"):
        with pytest.raises(ConfigError, match=r"is a link to .*elsewhere/b.jsonl, outside the workspace; name"):
            run(root, name)
    assert run(root, str(outside / "*.jsonl"))[1] == ["ok"]
    assert run(root, "../elsewhere/*.jsonl")[1] == ["ok"]
    (outside / "c.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (tmp_path / "secret.jsonl").write_bytes(GOOD)
    with pytest.raises(ConfigError, match=r"is a link to .*secret"):
        run(root, str(outside / "*.jsonl"))


@pytest.mark.parametrize("target", ["nowhere.jsonl", "a.jsonl"])
def test_a_link_to_nowhere_or_to_itself_is_an_error(tmp_path, target):
    (tmp_path / "a.jsonl").symlink_to(target)
    fails(tmp_path, "a.jsonl", ConfigError, "is a broken link")


def test_a_pipe_or_device_is_refused_and_never_opened(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    fails(tmp_path, "a.jsonl", ConfigError, "a pipe, a socket or a device")
    fails(tmp_path, "*.jsonl", ConfigError, "a pipe, a socket or a device")
    fails(tmp_path, "/dev/null", ConfigError, "a pipe, a socket or a device")


def test_a_folder_is_refused_unless_a_glob_merely_passes_it(tmp_path):
    (tmp_path / "deep" / "v1.0").mkdir(parents=True)
    (tmp_path / "deep" / "v1.0" / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "deep" / "part.parquet").mkdir()
    fails(tmp_path, "deep", ConfigError, r"is a folder; name its files, e\.g\. deep/\*.jsonl")
    fails(tmp_path, "deep/*.parquet", ConfigError, "is a folder")
    (tmp_path / "deep" / "part.parquet").rmdir()
    assert run(tmp_path, "deep/**/*")[1] == ["ok"]


def test_a_file_that_may_not_be_read_is_an_error_about_permissions(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(GOOD)

    def denied(path):  # a double: root may read everything
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("ropeway.stages.fetch.local.file_sha256", denied)
    fails(tmp_path, "a.jsonl", ConfigError, "cannot be read .Permission denied.")


def test_a_disk_that_is_full_leaves_nothing_and_can_be_retried(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(GOOD)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
        with pytest.raises(TemporaryError, match=r"the disk is full .*nothing was written.*Free space and run"):
            run(tmp_path, "a.jsonl")
    assert [path for path in (tmp_path / "runs").rglob("*") if path.is_file()] == []
    assert run(tmp_path, "a.jsonl")[1] == ["ok"]


def test_the_first_refused_records_are_shown_and_no_more_than_twenty(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" * 30)
    shown = run(tmp_path, "a.jsonl")[0]["first_refused"]
    assert [one["where"] for one in shown] == [f"a.jsonl:{line}" for line in range(1, 21)]


@pytest.mark.parametrize(
    ("rows", "line", "columns", "system", "first"),
    [
        ("alpaca", '{"instruction": "q", "output": "a"}', {}, "", "q"),
        ("alpaca", '{"instruction": "q", "input": null, "output": "a"}', {}, "", "q"),
        ("alpaca", '{"instruction": "q", "input": "x", "output": "a", "s": "S"}', {"system": "s"}, "S", "q\n\nx"),
        ("orca_chat", '{"conversation": [{"input": "q", "output": "a"}]}', {}, "", "q"),
        ("orca_chat", '{"conversation": [{"input": "q", "output": "a"}], "instruction": null}', {}, "", "q"),
        (
            "messages",
            '{"p": "S", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
            {"system": "p"},
            "S",
            "q",
        ),
        (
            "sharegpt",
            '{"c": [{"who": "human", "said": "q"}, {"who": "gpt", "said": "a"}]}',
            {"conversations": "c", "from": "who", "value": "said"},
            "",
            "q",
        ),
    ],
)
def test_optional_columns_may_be_missing_or_null_and_every_name_can_be_mapped(
    tmp_path, rows, line, columns, system, first
):
    (tmp_path / "a.jsonl").write_text(line)
    _, (talk,) = run(tmp_path, "a.jsonl", rows=rows, columns=columns)
    assert (talk.system, talk.turns) == (system, (first, "a"))


def test_two_different_system_messages_are_counted(tmp_path):
    said = turns(("system", "A"), ("user", "q"), ("assistant", "a"), names=("role", "content"), column="messages")
    (tmp_path / "a.jsonl").write_bytes(said[:-1] + b', "system": "B"}\n' + said[:-1] + b', "system": "A"}')
    facts, (talk,) = run(tmp_path, "a.jsonl", rows="messages", columns={"system": "system"})
    assert (talk.system, facts["refused"]) == ("A", {"two system messages": 1})


def test_a_column_that_the_kind_of_rows_does_not_have_is_reported(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(ConfigError, match=r"columns: \['txt'\] are not columns of rows: text; expected any of"):
        run(tmp_path, "a.jsonl", columns={"txt": "TEXT"})


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_ten_times_the_file_is_read_in_the_same_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr("ropeway.stages.fetch.values.CHUNK_BYTES", 1 << 14)
    line = json.dumps({"text": "word " * 500}).encode()

    def peak(times):
        lines = [line] * times
        data = b"[" + b", ".join(lines) + b"]" if name == "a.json" else b"\n".join(lines)
        wrap = {".gz": gz, ".zst": zst}.get(name[6:] and "." + name.rpartition(".")[2], bytes)
        (tmp_path / name).write_bytes(wrap(data))
        del data, lines
        tracemalloc.start()
        assert sum(1 for _ in iterate_objects(InputFile.of(tmp_path / name), ["text"])) == times
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)  # what is loaded once
    assert peak(4000) < peak(400) + 200_000


def test_the_table_is_as_long_as_promised():
    assert len(COUNTED) + len(CONVERSATIONS) + len(BROKEN) > 100
