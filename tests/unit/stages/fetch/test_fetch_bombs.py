"""Sources made to exhaust memory, disk or time: each is a named error or a counted refusal, in bounded memory."""

import gzip
import io
import itertools
import lzma
import re
import tarfile
import zipfile
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from ropeway.runtime.errors import ConfigError, DataError
from ropeway.stages.fetch import remote
from ropeway.stages.fetch.decompress import InputFile
from ropeway.stages.fetch.files import iterate_objects
from ropeway.stages.fetch.row_sizes import measure_rows
from ropeway.stages.fetch.values import UnreadableError
from tests.support.archives import make_tar, make_zip
from tests.support.bounded import run_bounded
from tests.support.fetching import fetch

LINE = b'{"text":"a"}\n'
MB = 1 << 20
GB = 1 << 30
DEEP = 1_000_000
END = bytes(1024)


@pytest.fixture
def small_limits(monkeypatch):
    """The limit on expansion starts at 8 MB instead of 1 GiB, so that a bomb takes milliseconds."""
    monkeypatch.setattr("ropeway.stages.fetch.decompress.FREE_BYTES", 8 * MB)


def outcome(folder, name, data, **options):
    """Fetch a file with these bytes, or that `data` writes, in a bounded process."""
    if callable(data):
        data(folder / name)
    else:
        (folder / name).write_bytes(data)
    return run_bounded(lambda: fetch(folder, name, **options))


