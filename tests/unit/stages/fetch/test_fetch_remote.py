"""Files behind https:// (here http:// on loopback) and s3:// (a real server): identity, download, what goes wrong."""

import errno
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ropeway.config.load_params import load_profile
from ropeway.config.sections import FilesSource
from ropeway.data.raw_records import iterate_records
from ropeway.runtime.boot import read_boot
from ropeway.runtime.errors import ConfigError, DataError, TemporaryError
from ropeway.runtime.manifest import digest_of, load_manifest
from ropeway.runtime.workspace import Workspace
from ropeway.stages.fetch import stage as fetch
from ropeway.stages.fetch import web
from ropeway.stages.fetch.sources import source_identity
from tests.support.archives import gz, make_tar, make_zip
from tests.support.freezing import run_fetch
from tests.support.s3_server import SECRET, S3Server
from tests.support.tiny_run import ROOT

TEXTS = [f"text {number}" * 50 for number in range(400)]
DATA = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
_, LAPTOP = load_profile(ROOT / "params.yaml", "laptop")


def source(*paths):
    return FilesSource(kind="files", paths=list(paths), rows="text", columns={}, expected_rows=None)


def run(root, *paths):
    workspace = Workspace(root, "laptop")
    profile = LAPTOP.model_copy(update={"sources": {"s": source(*paths)}, "max_refused_fraction": 0.1})
    run_fetch(workspace, profile)
    facts = load_manifest(workspace.raw, remedy="")["sources"]["s"]
    assert not (workspace.work / "fetch").exists()
    return facts, list(iterate_records(workspace.raw / "s"))


def partials(root):
    return [path for path in (root / ".work").rglob("*") if path.is_file()]


@dataclass
class Web:
    """A web server that can misbehave. `cut`: bytes of a body after which it hangs up."""

    body: bytes = DATA
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"one"'})
    status: int = 200
    cut: int | None = None
    ranges: bool = True
    head: bool = True
    head_status: int = 405
    chunked: bool = False
    head_length: int | str | None = None  # what HEAD says instead; "none": nothing
    length: bool = True
    moved_to: str = ""
    url: str = ""
    asked: list[str] = field(default_factory=list)

    def answer(self, request):
        start = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")) if self.ranges else None
        same = request.headers.get("If-Range", "-") in self.headers.values()
        begin = int(start[1]) if start and same else 0
        one = self.ranges and request.headers.get("Range") == "bytes=0-0"
        self.asked.append(f"{request.command} {begin}")
        if request.command == "HEAD" and not self.head:
            return request.send_error(self.head_status)
        if self.moved_to and urlsplit(request.path).path != "/moved.jsonl":
            request.send_response(302)
            request.send_header("Location", self.moved_to)
            request.send_header("Content-Length", "0")
            return request.end_headers()
        request.send_response(206 if (begin or one) and self.status == 200 else self.status)
        for name, value in self.headers.items():
            request.send_header(name, value)
        if begin or one:
            request.send_header("Content-Range", f"bytes {begin}-{0 if one else len(self.body) - 1}/{len(self.body)}")
        if self.chunked:
            request.send_header("Transfer-Encoding", "chunked")
        elif request.command == "HEAD" and self.head_length is not None:
            if self.head_length != "none":
                request.send_header("Content-Length", str(self.head_length))
        elif self.length:
            request.send_header("Content-Length", "1" if one else str(len(self.body) - begin))
        request.end_headers()
        if request.command == "GET":
            self.send(request, self.body[begin:][: 1 if one else self.cut])
        return None

    def send(self, request, body):
        if self.chunked:
            body = b"%x\r\n%s\r\n" % (len(body), body) + (b"" if self.cut else b"0\r\n\r\n")
        request.wfile.write(body)
        request.close_connection = True


@pytest.fixture
def served():
    site = Web()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            site.answer(self)

        def do_HEAD(self):
            site.answer(self)

        def log_message(self, *_): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}/a.jsonl"
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_file_behind_an_address_is_read_and_its_download_goes_when_the_table_is_whole(served, tmp_path):
    facts, records = run(tmp_path, served.url)
    assert records == TEXTS
    assert facts["identity"] == {"kind": "files", "files": {served.url: {"etag": '"one"', "bytes": len(DATA)}}}
    assert partials(tmp_path) == []


