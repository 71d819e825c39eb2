"""A loopback proxy before a real S3 server that goes wrong as networks and servers do."""

import http.client
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ERROR = "<Error><Code>{code}</Code><Message>canary-message</Message></Error>"
ANSWERS = {"500": (500, "InternalError"), "503": (503, "SlowDown"), "skew": (403, "RequestTimeTooSkewed")}


@dataclass
class Fault:
    """What goes wrong, with which requests, and how often.

    Attributes:
        kind: `500`, `503`, `skew`: answered so, not forwarded. `lost`: forwarded, then answered with 500. `reset`,
            `truncated`, `stall`: half of the answer's body, then a reset, an end, or silence. `wrong`: one byte of the
            answer's body differs; `wrong-up`: one of the request's.
        method: GET, PUT or POST.
        pattern: A regular expression for path and query.
        times: How many such requests.
    """

    kind: str
    method: str
    pattern: str
    times: int = 1


class FaultProxy(ThreadingHTTPServer):
    """Forwards everything, but for `faults`; `requests` keeps each method and path."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, method: str, path: str) -> str | None:
        with self.lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault.kind
        return None

    def handle_error(self, *_: object) -> None:
        """A client that hung up is part of the test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.server.next_fault(self.command, self.path)
        if kind in ANSWERS:
            self.refuse(*ANSWERS[kind])
            return
        if kind == "wrong-up":
            body = flip_middle(body)
        status, headers, content = self.ask(body)
        if kind == "lost":
            self.refuse(500, "InternalError")
            return
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.send_body(content, kind)

    def ask(self, body: bytes):
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                upstream.putheader(name, value)
        upstream.endheaders(body or None)
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        return response.status, response.getheaders(), content

    def send_body(self, content: bytes, kind: str | None) -> None:
        if self.command == "HEAD":
            return
        if kind == "wrong":
            content = flip_middle(content)
        if kind not in ("reset", "truncated", "stall"):
            self.wfile.write(content)
            return
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self.close_connection = True
        if kind == "stall":
            self.server.closing.wait(30)
        if kind == "reset":  # linger for 0 seconds: the peer sees a reset instead of an end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def refuse(self, status: int, code: str) -> None:
        content = ERROR.format(code=code).encode()
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward  # noqa: N815 - the base class's names

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def flip_middle(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Yield a running proxy before `upstream`."""
    with FaultProxy(upstream) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.closing.set()
            proxy.shutdown()
            thread.join()
