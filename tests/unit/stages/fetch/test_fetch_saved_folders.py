"""Folders of `datasets`, of which one was written by datasets 5.2 itself; arrow files; whole files as documents."""

import io
import json
import shutil
import struct
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

from ropeway.config.sections import HuggingfaceSource
from ropeway.runtime.errors import ConfigError, DataError
from ropeway.stages.fetch.sources import find_changes, local_files, source_identity
from tests.support.archives import gz, make_tar, make_zip
from tests.support.fetching import fetch, fetch_source, files_source
from tests.support.hub_world import REPO, Hub, point_at, serve_hub

# Of DatasetDict(train: 6 chats in an order of shuffle(seed=3), 2 shards; test: 3 chats).save_to_disk, datasets 5.2.0.
SAVED = Path(__file__).with_name("saved_by_datasets.zip")
TRAIN, TEST = [2, 5, 4, 1, 3, 0], [6, 7, 8]  # in the order of datasets' own load_from_disk


def numbers(records):
    return [int(talk.turns[0].split()[2]) for talk in records]


def stream(rows, *, options=None, batch=2):
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=batch)
    return sink.getvalue()


def texts(*values):
    return [{"text": value} for value in values]


def save(folder, shards, *, names=None, **state):
    """A saved folder of these shards of texts."""
    folder.mkdir(parents=True)
    names = names or [f"data-{n:05d}-of-{len(shards):05d}.arrow" for n in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        (folder / name).write_bytes(stream(texts(*rows)))
    listed = {"_data_files": [{"filename": name} for name in names], "_format_columns": None, **state}
    (folder / "state.json").write_text(json.dumps(listed))
    (folder / "dataset_info.json").write_text('{"features": {}}')


@pytest.fixture
def saved(tmp_path):
    with zipfile.ZipFile(SAVED) as archive:
        archive.extractall(tmp_path / "talks")
    return tmp_path


def chats(root, *paths, **options):
    return fetch(root, *paths, rows="messages", ignored=["source"], **options)


def test_a_split_that_datasets_wrote_is_read_in_its_order(saved):
    facts, records = chats(saved, "talks/train")
    assert numbers(records) == TRAIN
    assert facts["files"] == {f"talks/train/data-0000{n}-of-00002.arrow": 3 for n in range(2)}
    assert list(facts["identity"]["files"]) == [*facts["files"], "talks/train/state.json"]
    assert facts["ignored_keys"] == {"source": 6}
    assert numbers(chats(saved, "talks/test/")[1]) == TEST


def test_a_folder_of_several_splits_obeys_the_rule_of_patterns(saved):
    with pytest.raises(ConfigError, match=r"'talks' matches files of several splits .*`splits: \[test, train\]`"):
        chats(saved, "talks")
    assert numbers(chats(saved, "talks", splits=["train", "test"])[1]) == TEST + TRAIN
    shutil.rmtree(saved / "talks" / "test")
    with pytest.raises(ConfigError, match="lists the split 'test', which is no saved folder"):
        chats(saved, "talks")


@pytest.mark.parametrize("way", ["folder", "hub"])
def test_a_folder_of_one_split_is_read_whichever_it_is(saved, monkeypatch, way):
    shutil.rmtree(saved / "talks" / "train")
    (saved / "talks" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    if way == "folder":
        assert numbers(chats(saved, "talks")[1]) == TEST
        return
    files = {path.relative_to(saved).as_posix(): path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    with serve_hub(Hub(files)) as served:
        point_at(monkeypatch, saved / "cache", url=served.url)
        assert numbers(fetch_source(saved, hub_source("talks"))[1]) == TEST


def test_globs_read_saved_folders_and_their_files_once(saved):
    (saved / "talks" / "train" / "cache-1.arrow").write_bytes(stream(texts("cached")))
    assert numbers(chats(saved, "talks/tr*")[1]) == TRAIN
    assert numbers(chats(saved, "talks/train/data-*.arrow")[1]) == TRAIN
    with pytest.raises(ConfigError, match=r"cache-1.arrow is not one of the data files that .*state.json lists"):
        chats(saved, "talks/train/*.arrow")
    (saved / "talks" / "train" / "cache-1.arrow").unlink()
    assert numbers(chats(saved, "talks/train/*")[1]) == TRAIN
    assert numbers(chats(saved, "tal*/**/*", splits=["train", "test"])[1]) == TEST + TRAIN


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_a_saved_folder_in_an_archive_is_read(saved, name):
    with zipfile.ZipFile(SAVED) as archive:
        members = {f"talks/{one}": archive.read(one) for one in archive.namelist() if not one.endswith("/")}
    write = make_zip if name == "a.zip" else make_tar
    (saved / name).write_bytes(write(members))
    facts, records = chats(saved, f"{name}/talks/train/*")
    assert numbers(records) == TRAIN
    assert facts["skipped_members"] == {"metadata of a saved folder": 2}
    assert numbers(chats(saved, name, splits=["train", "test"])[1]) == TEST + TRAIN
    (saved / name).write_bytes(
        write({**members, "talks/train/cache-1.arrow": members["talks/test/data-00000-of-00001.arrow"]})
    )
    with pytest.raises(ConfigError, match=r"cache-1.arrow is not one of the data files"):
        chats(saved, f"{name}/talks/train/*")
    del members["talks/train/data-00000-of-00002.arrow"]
    (saved / name).write_bytes(write(members))
    with pytest.raises(ConfigError, match=r"lists data-00000-of-00002.arrow, which the archive lacks"):
        chats(saved, name, splits=["train", "test"])


def test_an_indices_mapping_is_refused_wherever_the_folder_is(tmp_path):
    save(tmp_path / "one", [["a"]], _indices_data_files=[{"filename": "indices.arrow"}])
    (tmp_path / "one" / "indices.arrow").write_bytes(stream([{"indices": 0}]))
    members = {path.name: path.read_bytes() for path in sorted((tmp_path / "one").iterdir())}
    (tmp_path / "a.zip").write_bytes(make_zip(members))
    (tmp_path / "a.tar").write_bytes(make_tar(members))
    for path in ("one", "one/*.arrow", "one/data-*.arrow", "a.zip/data*", "a.tar/data*", "a.zip", "a.tar"):
        with pytest.raises((ConfigError, DataError), match=r"an indices mapping|no column \['text'\]"):
            fetch(tmp_path, path)
    (tmp_path / "a.tar").write_bytes(make_tar({**members, "b.jsonl": b'{"text": "b"}'}))
    assert fetch(tmp_path, "a.tar/*.jsonl")[1] == ["b"]
    save(tmp_path / "two", [["a"], ["b"]], _indices_data_files=None, _indices_files=[])
    assert fetch(tmp_path, "two")[1] == ["a", "b"]


@pytest.mark.parametrize("listed", ["../a.arrow", "/a.arrow", "a.jsonl", "x/a.arrow", ""])
def test_a_state_that_lists_other_than_arrow_files_beside_it_is_refused(tmp_path, listed):
    save(tmp_path / "one", [["a"]], _data_files=[{"filename": listed}])
    with pytest.raises(ConfigError, match=r"state.json: lists '.*', expected names of .arrow files beside it"):
        fetch(tmp_path, "one")


def test_a_listed_file_that_is_missing_is_reported(tmp_path):
    save(tmp_path / "one", [["a"], ["b"]])
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ConfigError, match=r"lists data-00001-of-00002.arrow, which does not exist"):
        fetch(tmp_path, "one")


def test_a_link_out_of_a_saved_folder_is_refused(tmp_path):
    save(tmp_path / "elsewhere", [["a"]])
    root = tmp_path / "root"
    root.mkdir()
    save(root / "one", [["a"]])
    (root / "one" / "data-00000-of-00001.arrow").unlink()
    (root / "one" / "data-00000-of-00001.arrow").symlink_to(tmp_path / "elsewhere" / "data-00000-of-00001.arrow")
    with pytest.raises(ConfigError, match=r"is a link to .*outside the workspace"):
        fetch(root, "one")
    (root / "two").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"is a link to .*outside the workspace"):
        fetch(root, "two")


def test_a_state_json_of_something_else_has_records(tmp_path):
    (tmp_path / "state.json").write_text('[{"text": "a"}]')
    (tmp_path / "a.zip").write_bytes(make_zip({"state.json": b'[{"text": "b"}]'}))
    assert fetch(tmp_path, "state.json", "a.zip")[1] == ["b", "a"]


def test_the_identity_has_the_arrow_files_and_the_state_and_sees_their_changes(tmp_path):
    save(tmp_path / "one", [["a"], ["b"]])
    source = files_source("one")
    before = source_identity(source, tmp_path)
    assert find_changes(source, before, tmp_path) == []
    assert len(local_files(source, tmp_path)) == len(before["files"]) == 3
    shutil.rmtree(tmp_path / "one")
    save(tmp_path / "one", [["a"], ["b"]], _fingerprint="other")
    assert find_changes(source, before, tmp_path) == ["one/state.json"]


BIG = texts(*(f"{n} " * 50 for n in range(700)))
WHOLE = stream(BIG, batch=100)


def as_file(rows):
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        WHOLE,
        as_file(BIG),
        stream(BIG, options=pa.ipc.IpcWriteOptions(compression="zstd")),
        stream(BIG, options=pa.ipc.IpcWriteOptions(use_legacy_format=True)),
        stream(BIG, batch=10_000),
    ],
    ids=["stream", "file", "compressed", "before 0.15", "one batch"],
)
def test_an_arrow_file_of_each_kind_is_read(tmp_path, data):
    (tmp_path / "a.arrow").write_bytes(data)
    facts, records = fetch(tmp_path, "a.arrow")
    assert records == [row["text"] for row in BIG]
    assert facts["refused"] == {}