@pytest.mark.parametrize(("name", "pack"), [("a.zip", make_zip), ("a.tar.gz", lambda members: gz(make_tar(members)))])
def test_the_members_of_an_archive_behind_an_address_are_read(served, tmp_path, name, pack):
    served.body = pack({"train/a.jsonl": DATA, "train/b.csv": b"text\nlast\n", "c.png": b""})
    address = served.url.replace("a.jsonl", name)
    facts, records = run(tmp_path, address)
    assert records == [*TEXTS, "last"]
    assert facts["files"] == {f"{address}/train/a.jsonl": len(TEXTS), f"{address}/train/b.csv": 1}
    assert facts["first_skipped"] == [{"where": f"{address}/c.png", "reason": "no supported format"}]
    served.body, served.headers = pack({"a.jsonl": DATA + b"{"})[:-9], {"ETag": '"cut"'}
    with pytest.raises(DataError, match=re.escape(f"{address}: reading failed")):
        run(tmp_path, address)
    assert partials(tmp_path) == []  # the next run downloads it again


def test_the_identity_is_asked_by_head_and_follows_what_the_server_says(served, tmp_path):
    before = source_identity(source(served.url), tmp_path)
    assert source_identity(source(served.url), tmp_path) == before
    assert set(served.asked) == {"HEAD 0"}
    served.headers = {"ETag": '"two"'}
    assert source_identity(source(served.url), tmp_path) != before
    served.headers = {"Last-Modified": "Thu, 26 Nov 2026 00:00:00 GMT"}
    dated = source_identity(source(served.url), tmp_path)
    served.headers = {"Last-Modified": "Thu, 26 Nov 2026 00:00:01 GMT"}
    assert source_identity(source(served.url), tmp_path) != dated


@pytest.mark.parametrize("header", [{"ETag": '"one"'}, {"Last-Modified": "Thu, 26 Nov 2026 00:00:00 GMT"}])
def test_a_download_that_was_cut_is_never_taken_for_whole_and_resumes_where_it_stopped(served, tmp_path, header):
    served.headers, served.cut = header, 100_000
    with pytest.raises(TemporaryError, match=rf"ended after 100,000 of {len(DATA):,} bytes.*again.*resumes"):
        run(tmp_path, served.url)
    assert [path.name for path in partials(tmp_path)] == [f"a.jsonl.{digest_of(read_boot())[:8]}.partial"]
    assert not list((tmp_path / "runs").rglob("*.parquet"))
    served.cut, served.asked = None, []
    assert run(tmp_path, served.url)[1] == TEXTS
    assert served.asked[-1] == "GET 100000"


def test_what_changed_in_between_is_fetched_again(served, tmp_path):
    served.cut = 100_000
    with pytest.raises(TemporaryError):
        run(tmp_path, served.url)
    served.cut, served.headers, served.body = None, {"ETag": '"two"'}, DATA[:50_000].rpartition(b"\n")[0]
    assert run(tmp_path, served.url)[0]["read"] == served.body.count(b"\n") + 1


@pytest.mark.parametrize("way", [{"ranges": False}, {"headers": {"ETag": 'W/"one"'}}])
def test_where_a_server_cannot_go_on_the_file_is_asked_for_from_its_beginning(served, tmp_path, way):
    for name, value in {**way, "cut": 100_000}.items():
        setattr(served, name, value)
    with pytest.raises(TemporaryError):
        run(tmp_path, served.url)
    served.cut = None
    assert run(tmp_path, served.url)[1] == TEXTS
    assert served.asked[-1] == "GET 0"


def test_a_file_that_changes_while_it_is_fetched_is_not_mixed(served, tmp_path):
    remote = web.look_up(served.url)
    served.headers = {"ETag": '"two"'}
    with pytest.raises(TemporaryError, match="changed during the download"), remote.open_from(0):
        pass
    known = source_identity(source(served.url), tmp_path)
    served.headers = {"ETag": '"three"'}
    with pytest.raises(TemporaryError, match="changed during the download"):
        list(fetch.open_source(source(served.url), Workspace(tmp_path, "laptop"), known))


def test_a_server_that_answers_get_only_or_without_a_length_is_read(served, tmp_path):
    served.head, served.chunked = False, True
    assert run(tmp_path, served.url)[1] == TEXTS
    served.cut = 100_000
    with pytest.raises(TemporaryError, match=r"the connection ended early .IncompleteRead."):
        run(tmp_path, served.url)


def test_a_cut_download_is_found_by_the_length_that_get_alone_states(served, tmp_path):
    served.head_length, served.cut = "none", 100_000
    with pytest.raises(TemporaryError, match="the connection ended 59,700 bytes too early"):
        run(tmp_path, served.url)
    served.cut = None
    assert run(tmp_path, served.url)[1] == TEXTS


def test_a_server_that_states_no_length_at_all_is_refused(served, tmp_path):
    served.head_length, served.length = "none", False
    with pytest.raises(ConfigError, match="states no length"):
        run(tmp_path, served.url)


