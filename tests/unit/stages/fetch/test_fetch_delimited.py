"""csv and tsv: what each row becomes, or under which reason it is counted; what is an error of the file."""

import csv
import io
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropeway.models.conversation import Conversation
from ropeway.runtime.errors import DataError
from ropeway.stages.fetch.decompress import InputFile
from ropeway.stages.fetch.files import iterate_objects
from ropeway.stages.fetch.values import UnreadableError
from tests.support.archives import gz
from tests.support.fetching import fetch

H = b"text,n\n"
# (what, bytes after the header `text,n`, texts that are kept, reasons)
ROWS = [
    ("plain", b"a,\nb,\n", ["a", "b"], {}),
    ("no newline at the end", b"a,", ["a"], {}),
    ("CRLF", b"a,\r\nb,\r\n", ["a", "b"], {}),
    ("blank lines", b"\n\na,\n\n", ["a"], {}),
    ("a quoted comma", b'"a, b",\n', ["a, b"], {}),
    ("a quoted quote", b'"say ""a""",\n', ['say "a"'], {}),
    ("a quoted line end", b'"a\nb",\nc,\n', ["a\nb", "c"], {}),
    ("a quoted CRLF is kept", b'"a\r\nb",\r\n', ["a\r\nb"], {}),
    ("a quoted blank line is kept", b'"a\n\nb",\n', ["a\n\nb"], {}),
    ("a quote inside an unquoted field", b'5" pipe,\n', ['5" pipe'], {}),
    ("white space is kept", b" a ,\n", [" a "], {}),
    ("an empty text is an empty document", b",\na,\n", ["", "a"], {}),
    ("too few fields", b"a\nb,\n", ["b"], {"too few fields": 1}),
    ("too many fields", b"a,,\nb,\n", ["b"], {"too many fields": 1}),
    ("text after a closing quote", b'"a"b,\nc,\n', ["c"], {"bad quoting": 1}),
    ("bad UTF-8", b"\xff,\nb,\n", ["b"], {"bad UTF-8": 1}),
    ("Latin-1", "für,\nb,\n".encode("latin-1"), ["b"], {"bad UTF-8": 1}),
    ("a surrogate as UTF-8", b"\xed\xa0\x80,\nb,\n", ["b"], {"bad UTF-8": 1}),
    ("bad UTF-8 in another column", b"a,\xff\nb,\n", ["b"], {"bad UTF-8": 1}),
    ("NUL", b"a\0,\nb,\n", ["b"], {"NUL": 1}),
    ("a value that is not read", b"a,7\nb,\n", ["b"], {"unused field 'n'": 1}),
    ("U+2028 and U+0085 are no line ends", "a\u2028b\u0085c,\n".encode(), ["a\u2028b\u0085c"], {}),
]
# (what, name, bytes, phrase): the file as a whole cannot be read.
BROKEN = [
    ("empty", "a.csv", b"", "no column"),
    ("no header", "a.csv", b"some,row\n", r"no column \['text'\]; the first row, which must be a header, has"),
    ("only a header", "a.csv", H, "contains 0 records"),
    ("a header with a name twice", "a.csv", b"text,text\na,b\n", r"the header has \['text'\] more than once"),
    ("a header of bad UTF-8", "a.csv", b"text,\xff\na,b\n", "a.csv:1: bad UTF-8, expected a header"),
    ("a header with bad quoting", "a.csv", b'"text"x,n\na,b\n', "a.csv:1: bad quoting, expected a header"),
    ("semicolons", "a.csv", b"text;n\na;b\n", r"Columns seem to be separated by ';'.*separate columns by ','"),
    ("tabs in a csv", "a.csv", b"text\tn\na\tb\n", "Columns seem to be separated by tabs"),
    ("commas in a tsv", "a.tsv", H + b"a,b\n", "Columns seem to be separated by ','.*separate columns by tabs"),
    ("a quote that is not closed", "a.csv", H + b'a,\n"b,\nc,\n', r"a.csv:3: a quote that begins in this row is not"),
    ("CR alone", "a.csv", b"text,n\ra,b\r", "a.csv:1: bad quoting, expected a header"),
    ("UTF-16", "a.csv", "text\na\n".encode("utf-16"), "expected UTF-8 text, found UTF-16"),
    ("gzip by content only", "a.csv", gz(H), "found gzip data"),
    ("gzip cut", "a.csv.gz", gz(H + b"a,\n" * 999)[:-4], "reading failed after 999 records"),
]