def sparse(head, tail, size=GB // 4):
    def write(path):
        with path.open("wb") as file:
            file.write(head)
            file.truncate(size)
            file.seek(size)
            file.write(tail)

    return write


# JSON: a bomb in a record refuses the record, and the next one is read.
@pytest.mark.parametrize(
    "value",
    [b"[" * DEEP, b"[" * DEEP + b"]" * DEEP, b'{"a":' * 900 + b"1" + b"}" * 900, b"1" * 1_000_000],
    ids=["deep", "deep and closed", "below Python's limit", "digits"],
)
def test_a_line_of_json_that_is_a_bomb_is_refused_and_the_next_is_kept(tmp_path, value):
    (tmp_path / "a.jsonl").write_bytes(b'{"text":"b","x":' + value + b"}\n" + LINE)
    facts, records = fetch(tmp_path, "a.jsonl", ignored=["x"])
    assert (records, sum(facts["refused"].values())) == (["a"], 1)
    assert set(facts["refused"]) <= {"bad JSON", "nested too deep"}


def test_a_json_list_with_a_deep_record_is_read_on(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text":' + b"[" * DEEP + b"]" * DEEP + b'},{"text":"a"}]')
    facts, records = fetch(tmp_path, "a.json")
    assert (records, facts["refused"]) == (["a"], {"bad JSON": 1})


def test_a_json_list_that_never_closes_is_an_error_of_the_file(tmp_path):
    found = outcome(tmp_path, "a.json", b'[{"text":' + b"[" * DEEP)
    assert (found.error, found.megabytes < 200) == ("DataError", True)


def test_arguments_of_a_tool_that_are_deep_json_in_a_text_are_refused(tmp_path):
    call = r'{"name":"f","arguments":"{\"a\":' + "[" * 300 + "]" * 300 + '}"}'
    turns = r'{"role":"user","content":"q"},{"role":"assistant","content":"a","tool_calls":[' + call + "]}"
    (tmp_path / "a.jsonl").write_text('{"messages":[' + turns + "]}\n")
    assert fetch(tmp_path, "a.jsonl", rows="messages")[0]["refused"] == {"nested too deep": 1}


# Sizes: lines and fields of 256 MB, four times the limit of a record, in sparse files.
def test_a_line_of_many_megabytes_is_refused_without_being_held(tmp_path):
    sparse(b'{"text":"', b'"}\n' + LINE)(tmp_path / "a.jsonl")
    read = []

    def act():
        read.extend(iterate_objects(InputFile.of(tmp_path / "a.jsonl"), ["text"]))
        assert [str(value) for _, value in read] == ["record too long", "{'text': 'a'}"]

    found = run_bounded(act)
    assert (found.error, found.megabytes < 300) == ("", True), found


def test_a_csv_field_of_many_megabytes_is_an_error_that_names_the_limit(tmp_path):
    sparse(b'text\n"a', b'"\nb\n')(tmp_path / "a.csv")
    found = run_bounded(lambda: list(iterate_objects(InputFile.of(tmp_path / "a.csv"), ["text"])))
    assert (found.error, found.megabytes < 300) == ("DataError", True)
    assert "67,108,864 bytes" in found.message


# Compression: what expands to more than 1,000 times its size.
def zeros(size):
    return LINE + bytes(size)


COMPRESSED = {
    "a.jsonl.xz": lambda: lzma.compress(zeros(64 * MB), preset=0),
    "a.jsonl.zst": lambda: zstandard.compress(zeros(64 * MB)),
    "a.tar.xz": lambda: lzma.compress(make_tar({"a.jsonl": zeros(64 * MB)}), preset=0),
    "a.tar.zst": lambda: zstandard.compress(make_tar({"a.png": zeros(64 * MB), "a.jsonl": LINE})),
    "a.zip": lambda: make_zip({f"{n}.jsonl.xz": lzma.compress(zeros(32 * MB), preset=0) for n in range(2)}),
}


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("name", COMPRESSED)
def test_a_file_that_expands_a_thousandfold_is_an_error_with_the_limit(tmp_path, name):
    found = outcome(tmp_path, name, COMPRESSED[name]())
    assert (found.error, found.megabytes < 300) == ("DataError", True), found
    assert "expand to more than 1,000 times" in found.message
    assert f"{tmp_path}/{name}: its " in found.message


def test_data_that_expands_a_hundredfold_is_read_whatever_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr("ropeway.stages.fetch.decompress.FREE_BYTES", 1000)
    text = b"".join(b'{"text":"line %d of a log that repeats itself"}\n' % number for number in range(5000))
    for name, data in {"a.jsonl.gz": gzip.compress(text), "b.zip": make_zip({"a.jsonl": text})}.items():
        assert len(text) > 5 * len(data) > 5000
        (tmp_path / name).write_bytes(data)
        assert fetch(tmp_path, name)[0]["kept"] == 5000


# tar: headers that are endless, and holes that the archive does not have.
def header(kind, size, name="p"):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(**values):
    text = b""
    for key, value in values.items():
        rest = f" {key.replace('__', '.')}={value}\n"
        size = next(size for size in itertools.count(1) if len(str(size)) + len(rest) == size)
        text += f"{size}{rest}".encode()
    return header(b"x", len(text)) + text + bytes(-len(text) % 512)


SPARSE = {"GNU__sparse__major": 1, "GNU__sparse__minor": 0, "GNU__sparse__name": "a.jsonl"}
HOLE = pax(**SPARSE, GNU__sparse__realsize=1 << 60)
TARS = {
    "attributes of 1 TB": header(b"x", 1 << 40) + bytes(4 * MB),
    "a name of 1 TB": header(b"L", 1 << 40) + bytes(4 * MB),
    "a name of negative length": header(b"L", -512) + bytes(4 * MB),
    "attributes after attributes": pax(path="a") * 5000 + make_tar({"a.jsonl": LINE}),
    "names after names": (header(b"L", 2) + b"a\0" + bytes(510)) * 5000 + make_tar({"a.jsonl": LINE}),
    "attributes for all members": b"".join(
        header(b"g", 900_000) + (b"900000 k%d=" % n).ljust(899_999, b"v") + b"\n" + bytes(-900_000 % 512)
        + make_tar({f"{n}.png": b""})[:512]
        for n in range(3)
    ),
    "a map of a sparse file that is no number": HOLE + header(b"0", GB, "a.jsonl") + b"100000000\n" + bytes(4 * MB),
    "a member of 2^60 bytes": header(b"0", 1 << 60, "a.jsonl") + LINE + END,
}  # fmt: skip


@pytest.mark.parametrize("data", TARS.values(), ids=TARS)
def test_a_tar_whose_headers_are_endless_is_an_error_in_little_memory(tmp_path, data):
    found = outcome(tmp_path, "a.tar", data)
    assert (found.error, found.megabytes < 100) == ("DataError", True), found
    assert f"{tmp_path}/a.tar" in found.message


@pytest.mark.usefixtures("small_limits")
def test_a_hole_of_2_60_bytes_in_a_sparse_member_is_an_error(tmp_path):
    place = b"1\n0\n%d\n" % len(LINE)
    member = header(b"0", 512 + len(LINE), "a.jsonl") + place.ljust(512, b"\0") + LINE.ljust(512, b"\0")
    found = outcome(tmp_path, "a.tar", HOLE + member + END)
    assert (found.error, found.megabytes < 300) == ("DataError", True), found
    assert "expand to more than 1,000 times" in found.message


def test_long_names_and_attributes_below_the_limit_are_read(tmp_path):
    long = "n" * 60_000 + ".jsonl"
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        (tmp_path / f"{number}.tar").write_bytes(make_tar({long: LINE, "b.jsonl": LINE}, form=form))
        assert fetch(tmp_path, f"{number}.tar")[1] == ["a", "a"]


# zip: archives in archives, members that share bytes, many members.
def overlapping(*, quoted):
    """A zip of two names for the same bytes; with `quoted`, the second begins inside the first one."""
    data = bytearray(make_zip({"a0.jsonl": LINE * 9, "a1.jsonl": LINE * 9}))
    first, second = (match.start() for match in re.finditer(b"PK\1\2", bytes(data)))
    data[second + 42 : second + 46] = (10 if quoted else 0).to_bytes(4, "little")
    data[second + 46 : second + 54] = data[first + 46 : first + 54] if quoted else b"a1.jsonl"
    return bytes(data)


@pytest.mark.parametrize("quoted", [True, False])
def test_members_that_share_bytes_are_an_error(tmp_path, quoted):
    (tmp_path / "a.zip").write_bytes(overlapping(quoted=quoted))
    with pytest.raises(DataError, match=r"a.zip: reading failed .*the member a\d.jsonl has bytes of another one"):
        fetch(tmp_path, "a.zip")


def test_archives_in_archives_are_skipped_and_counted(tmp_path):
    inner = make_zip({"a.jsonl": LINE})
    for _ in range(2):
        inner = make_zip({f"{number}.zip": inner for number in range(16)} | {"a.jsonl": LINE})
    (tmp_path / "42.zip").write_bytes(inner)
    facts, records = fetch(tmp_path, "42.zip")
    assert (records, facts["skipped_members"]) == (["a"], {"an archive in an archive": 16})


@pytest.mark.parametrize(("name", "make"), [("a.zip", make_zip), ("a.tar", make_tar)])
def test_more_members_than_the_limit_are_an_error_that_names_it(tmp_path, monkeypatch, name, make):
    monkeypatch.setattr("ropeway.stages.fetch.archives.MAX_MEMBERS", 3)
    (tmp_path / name).write_bytes(make({f"{number}.jsonl": LINE for number in range(3)}))
    assert len(fetch(tmp_path, name)[1]) == 3
    (tmp_path / name).write_bytes(make({f"{number}.jsonl": LINE for number in range(4)}))
    with pytest.raises(DataError, match="has more than 3 members"):
        fetch(tmp_path, name)


def test_a_directory_of_a_zip_that_is_too_long_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("ropeway.stages.fetch.archives._DIRECTORY_BYTES", 1000)
    (tmp_path / "a.zip").write_bytes(make_zip({f"{number}.jsonl": LINE for number in range(30)}))
    with pytest.raises(DataError, match="has more than"):
        fetch(tmp_path, "a.zip")


# parquet and arrow: a value that a dictionary, a run, a view or a list repeats.
BIG = "a" * (MB // 16)


def repeated(times):
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int32)), pa.array([BIG]))


