"""A small S3 server in this process that misbehaves on purpose: it ignores preconditions, conflicts, or forbids.

It can refuse keys as expired, list an older state, speak TLS, and send its answers byte by byte.
No real store at hand does this offline (rclone's `serve s3` ignores preconditions, and is not installable from PyPI).
"""

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

ERROR = "<Error><Code>{code}</Code><Message>canary-message</Message></Error>"
EPOCH = datetime(2026, 11, 30, tzinfo=UTC)


class FakeS3(ThreadingHTTPServer):
    """In memory; what it does wrong is set on it.

    Attributes:
        honours_put: Whether If-None-Match is looked at on PutObject.
        honours_complete: Whether it is on CompleteMultipartUpload.
        answers: What the next conditional puts are answered with, instead of being done: (status, code).
        requests: Every request so far: method, path with query.
        expired: Access keys that are answered with ExpiredToken.
        on_request: Called with (method, path) before each answer.
        listed: What listings show instead of `objects`, if it is not None.
        connections: How many were accepted, or failed in their handshake.
        drip: Called before each byte of an answer, which is then sent byte by byte; None: at once.
        drips_headers: Whether its headers are sent so, too.
    """

    daemon_threads = True

    def __init__(self, *, honours_put: bool = True, honours_complete: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.honours_put, self.honours_complete = honours_put, honours_complete
        self.answers: list[tuple[int, str]] = []
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.times: dict[str, datetime] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.expired: set[str] = set()
        self.on_request: Callable[[str, str], None] = lambda _method, _path: None
        self.listed: dict[str, bytes] | None = None
        self.drip: Callable[[], None] | None = None
        self.drips_headers = False
        self.scheme = "http"
        self.connections = 0
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}"

    def get_request(self):
        self.connections += 1
        return super().get_request()

    def handle_error(self, *_: object) -> None:
        """A client that hung up is part of the test."""


class _Dripping:
    """Writes to a client byte by byte while the server drips."""

    def __init__(self, file, server: FakeS3) -> None:
        self.file, self.server = file, server

    def write(self, data: bytes) -> None:
        if self.server.drip is None:
            self.file.write(data)
            return
        for byte in data:
            self.server.drip()
            self.file.write(bytes([byte]))

    def flush(self) -> None:
        self.file.flush()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeS3

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {self.path}")
            self.server.on_request(self.command, url.path)
            key = self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]
            if key in self.server.expired:
                status, content = (400 if self.command == "HEAD" else 403), ERROR.format(code="ExpiredToken").encode()
            else:
                status, content = self.decide(url.path, query, body)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and status == HTTPStatus.OK:
            status, content = 206, content[int(asked[1]) : int(asked[2] or len(content)) + 1]
        plain, dripping = self.wfile, _Dripping(self.wfile, self.server)
        self.wfile = dripping if self.server.drips_headers else plain
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"')
        self.send_header("Last-Modified", format_datetime(self.server.times.get(url.path, EPOCH), usegmt=True))
        self.end_headers()
        if self.command != "HEAD":
            dripping.write(content)
        self.wfile = plain

    def decide(self, path: str, query: dict, body: bytes) -> tuple[int, bytes]:  # noqa: C901, PLR0911 - one line per answer
        objects, times = self.server.objects, self.server.times
        conditional = self.headers.get("If-None-Match") == "*"
        if conditional and self.server.answers:
            status, code = self.server.answers.pop(0)
            return status, ERROR.format(code=code).encode()
        here = path in objects
        if "uploads" in query and self.command == "POST":
            self.server.parts[path] = {}
            return 200, b"<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>"
        if "uploads" in query:
            items = "".join(
                f"<Upload><Key>{one.split('/', 2)[2]}</Key><UploadId>u1</UploadId>"
                "<Initiated>2026-11-30T00:00:00Z</Initiated></Upload>"
                for one in self.server.parts
            )
            return 200, f"<ListMultipartUploadsResult>{items}</ListMultipartUploadsResult>".encode()
        if "uploadId" in query and self.command == "POST":
            if conditional and here and self.server.honours_complete:
                return 412, ERROR.format(code="PreconditionFailed").encode()
            parts = self.server.parts.pop(path, {})
            objects[path], times[path] = b"".join(data for _, data in sorted(parts.items())), datetime.now(UTC)
            return 200, b"<CompleteMultipartUploadResult></CompleteMultipartUploadResult>"
        if "uploadId" in query and self.command == "PUT":
            self.server.parts.setdefault(path, {})[int(query["partNumber"][0])] = body
            return 200, b""
        if "uploadId" in query:
            return (204 if self.command == "DELETE" else 200), b"<ListPartsResult></ListPartsResult>"
        if self.command == "PUT":
            if conditional and here and self.server.honours_put:
                return 412, ERROR.format(code="PreconditionFailed").encode()
            objects[path], times[path] = body, datetime.now(UTC)
            return 200, b""
        if self.command == "DELETE":
            objects.pop(path, None)
            return 204, b""
        if "list-type" in query:
            return 200, self.list_objects(path, query)
        return (200, objects[path]) if here else (404, ERROR.format(code="NoSuchKey").encode())

    def list_objects(self, bucket: str, query: dict) -> bytes:
        shown = self.server.objects if self.server.listed is None else self.server.listed
        prefix, delimiter = (query.get(name, [""])[0] for name in ("prefix", "delimiter"))
        keys = sorted(path.removeprefix(f"{bucket}/") for path in shown if path.startswith(f"{bucket}/{prefix}"))
        rests = [(key, key.removeprefix(prefix).partition(delimiter) if delimiter else (key, "", "")) for key in keys]
        contents = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(shown[f'{bucket}/{key}'])}</Size>"
            f"<LastModified>{self.server.times[f'{bucket}/{key}'].isoformat()}</LastModified></Contents>"
            for key, (_, between, _) in rests
            if not between
        )
        folders = "".join(
            f"<CommonPrefixes><Prefix>{prefix}{name}/</Prefix></CommonPrefixes>"
            for name in sorted({first for _, (first, between, _) in rests if between})
        )
        return f"<ListBucketResult>{contents}{folders}</ListBucketResult>".encode()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815 - the base class's names

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def fake_s3(**wrong: bool) -> Iterator[FakeS3]:
    """Yield a running fake."""
    with FakeS3(**wrong) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:  # also when a test fails: the server's close waits for its thread
            server.shutdown()
            thread.join()