def test_head_and_get_of_different_lengths_are_not_one_file(served, tmp_path):
    served.head_length = 320
    with pytest.raises(TemporaryError, match=r"announced 320 bytes .* 159,700 bytes"):
        run(tmp_path, served.url)


@pytest.mark.parametrize(
    ("status", "error", "phrase"),
    [
        (404, ConfigError, "responded 404; correct `paths`"),
        (401, ConfigError, "responded 401; .*login.*download"),
        (403, ConfigError, "responded 403"),
        (410, ConfigError, "responded 410"),
        (429, TemporaryError, "responded 429; try again later"),
        (500, TemporaryError, "responded 500; try again later"),
        (503, TemporaryError, "responded 503; try again later"),
    ],
)
def test_what_a_server_refuses_is_reported(served, tmp_path, status, error, phrase):
    served.status = status
    with pytest.raises(error, match=phrase):
        source_identity(source(served.url), tmp_path)


def test_a_server_that_tells_no_version_is_refused_since_new_data_would_not_be_noticed(served, tmp_path):
    served.headers = {}
    with pytest.raises(ConfigError, match="neither ETag nor Last-Modified"):
        source_identity(source(served.url), tmp_path)


def test_a_file_sent_as_another_coding_is_refused_and_gz_stays_gz(served, tmp_path):
    served.body = gz(DATA)
    served.headers = {"ETag": '"one"', "Content-Encoding": "gzip"}
    with pytest.raises(ConfigError, match="Content-Encoding gzip, expected identity"):
        run(tmp_path, served.url)
    assert run(tmp_path, served.url + ".gz")[1] == TEXTS


def test_a_damaged_file_is_named_by_its_address_and_fetched_again_next_time(served, tmp_path):
    served.body = gz(DATA)[:-9]
    with pytest.raises(DataError, match=rf"^{served.url}.gz: reading failed after"):
        run(tmp_path, served.url + ".gz")
    assert partials(tmp_path) == []


def test_a_redirect_is_followed_as_head_and_never_to_where_one_can_listen(served, tmp_path):
    served.moved_to = "/moved.jsonl"
    assert run(tmp_path, served.url)[1] == TEXTS
    assert {"HEAD 0", "GET 0"} == set(served.asked)
    for target, phrase in (
        ("http://example.com/a.jsonl", "http is not authenticated; use https"),
        ("ftp://example.com/a.jsonl", "expected https://host/path|responded 302"),
    ):
        served.moved_to = target
        with pytest.raises(ConfigError, match=phrase):
            source_identity(source(served.url), tmp_path)


@pytest.mark.parametrize(
    ("address", "phrase"),
    [
        ("http://example.com/a.jsonl", "http is not authenticated; use https"),
        ("https://name:hunter2@example.com/a.jsonl", "password must not be in params.yaml"),
        ("https:///a.jsonl", "expected https://host/path"),
        ("gs://bucket/a.jsonl", "'gs://…' is not supported; expected https:// or s3://"),
        ("s3://b/a.jsonl", "expected s3://bucket/prefix"),
    ],
)
def test_an_address_that_is_not_plain_is_refused_and_no_secret_of_it_is_shown(tmp_path, address, phrase):
    with pytest.raises(ConfigError, match=phrase) as caught:
        source_identity(source(address), tmp_path)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("status", [400, 403, 404, 405, 501])
@pytest.mark.parametrize("ranges", [True, False])
def test_an_address_that_was_signed_for_get_alone_is_asked_for_one_byte(served, tmp_path, status, ranges):
    served.head, served.head_status, served.ranges = False, status, ranges
    address = f"{served.url}?X-Amz-Signature=one"
    facts, records = run(tmp_path, address)
    assert records == TEXTS
    assert facts["identity"]["files"] == {served.url: {"etag": '"one"', "bytes": len(DATA)}}
    assert served.asked[:2] == ["HEAD 0", "GET 0"]


def test_another_signature_is_the_same_data_and_another_file_is_not(served, tmp_path):
    one, two, other = (
        source_identity(source(f"{served.url}?{query}"), tmp_path) for query in ("sig=1", "sig=2", "file=2")
    )
    assert one == two != other


def test_what_stands_behind_the_question_mark_is_shown_nowhere(served, tmp_path, capsys):
    facts, _ = run(tmp_path, f"{served.url}?file=hunter2")
    (name,) = facts["identity"]["files"]
    assert re.fullmatch(rf"{served.url}\?[0-9a-f]{{8}}", name)
    facts, _ = run(tmp_path, f"{served.url}?signature=hunter2&expires=9")
    assert list(facts["identity"]["files"]) == [served.url]
    served.body = b""
    with pytest.raises(DataError, match="contains 0 records") as caught:
        run(tmp_path, f"{served.url}?signature=hunter2")
    assert "hunter2" not in str(caught.value) + capsys.readouterr().out
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]


