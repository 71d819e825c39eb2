"""A small S3 server in this process that misbehaves on purpose: it ignores preconditions, conflicts, or forbids.

No real store at hand does this offline (rclone's `serve s3` ignores preconditions, and is not installable from PyPI).
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

ERROR = "<Error><Code>{code}</Code><Message>canary-message</Message></Error>"


class FakeS3(ThreadingHTTPServer):
    """In memory; what it does wrong is set on it.

    Attributes:
        honours_put: Whether If-None-Match is looked at on PutObject.
        honours_complete: Whether it is on CompleteMultipartUpload.
        answers: What the next conditional puts are answered with, instead of being done: (status, code).
        requests: Every request so far: method, path with query.
    """

    daemon_threads = True

    def __init__(self, *, honours_put: bool = True, honours_complete: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.honours_put, self.honours_complete = honours_put, honours_complete
        self.answers: list[tuple[int, str]] = []
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeS3

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        with self.server.lock:
            self.server.requests.append(f"{self.command} {self.path}")
            status, content = self.decide(url.path, query, body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def decide(self, path: str, query: dict, body: bytes) -> tuple[int, bytes]:  # noqa: PLR0911 - one line per answer
        conditional = self.headers.get("If-None-Match") == "*"
        if conditional and self.server.answers:
            status, code = self.server.answers.pop(0)
            return status, ERROR.format(code=code).encode()
        here = path in self.server.objects
        if "uploads" in query and self.command == "POST":
            return 200, b"<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>"
        if "uploads" in query:
            return 200, b"<ListMultipartUploadsResult></ListMultipartUploadsResult>"
        if "uploadId" in query and self.command == "POST":
            if conditional and here and self.server.honours_complete:
                return 412, ERROR.format(code="PreconditionFailed").encode()
            return 200, b"<CompleteMultipartUploadResult></CompleteMultipartUploadResult>"
        if "uploadId" in query:
            return (204 if self.command == "DELETE" else 200), b"<ListPartsResult></ListPartsResult>"
        if self.command == "PUT":
            if conditional and here and self.server.honours_put:
                return 412, ERROR.format(code="PreconditionFailed").encode()
            self.server.objects[path] = body
            return 200, b""
        return (200, self.server.objects[path]) if here else (404, ERROR.format(code="NoSuchKey").encode())

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
