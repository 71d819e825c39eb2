"""zip and tar: each member is read like a file, or named with the reason; a damaged archive is an error."""

import bz2
import io
import json
import lzma
import stat
import subprocess
import tarfile
import tracemalloc
import warnings
import zipfile

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from ropeway.models.conversation import Conversation
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch.sources import open_source, source_identity
from ropeway.stages.fetch.stage import describe
from tests.support.archives import gz, make_tar, make_zip
from tests.support.fetching import fetch, files_source

zst = zstandard.ZstdCompressor().compress
WAYS = {
    "a.zip": make_zip,
    "a.tar": make_tar,
    "a.tar.gz": lambda members: gz(make_tar(members)),
    "a.tgz": lambda members: gz(make_tar(members)),
    "a.tar.zst": lambda members: zst(make_tar(members)),
    "a.tar.bz2": lambda members: bz2.compress(make_tar(members)),
    "a.tar.xz": lambda members: lzma.compress(make_tar(members)),
}


def line(text):
    return json.dumps({"text": text}).encode() + b"\n"


def table(*texts):
    sink = io.BytesIO()
    parquet.write_table(pa.table({"text": list(texts)}), sink)
    return sink.getvalue()


def arrow(*texts):
    sink = io.BytesIO()
    rows = pa.table({"text": list(texts)})
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue()


MEMBERS = {
    "notes/z.txt": b"z",
    "a.jsonl": line("a") + b"{}\n",
    "b.json": b"[" + line("b") + b"]",
    "c.csv": b"text\nc\n",
    "d.tsv.gz": gz(b"text\nd\n"),
    "e.parquet": table("e"),
    "f.arrow": arrow("f"),
    "g.md": b"# g",
    "h.json.zst": zst(line("h")),
    "deep/er/i.jsonl.xz": lzma.compress(line("i")),
    "deep/er/j.jsonl.bz2": bz2.compress(line("j")),
}
READ = ["z", "a", "b", "c", "d", "e", "f", "# g", "h", "i", "j"]


@pytest.mark.parametrize("name", WAYS)
def test_each_member_is_read_by_the_format_of_its_own_name_in_the_order_of_the_archive(tmp_path, name):
    (tmp_path / name).write_bytes(WAYS[name](MEMBERS))
    facts, records = fetch(tmp_path, name)
    assert records == READ
    assert facts["files"] == {f"{name}/{member}": 1 + (member == "a.jsonl") for member in MEMBERS}
    assert facts["first_refused"] == [{"where": f"{name}/a.jsonl:2", "reason": "missing column 'text'"}]
    assert list(facts["identity"]["files"]) == [name]
    assert "skipped_members" not in facts
    assert not list((tmp_path / ".work").rglob("member-*"))


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_what_is_not_read_is_counted_and_named(tmp_path, name):
    members = {
        "data/": b"",
        "data/a.jsonl": line("a"),
        "data/a.pdf": b"%PDF",
        "LICENSE": b"free",
        "inner.zip": make_zip({"x.jsonl": line("x")}),
        "__MACOSX/data/._a.jsonl": b"\0\5\26\7",
        "data/._a.jsonl": b"\0\5\26\7",
        "dataset_info.json": b"{}",
        "b.JSONL": line("b"),
    }
    if name != "a.zip":
        del members["data/"]
    (tmp_path / name).write_bytes(WAYS[name](members))
    facts, records = fetch(tmp_path, name)
    assert records == ["a"]
    assert facts["skipped_members"] == {
        "an archive in an archive": 1,
        "metadata of a saved folder": 1,
        "metadata of macOS": 2,
        "no supported format": 3,
    }
    assert {one["where"]: one["reason"] for one in facts["first_skipped"]} == {
        f"{name}/data/a.pdf": "no supported format",
        f"{name}/LICENSE": "no supported format",
        f"{name}/b.JSONL": "no supported format",
        f"{name}/inner.zip": "an archive in an archive",
        f"{name}/__MACOSX/data/._a.jsonl": "metadata of macOS",
        f"{name}/data/._a.jsonl": "metadata of macOS",
        f"{name}/dataset_info.json": "metadata of a saved folder",
    }
    told = describe("s", facts)[-1]
    assert told.startswith(f"s: 7 members of archives skipped: {name}/data/a.pdf (no supported format); ")


