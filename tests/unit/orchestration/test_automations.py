"""A Prefect server whose database is busy is asked again; one that refuses is not."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from ropeway.orchestration import prefect_requests
from ropeway.orchestration.automations import CRASHED, apply_automations
from ropeway.runtime.errors import TemporaryError


@pytest.fixture
def server(monkeypatch):
    """Return (address, answers to give to the next PUTs, methods asked); one automation exists."""
    monkeypatch.setattr(prefect_requests, "_PAUSE_SECONDS", 0.0)
    codes, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.append(self.command)
            code = codes.pop(0) if self.command == "PUT" and codes else 200
            found = [{"id": "1", "name": CRASHED, "enabled": False}] if self.path.endswith("/filter") else {}
            body = json.dumps(found).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = answer  # noqa: N815 - names of http.server

        def log_message(self, *_):
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}/api", codes, asked
        served.shutdown()


def test_a_busy_database_is_asked_again(server):
    url, codes, asked = server
    codes += [503, 503, 429]
    assert apply_automations(url)
    assert asked.count("PUT") == 4


def test_a_database_that_stays_busy_and_a_refusal_are_reported(server, monkeypatch):
    url, codes, asked = server
    monkeypatch.setattr(prefect_requests, "_BUSY_SECONDS", -1.0)
    codes += [503, 503]
    with pytest.raises(TemporaryError, match=r"refused PUT .* 503"):
        apply_automations(url)
    codes[:] = [422]
    with pytest.raises(TemporaryError, match="422"):
        apply_automations(url)
    assert asked.count("PUT") == 2