def listed(values):
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def one(values):
    return pa.table({"text": ["a"], "x": values})


TABLES = {
    "a dictionary": lambda: pa.table({"text": repeated(2000)}),
    "a list of a dictionary's values": lambda: one(listed(repeated(2000))),
    "runs": lambda: pa.table({"text": pa.RunEndEncodedArray.from_arrays(pa.array([1 << 30], pa.int32()), [BIG])}),
    "nulls": lambda: pa.table({"text": pa.nulls(1 << 28)}),
    "a list of nulls": lambda: one(listed(pa.nulls(1 << 30))),
    "a list of fixed size": lambda: one(pa.FixedSizeListArray.from_arrays(pa.nulls(1 << 30), 1 << 30)),
}


def as_arrow(table):
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions()) as writer:
        writer.write_table(table)
    return sink.getvalue()


def as_parquet(table):
    sink = io.BytesIO()
    parquet.write_table(table, sink, compression="zstd", dictionary_pagesize_limit=GB)
    return sink.getvalue()


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(
    ("name", "kind"), [("a.arrow", kind) for kind in TABLES] + [("a.parquet", kind) for kind in list(TABLES)[:1]]
)
def test_rows_that_a_small_table_repeats_are_an_error_in_bounded_memory(tmp_path, name, kind):
    data = (as_arrow if name == "a.arrow" else as_parquet)(TABLES[kind]())
    found = outcome(tmp_path, name, data, ignored=["x"])
    assert (found.error, found.megabytes < 400) == ("DataError", True), found
    assert "expand to more than 1,000 times" in found.message