@pytest.mark.parametrize(("data", "kept", "refused"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_each_row_is_kept_or_counted(tmp_path, name, data, kept, refused):
    if name == "a.tsv":
        data, kept = data.replace(b",", b"\t"), [text.replace(",", "\t") for text in kept]
    (tmp_path / name).write_bytes(H.replace(b",", b"\t" if name == "a.tsv" else b",") + data)
    facts, records = fetch(tmp_path, name)
    assert (records, facts["refused"]) == (kept, refused)


@pytest.mark.parametrize(("name", "data", "phrase"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_file_that_is_no_table_is_an_error_that_names_it(tmp_path, name, data, phrase):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=phrase) as caught:
        fetch(tmp_path, name)
    assert name in str(caught.value)
    assert not list((tmp_path / "runs").rglob("*.parquet"))


def test_a_refused_row_is_located_by_its_first_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(H + b'"a\nb\nc",\n\n"d\ne",too,many\nf\n')
    shown = fetch(tmp_path, "a.csv")[0]["first_refused"]
    assert [(one["where"], one["reason"]) for one in shown] == [
        ("a.csv:6", "too many fields"),
        ("a.csv:8", "too few fields"),
    ]


def test_an_empty_field_is_no_value_and_an_ignored_key_is_counted_only_where_it_has_one(tmp_path):
    (tmp_path / "a.csv").write_bytes(H + b"a,\nb,3\nc,\n")
    facts, records = fetch(tmp_path, "a.csv", ignored=["n"])
    assert (records, facts["ignored_keys"]) == (["a", "b", "c"], {"n": 1})


def test_columns_are_mapped_and_an_empty_optional_column_is_missing(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbfid,question,input,reply\n1,q,,a\n2,q,"x\ny",a\n3,,,a\n4,q,,\n'  # Excel writes the mark
    )
    columns = {"instruction": "question", "output": "reply"}
    facts, records = fetch(tmp_path, "a.csv", rows="alpaca", columns=columns)
    assert records == [Conversation(("q", "a")), Conversation(("q\n\nx\ny", "a"))]
    assert facts["refused"] == {"empty turn": 2}


def test_a_text_longer_than_the_csv_modules_own_limit_is_read(tmp_path):
    csv.field_size_limit(131072)
    long = "word " * 100_000
    (tmp_path / "a.csv").write_text(f'text,n\n"{long}",\n')
    assert fetch(tmp_path, "a.csv")[1] == [long]


def test_a_quote_that_opens_more_than_a_record_may_have_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("ropeway.stages.fetch.delimited.MAX_RECORD_SIZE", 100)
    (tmp_path / "a.csv").write_bytes(H + b'ok,\n"b,\n' + b"c,\n" * 100)
    with pytest.raises(DataError, match=r"a.csv:3: a quote that begins in this row is not closed within 1\d\d char"):
        fetch(tmp_path, "a.csv")
    (tmp_path / "a.csv").write_bytes(H + b"c" * 200 + b",\n")
    with pytest.raises(DataError, match="a line has more than 100 bytes"):
        fetch(tmp_path, "a.csv")


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1), st.sampled_from([",", "\t"]), st.sampled_from(["\n", "\r\n"]))
def test_what_pythons_writer_writes_is_read_back(tmp_path_factory, rows, delimiter, end):
    sink = io.StringIO()
    csv.writer(sink, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([("one", "two"), *rows])
    path = tmp_path_factory.mktemp("csv") / ("a.csv" if delimiter == "," else "a.tsv")
    path.write_bytes(sink.getvalue().encode())
    found = [value for _, value in iterate_objects(InputFile.of(path), ["one"])]
    assert found == [{"one": one, "two": two} for one, two in rows]


@given(st.binary(max_size=60))
def test_any_bytes_are_rows_reasons_or_an_error_of_the_file(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(b"text,n\n" + data)
    try:
        found = [value for _, value in iterate_objects(InputFile.of(path), ["text"])]
    except DataError:
        return
    for value in found:
        assert isinstance(value, UnreadableError) or value.keys() == {"text", "n"}


def test_ten_times_the_file_is_read_in_the_same_memory(tmp_path):
    def peak(times):
        (tmp_path / "a.csv").write_bytes(H + b'"word word\nword",\n' * times)
        tracemalloc.start()
        try:
            assert sum(1 for _ in iterate_objects(InputFile.of(tmp_path / "a.csv"), ["text"])) == times
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    assert peak(20_000) < peak(2_000) + 100_000