def test_a_document_among_chats_is_skipped_and_named(tmp_path):
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "a.zip").write_bytes(make_zip({"README.md": b"# Chats", "a.jsonl": json.dumps(chat).encode()}))
    facts, records = fetch(tmp_path, "a.zip", rows="messages")
    assert records == [Conversation(("q", "a"))]
    assert facts["first_skipped"] == [{"where": "a.zip/README.md", "reason": "a document, the source has other rows"}]


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_links_and_special_files_are_named_and_never_followed(tmp_path, name):
    (tmp_path / "outside.jsonl").write_bytes(line("outside"))
    if name == "a.zip":
        link = zipfile.ZipInfo("link.jsonl")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w") as archive:
            archive.writestr(link, "outside.jsonl")
            archive.writestr(zipfile.ZipInfo("a.jsonl"), line("a"))
        data, wanted = sink.getvalue(), ["link.jsonl"]
    else:
        links = [(kind, tarfile.TarInfo(f"{kind}.jsonl")) for kind in ("link", "hard", "pipe")]
        kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE}
        for kind, info in links:
            info.type, info.linkname = kinds[kind], "outside.jsonl"
        data = make_tar([*((info, b"") for _, info in links), ("a.jsonl", line("a"))])
        wanted = [info.name for _, info in links]
    (tmp_path / name).write_bytes(data)
    facts, records = fetch(tmp_path, name)
    assert records == ["a"]
    assert facts["skipped_members"] == {"a link or a special file": len(wanted)}
    assert [one["where"] for one in facts["first_skipped"]] == [f"{name}/{one}" for one in wanted]