def test_no_server_is_reported_at_once(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(TemporaryError, match=r"cannot be reached .ConnectionRefusedError."):
            source_identity(source(f"http://127.0.0.1:{closed.getsockname()[1]}/a.jsonl"), tmp_path)


def full(handle):
    """Stand in for fsync on a disk that has no room for downloads."""
    if "/.work/fetch/" in str(Path(f"/proc/self/fd/{handle}").readlink()):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_during_a_download_is_reported_and_the_download_continues_later(
    served, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("ropeway.stages.fetch.remote.os.fsync", full)
        with pytest.raises(TemporaryError, match=r"the disk is full.*kept in .*\.work/fetch/.*Free space and run"):
            run(tmp_path, served.url)
    assert [path.suffix for path in partials(tmp_path)] == [".partial"]
    assert run(tmp_path, served.url)[1] == TEXTS


@pytest.fixture
def objects(s3_url):
    """The fresh prefix and a way to put objects below it."""
    from ropeway.storage.s3_client import make_client, split_url

    bucket, prefix = split_url(s3_url)
    client = make_client()

    def put(name, data):
        client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=data)

    return s3_url, put


def test_objects_of_a_real_s3_server_are_read_by_key_and_by_glob(objects, tmp_path):
    url, put = objects
    for name, data in (("a.jsonl", DATA), ("deep/b.jsonl.gz", gz(DATA)), ("c.txt", b"x")):
        put(name, data)
    assert run(tmp_path, f"{url}/a.jsonl")[1] == TEXTS
    facts, records = run(tmp_path, f"{url}/**/*.jsonl*")
    assert records == TEXTS * 2
    assert list(facts["identity"]["files"]) == [f"{url}/a.jsonl", f"{url}/deep/b.jsonl.gz"]


def test_a_new_object_and_a_changed_one_change_the_identity(objects, tmp_path):
    url, put = objects
    put("a.jsonl", DATA)
    one = source(f"{url}/*.jsonl")
    before = source_identity(one, tmp_path)
    assert source_identity(one, tmp_path) == before
    put("b.jsonl", DATA)
    more = source_identity(one, tmp_path)
    put("b.jsonl", DATA[::-1])
    assert len({json.dumps(identity) for identity in (before, more, source_identity(one, tmp_path))}) == 3


def test_a_download_from_s3_resumes_where_it_stopped(objects, tmp_path, monkeypatch):
    url, put = objects
    put("a.jsonl", DATA)
    begun = []

    def cut(stream, left):
        begun.append(left)
        yield stream.read(50_000)

    with monkeypatch.context() as patch:
        patch.setattr("ropeway.stages.fetch.remote._read_blocks", cut)
        with pytest.raises(TemporaryError, match=rf"{url}/a.jsonl: the connection ended after 50,000 of"):
            run(tmp_path, f"{url}/a.jsonl")
        with pytest.raises(TemporaryError, match="ended after 100,000 of"):
            run(tmp_path, f"{url}/a.jsonl")
    assert begun == [len(DATA), len(DATA) - 50_000]
    assert run(tmp_path, f"{url}/a.jsonl")[1] == TEXTS


def test_an_object_overwritten_while_it_is_fetched_is_not_mixed(objects, tmp_path, monkeypatch):
    from ropeway.stages.fetch import objects as door

    url, put = objects
    put("a.jsonl", DATA)
    (remote,) = door.look_up(f"{url}/a.jsonl")
    put("a.jsonl", DATA[::-1])
    with pytest.raises(TemporaryError, match="changed during the download"), remote.open_from(0):
        pass
    monkeypatch.setattr("ropeway.stages.fetch.remote.os.fsync", full)
    with pytest.raises(TemporaryError, match="the disk is full"):
        run(tmp_path, f"{url}/a.jsonl")


def test_what_s3_does_not_hold_or_show_is_reported(objects, s3_server: S3Server, tmp_path, monkeypatch):
    url, _ = objects
    for path, phrase in (
        (f"{url}/a.jsonl", "does not exist; upload it or correct `paths`"),
        (f"{url}/*.jsonl", "matches no object; upload it or correct `paths`"),
        (url.partition("/tests")[0] + "/no-such-bucket/a.jsonl", "does not exist|Create the bucket"),
    ):
        with pytest.raises(ConfigError, match=phrase):
            source_identity(source(path), tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    with pytest.raises(ConfigError, match=r"AWS_PROFILE|permission") as caught:
        source_identity(source(f"{url}/a.jsonl"), tmp_path)
    assert SECRET not in str(caught.value)
    assert s3_server.process.poll() is None