def test_a_row_beyond_the_limit_is_refused_before_it_is_made(tmp_path):
    (tmp_path / "a.parquet").write_bytes(as_parquet(one(listed(repeated(5000)))))
    found = run_bounded(lambda: _assert_too_long(list(iterate_objects(InputFile.of(tmp_path / "a.parquet"), ["text"]))))
    assert (found.error, found.megabytes < 700) == ("", True), found


def _assert_too_long(items):
    ((_, value),) = items
    assert isinstance(value, UnreadableError)
    assert str(value) == "record too long"


def test_sizes_of_rows_follow_their_values_in_every_layout():
    texts = ["a" * 1000, "", None, "b" * 3000]
    plain = measure_rows(pa.record_batch({"t": pa.array(texts)}))
    assert (np.diff(plain) == [-1000, 0, 3000]).all()
    flat = pa.array(texts)
    struct = pa.array([{"x": one} for one in texts])
    lists = pa.array([[one, one] for one in texts])
    for array, times in [
        (flat.cast(pa.large_string()), 1), (flat.cast(pa.string_view()), 1), (flat.dictionary_encode(), 1),
        (struct, 1), (lists, 2), (lists.cast(pa.large_list(pa.string())), 2),
        (lists.cast(pa.list_(pa.string(), 2)), 2),
        (pa.array([[("k", one)] for one in texts], pa.map_(pa.string(), pa.string())), 1),
    ]:  # fmt: skip
        for part in (array, pa.concat_arrays([array, array]).slice(4)):
            found = measure_rows(pa.record_batch([part], ["t"]))
            assert (np.diff(found) == [-1000 * times, 0, 3000 * times]).all(), array.type
    sliced = measure_rows(pa.record_batch([lists.slice(1, 2)], ["t"]))
    assert len(sliced) == 2
    assert sliced[0] == sliced[1] < plain[0]


# A server that never stops.
def test_a_download_without_an_end_is_refused_and_leaves_no_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "MAX_UNSTATED_BYTES", 3 * MB)

    class Endless:
        def read(self, size):
            return bytes(size)

    @contextmanager
    def open_from(start):
        yield Endless(), start

    endless = remote.Remote("https://example.org/a.jsonl", {"etag": "x"}, None, open_from)
    with pytest.raises(ConfigError, match="states no size and sent more than"):
        remote.download(endless, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == 0


def test_a_zip_is_read_by_the_system_and_here_alike(tmp_path):
    """An outside authority: an archive that zipfile itself finds whole is read."""
    data = make_zip({f"{number}.jsonl": LINE * number for number in range(1, 50)}, method=zipfile.ZIP_DEFLATED)
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    (tmp_path / "a.zip").write_bytes(data)
    assert len(fetch(tmp_path, "a.zip")[1]) == sum(range(1, 50))