@pytest.mark.parametrize("way", [make_zip, make_tar])
@pytest.mark.parametrize(
    "member", ["../../etc/x.jsonl", "/etc/x.jsonl", "x\x1b[2J\n.jsonl", "ü/é.jsonl", "x" * 2000 + ".jsonl"]
)
def test_a_name_is_only_a_name_and_is_shown_on_one_line(tmp_path, way, member):
    root = tmp_path / "deep" / "er"
    root.mkdir(parents=True)
    name = "a.zip" if way is make_zip else "a.tar"
    (root / name).write_bytes(way({member: b"{\n"}))
    facts, _ = fetch(root, name)
    (shown,) = facts["files"]
    assert shown.isprintable()
    assert len(shown) < 600
    assert facts["first_refused"][0]["where"] == f"{shown}:1"
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_a_tar_name_that_is_not_utf8_is_shown_escaped(tmp_path):
    data = make_tar({"x\udcff.jsonl": line("a")}, form=tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(data)
    assert list(fetch(tmp_path, "a.tar")[0]["files"]) == ["a.tar/x\\udcff.jsonl"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_a_pattern_behind_the_archive_chooses_its_members(tmp_path, name):
    members = {f"{split}/{n}.jsonl": line(f"{split} {n}") for split in ("train", "test") for n in range(2)}
    (tmp_path / name).write_bytes(WAYS[name](members))
    assert fetch(tmp_path, f"{name}/train/*.jsonl")[1] == ["train 0", "train 1"]
    assert fetch(tmp_path, f"./{name}/**/0.jsonl", splits=["train", "test"])[1] == ["train 0", "test 0"]
    assert fetch(tmp_path, f"*{name[1:]}/test/1.jsonl")[1] == ["test 1"]
    both, records = fetch(tmp_path, f"{name}/train/0.jsonl", f"{name}/train/*.jsonl")
    assert (records, list(both["files"])) == (["train 0", "train 1"], [f"{name}/train/{n}.jsonl" for n in range(2)])
    with pytest.raises(ConfigError, match=r"has no member that matches \['train/\*.csv'\] of a supported format"):
        fetch(tmp_path, f"{name}/train/*.csv")


def test_a_folder_with_the_name_of_an_archive_is_a_folder(tmp_path):
    (tmp_path / "a.zip").mkdir()
    (tmp_path / "a.zip" / "b.jsonl").write_bytes(line("b"))
    (tmp_path / "a.zip" / "c.zip").write_bytes(make_zip({"d.jsonl": line("d")}))
    assert fetch(tmp_path, "a.zip/*.jsonl")[1] == ["b"]
    assert list(fetch(tmp_path, "a.zip/c.zip")[0]["files"]) == ["a.zip/c.zip/d.jsonl"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar.zst"])
def test_members_of_several_splits_are_refused_unless_params_name_them(tmp_path, name):
    members = {"data/train-0.jsonl": line("a"), "data/test-0.jsonl": line("b")}
    (tmp_path / name).write_bytes(WAYS[name](members))
    with pytest.raises(ConfigError, match=rf"'{name}' matches files of several splits .*`splits: \["):
        fetch(tmp_path, name)
    assert fetch(tmp_path, name, splits=["train", "test"])[1] == ["a", "b"]
    (tmp_path / name).write_bytes(WAYS[name]({"more.jsonl": line("c"), **dict([*members.items()][:1])}))
    assert fetch(tmp_path, name)[1] == ["c", "a"]


def encrypted(members):
    data = bytearray(make_zip(members, method=zipfile.ZIP_STORED))
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.find(mark)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(mark, at + 1)
    return bytes(data)


def other_method(members):
    data = bytearray(make_zip(members, method=zipfile.ZIP_STORED))
    for mark, offset in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        data[data.find(mark) + offset] = 9  # Deflate64
    return bytes(data)


def twice(way):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns
        return way([("a.jsonl", line("a")), ("a.jsonl", line("b"))])


def nameless():
    """A zip whose only member has an empty name: the length of its name is moved to its extra field."""
    data = bytearray(make_zip({"q": b""}))
    lengths = data.index(b"PK\x01\x02") + 28
    data[lengths : lengths + 4] = bytes([0, 0, 1, 0])
    return bytes(data)


GOOD = {"a.jsonl": line("a" * 900), "b.jsonl": line("b" * 900)}
TAR, ZIP = make_tar(GOOD), make_zip(GOOD, method=zipfile.ZIP_STORED)
HEADER_OF_B = TAR.index(b"b.jsonl")
# (what, name, bytes, error, phrase): the archive as a whole cannot be trusted.
BROKEN = [
    ("empty zip", "a.zip", make_zip({}), ConfigError, r"a.zip has no member of a supported format \(empty\)"),
    ("empty tar", "a.tar", make_tar({}), ConfigError, r"a.tar has no member of a supported format \(empty\)"),
    ("nothing to read", "a.zip", make_zip({"a.png": b""}), ConfigError, r"a.zip/a.png: no supported format"),
    ("no bytes: zip", "a.zip", b"", DataError, "a.zip: reading failed"),
    ("no bytes: tar", "a.tar", b"", DataError, "a.tar: reading failed"),
    ("jsonl named zip", "a.zip", line("a"), DataError, "a.zip: reading failed"),
    ("jsonl named tar", "a.tar", line("a") * 99, DataError, "a.tar: reading failed"),
    ("zip named jsonl", "a.jsonl", ZIP, DataError, r"found zip data; rename it to end in .zip"),
    (
        "encrypted",
        "a.zip",
        encrypted({"x.pdf": b"", **GOOD}),
        DataError,
        "a.zip/a.jsonl: is encrypted; pack it without",
    ),
    ("unknown compression", "a.zip", other_method({"a.jsonl": line("a")}), DataError, "a.jsonl: reading failed.*compr"),
    ("an empty member", "a.zip", make_zip({"a.jsonl": b""}), DataError, "a.zip/a.jsonl: contains 0 records"),
    (
        "zip: a name that is not UTF-8",
        "a.zip",
        make_zip({"é": b""}).replace("é".encode(), b"\xff\xfe"),
        DataError,
        "utf-8",
    ),
    ("zip: no name", "a.zip", nameless(), DataError, "a member has no name"),
    ("zip cut", "a.zip", ZIP[:-10], DataError, "a.zip: reading failed"),
    ("zip: other bytes", "a.zip", ZIP.replace(b"aaaa", b"aaab", 1), DataError, "a.jsonl: reading failed.*CRC"),
    ("zip: a name twice", "a.zip", twice(make_zip), DataError, "a.zip: has two members a.jsonl"),
    ("tar: a name twice", "a.tar", twice(make_tar), DataError, "a.tar: has two members a.jsonl"),
    ("tar cut in a member", "a.tar", TAR[: HEADER_OF_B + 700], DataError, "b.jsonl: reading failed.*unexpected end"),
    ("tar cut between members", "a.tar", TAR[:HEADER_OF_B], DataError, "no end marker"),
    ("tar cut in a header", "a.tar", TAR[: HEADER_OF_B + 100], DataError, "no end marker"),
    (
        "tar: damaged header",
        "a.tar",
        TAR[: HEADER_OF_B + 3] + b"X" + TAR[HEADER_OF_B + 4 :],
        DataError,
        "after 1 members .a damaged header",
    ),
    ("two tars in a row", "a.tar", TAR + TAR, DataError, "more data after the end marker"),
    ("tar.gz without its trailer", "a.tar.gz", gz(TAR)[:-4], DataError, "a.tar.gz: reading failed"),
    ("tar.gz of another checksum", "a.tar.gz", gz(TAR)[:-8] + bytes(8), DataError, "CRC check failed"),
    ("tar.zst cut", "a.tar.zst", zst(TAR)[:-3], DataError, "zstd frame"),
    ("tar.xz cut", "a.tar.xz", lzma.compress(TAR)[:-20], DataError, "reading failed"),
    ("tar.gz by name only", "a.tar.gz", TAR, DataError, "Not a gzipped file"),
    (
        "a broken parquet member",
        "a.zip",
        make_zip({"a.parquet": b"PAR1"}),
        DataError,
        "a.zip/a.parquet: reading failed",
    ),
    (
        "a parquet member without the column",
        "a.tar",
        make_tar({"a.csv": b"b\n1\n"}),
        DataError,
        "a.tar/a.csv: no column",
    ),
]


@pytest.mark.parametrize(
    ("name", "data", "error", "phrase"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN]
)
def test_an_archive_that_cannot_be_trusted_is_an_error_that_names_it(tmp_path, name, data, error, phrase):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=phrase) as caught:
        fetch(tmp_path, name)
    assert name in str(caught.value)
    assert not list((tmp_path / "runs").rglob("*.parquet"))
    assert not list((tmp_path / ".work").rglob("member-*"))


def test_zeros_after_the_end_of_a_tar_are_padding(tmp_path):
    (tmp_path / "a.tar").write_bytes(TAR + bytes(20_000))
    assert len(fetch(tmp_path, "a.tar")[1]) == 2


def test_the_tools_of_the_system_write_archives_that_are_read(tmp_path):
    """An outside authority for the formats: the system's own tar, with long names and a sparse file."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / ("long" * 40 + ".jsonl")).write_bytes(line("long name"))
    with (tmp_path / "in" / "sparse.jsonl").open("wb") as file:
        file.write(line("sparse"))
        file.truncate(1 << 20)
        file.seek(1 << 20)
        file.write(b"\n" + line("end"))
    for number, form in enumerate(("gnu", "pax", "ustar")):
        sparse = ["--sparse"] if form != "ustar" else []
        names = "sparse.jsonl" if form == "ustar" else "."
        command = ["tar", *sparse, f"--format={form}", "--sort=name", "-cf", f"{number}.tar", "-C", "in", names]
        subprocess.run(command, cwd=tmp_path, check=True)
        facts, records = fetch(tmp_path, f"{number}.tar")
        assert records[-2:] == ["sparse", "end"]
        assert len(records) == (2 if form == "ustar" else 3)
        assert facts["refused"] == {"bad JSON": 1}  # the hole is read as the zeros that it stands for


def test_the_identity_follows_the_archives_bytes(tmp_path):
    (tmp_path / "a.zip").write_bytes(ZIP)
    before = source_identity(files_source("a.zip/*.jsonl"), tmp_path)
    assert source_identity(files_source("a.zip/*.jsonl"), tmp_path) == before
    (tmp_path / "a.zip").write_bytes(make_zip(GOOD))
    assert source_identity(files_source("a.zip/*.jsonl"), tmp_path) != before


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
def test_a_large_member_is_streamed(tmp_path, name):
    def peak(times):
        (tmp_path / name).write_bytes(WAYS[name]({"a.jsonl": line("word " * 500) * times}))
        tracemalloc.start()
        try:
            records = open_source(files_source(name), Workspace(tmp_path, "laptop"), {"files": {}})
            assert sum(1 for _ in records) == times
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)
    assert peak(4000) < peak(400) + 300_000


def test_a_name_of_many_members_is_counted_together_beyond_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("ropeway.stages.fetch.sources._MAX_NAMES", 3)
    members = {f"{n}.txt": b"a" for n in range(5)} | {f"{n}.png": b"" for n in range(5)}
    (tmp_path / "a.zip").write_bytes(make_zip(members))
    facts, _ = fetch(tmp_path, "a.zip")
    assert facts["files"] == {"a.zip/0.txt": 1, "a.zip/1.txt": 1, "a.zip/2.txt": 1, "others": 2}
    assert (len(facts["first_skipped"]), facts["skipped_members"]) == (3, {"no supported format": 5})


def test_a_workspace_keeps_nothing_of_a_member_after_a_failed_fetch(tmp_path):
    (tmp_path / "a.tar").write_bytes(make_tar({"a.parquet": table("a"), "b.jsonl": b""}))
    with pytest.raises(DataError, match=r"a.tar/b.jsonl: contains 0 records"):
        fetch(tmp_path, "a.tar")
    assert not [path for path in (Workspace(tmp_path, "laptop").work / "fetch").rglob("*") if path.is_file()]