def test_bad_utf8_in_an_arrow_file_is_counted_by_row(tmp_path):
    binary = pa.array([b"ok", b"\xff\xfe", b"ok"], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, binary.buffers())})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "a.arrow").write_bytes(sink.getvalue())
    facts, records = fetch(tmp_path, "a.arrow")
    assert (records, facts["first_refused"]) == (["ok", "ok"], [{"where": "a.arrow: row 2", "reason": "bad UTF-8"}])


def no_rows():
    sink = io.BytesIO()
    pa.ipc.new_stream(sink, pa.schema([("text", pa.string())])).close()
    return sink.getvalue()


def cut_between_batches():
    """All of a stream but its last batch and its end marker."""
    reader = pa.ipc.open_stream(WHOLE)
    sink = io.BytesIO()
    writer = pa.ipc.new_stream(sink, reader.schema)
    for _ in range(6):
        writer.write_batch(reader.read_next_batch())
    data = sink.getvalue()
    writer.close()
    return data


@pytest.mark.parametrize(
    ("data", "phrase"),
    [
        (b"", "no arrow data, or truncated"),
        (b'{"text": "a"}\n', "no arrow data, or truncated"),
        (WHOLE[:-8], "end marker of an arrow stream is missing"),
        (WHOLE[: len(WHOLE) // 2], "end marker of an arrow stream is missing"),
        (cut_between_batches(), "end marker of an arrow stream is missing"),
        (WHOLE[: len(WHOLE) // 2] + WHOLE[-8:], "reading failed after"),
        (as_file(BIG)[:-20], "reading failed after 0 records"),
        (stream([{"TEXT": "a"}]), r"no column \['text'\]; found \['TEXT'\]"),
        (no_rows(), "contains 0 records"),
    ],
)
def test_a_broken_arrow_file_is_an_error_that_names_it(tmp_path, data, phrase):
    (tmp_path / "a.arrow").write_bytes(data)
    with pytest.raises(DataError, match=phrase):
        fetch_source(tmp_path, files_source("a.arrow"), limit=0.0)


def test_damaged_offsets_and_names_in_an_arrow_file_are_errors_and_never_followed(tmp_path):
    """pyarrow would read outside of the mapped file: this process would end."""
    offsets = WHOLE.index(struct.pack("<3i", 0, 100, 200))
    for begin, data, phrase in (
        (offsets + 4, struct.pack("<i", 1 << 30), "reading failed after 0 records"),
        (offsets + 8, struct.pack("<i", -5), "reading failed after 1 records"),
        (WHOLE.index(b"text"), b"te\xfft", "reading failed after 0 records"),
    ):
        (tmp_path / "a.arrow").write_bytes(WHOLE[:begin] + data + WHOLE[begin + len(data) :])
        with pytest.raises(DataError, match=phrase):
            fetch(tmp_path, "a.arrow")


def test_two_columns_of_one_name_are_an_error(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "a.arrow").write_bytes(sink.getvalue())
    with pytest.raises(DataError, match=r"has the columns \['text'\] more than once"):
        fetch(tmp_path, "a.arrow")


def test_an_arrow_file_behind_an_address_is_refused_with_the_way_out(tmp_path, monkeypatch):
    from ropeway.stages.fetch import sources, web

    class Remote:
        name = "https://host/a.arrow"

    monkeypatch.setattr(web, "look_up", lambda _: Remote)
    with pytest.raises(ConfigError, match=r"https://host/a.arrow: the state.json .* upload the folder as a .tar"):
        sources.resolve_paths(["https://host/a.arrow"], tmp_path)


def hub_source(*files, rows="messages", splits=()):
    return HuggingfaceSource(
        kind="huggingface",
        repo=REPO,
        revision="main",
        files=list(files),
        rows=rows,
        columns={},
        expected_rows=None,
        ignored_keys=["source"],
        splits=list(splits),
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with zipfile.ZipFile(SAVED) as archive:
        members = {one: archive.read(one) for one in archive.namelist() if not one.endswith("/")}
    files = {f"talks/{name}": data for name, data in members.items()}
    files |= {"talks.zip": SAVED.read_bytes(), "README.md": b"# Talks"}
    with serve_hub(Hub(files)) as served:
        point_at(monkeypatch, tmp_path / "cache", url=served.url)
        yield served


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("talks/train", TRAIN),
        ("talks/test/", TEST),
        ("talks/train/*.arrow", TRAIN),
        ("talks/train/*", TRAIN),
        ("talks.zip/train/*", TRAIN),
        ("*.zip/test/*.arrow", TEST),
    ],
)
@pytest.mark.usefixtures("hub")
def test_saved_folders_and_archives_of_the_hub_are_read(tmp_path, pattern, expected):
    assert numbers(fetch_source(tmp_path, hub_source(pattern))[1]) == expected


@pytest.mark.parametrize("pattern", ["talks", "talks.zip", "talks/**"])
@pytest.mark.usefixtures("hub")
def test_several_splits_of_the_hub_obey_the_rule_of_patterns(tmp_path, pattern):
    with pytest.raises(ConfigError, match="files of several splits"):
        fetch_source(tmp_path, hub_source(pattern))
    assert numbers(fetch_source(tmp_path, hub_source(pattern, splits=["train", "test"]))[1]) == TEST + TRAIN


def test_an_arrow_file_of_the_hub_that_a_saved_folder_does_not_list_has_no_rows(hub, tmp_path):
    hub.files["talks/train/cache-1.arrow"] = hub.files["talks/test/data-00000-of-00001.arrow"]
    with pytest.raises(ConfigError, match=r"cache-1.arrow is not one of the data files"):
        fetch_source(tmp_path, hub_source("talks/train/*.arrow"))  # before state.json is in the cache
    assert numbers(fetch_source(tmp_path, hub_source("talks/train"))[1]) == TRAIN


def test_a_shard_that_the_repository_lacks_is_reported(hub, tmp_path):
    del hub.files["talks/train/data-00000-of-00002.arrow"]
    with pytest.raises(ConfigError, match=r"lists data-00000-of-00002.arrow, which does not exist"):
        fetch_source(tmp_path, hub_source("talks/train"))


@pytest.mark.usefixtures("hub")
def test_a_whole_file_of_the_hub_is_a_document(tmp_path):
    assert fetch_source(tmp_path, hub_source("*.md", rows="text"))[1] == ["# Talks"]


# (what, name, bytes, record or (reason,)) of a file that is one document.
DOCUMENTS = [
    ("text", "a.txt", b"one\ntwo\n", "one\ntwo\n"),
    ("markdown", "a.md", b"# T\n\n- x\n", "# T\n\n- x\n"),
    ("gzip", "a.txt.gz", gz(b"a"), "a"),
    ("empty", "a.txt", b"", ""),
    ("byte order mark", "a.txt", b"\xef\xbb\xbfa", "a"),
    ("CRLF is kept", "a.txt", b"a\r\nb", "a\r\nb"),
    ("JSON is text", "a.txt", b'{"text": "a"}', '{"text": "a"}'),
    ("bad UTF-8", "a.txt", b"\xff", ("bad UTF-8",)),
    ("NUL", "a.txt", b"a\0", ("NUL",)),
]


@pytest.mark.parametrize(
    ("name", "data", "expected"), [row[1:] for row in DOCUMENTS], ids=[row[0] for row in DOCUMENTS]
)
def test_a_text_file_is_one_document(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    facts, records = fetch(tmp_path, name)
    if isinstance(expected, tuple):
        assert (records, facts["first_refused"]) == ([], [{"where": name, "reason": expected[0]}])
    else:
        assert records == [expected]


def test_documents_are_in_the_order_of_their_paths(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.txt", "a.txt"):
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "docs" / name).write_text(name)
    facts, records = fetch(tmp_path, "docs/**/*")
    assert records == ["a.txt", "a/b/c.txt", "a/z.md", "b.txt"]
    assert list(facts["files"]) == [f"docs/{name}" for name in records]


def test_a_document_longer_than_any_record_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("ropeway.stages.fetch.files.MAX_RECORD_SIZE", 10)
    (tmp_path / "a.txt").write_bytes(b"a" * 10)
    (tmp_path / "b.txt").write_bytes(b"b" * 11)
    facts, records = fetch(tmp_path, "*.txt")
    assert (records, facts["refused"]) == (["a" * 10], {"record too long": 1})


def test_a_document_in_a_source_of_other_rows_or_columns_is_an_error_before_anything_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"a.txt: a .txt or .md file is one document, .* rows: alpaca"):
        source_identity(files_source("a.txt", rows="alpaca"), tmp_path)
    with pytest.raises(DataError, match=r"a.txt: is one document with the column text, expected \['body'\]"):
        fetch(tmp_path, "a.txt", columns={"text": "body"})
    (tmp_path / "b.txt").write_bytes("a".encode("utf-16"))
    with pytest.raises(DataError, match="expected UTF-8 text, found UTF-16"):
        fetch(tmp_path, "b.txt")
