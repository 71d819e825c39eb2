"""Which requests the server of a workspace refuses while it has no password."""

import asyncio
import json
import os
import stat

import pytest

from ropeway.orchestration.prefect_server import apply_settings, prefect_settings, protect_database
from ropeway.orchestration.server_entry import NAMES, OriginGuard, PageAddress, find_names, list_origins

PORT = 4200


def ask(*headers, kind="http"):
    """Return the HTTP status that a guard of 127.0.0.1:4200 sends, or 200 if the request reaches the server."""
    sent = []

    async def answer(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def keep(message):
        sent.append(message)

    names = find_names("127.0.0.1")
    guard = OriginGuard(answer, names, list_origins(names, PORT))
    scope = {"type": kind, "headers": [(name.encode(), value.encode()) for name, value in headers]}
    asyncio.run(guard(scope, None, keep))
    return sent[0].get("status", sent[0]["type"])


OWN = ("host", f"127.0.0.1:{PORT}")


@pytest.mark.parametrize("host", ["127.0.0.1:4200", "localhost:4200", "LOCALHOST", "[::1]:4200", "127.0.0.1:14200"])
def test_the_servers_own_names_are_answered(host):
    assert ask(("host", host)) == 200


@pytest.mark.parametrize(
    "host", ["evil.example:4200", "evil.example", "127.0.0.1.evil.example:4200", "", "[::1", "localhost@evil.example"]
)
def test_another_host_is_refused(host):
    assert ask(("host", host)) == 421


def test_a_missing_or_second_host_is_refused():
    assert ask() == ask(OWN, ("host", "evil.example")) == 421


@pytest.mark.parametrize("origin", ["http://127.0.0.1:4200", "http://localhost:4200"])
def test_pages_of_the_server_may_ask_it_under_either_name(origin):
    assert ask(OWN, ("origin", origin)) == 200
    assert ask(OWN, ("origin", origin), kind="websocket") == 200


def test_pages_through_a_forwarded_port_may_ask_the_same_port():
    assert ask(("host", "localhost:14200"), ("origin", "http://localhost:14200")) == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "", "http://localhost:8888", "http://127.0.0.1", "http://[", "://"]
)
def test_pages_of_another_origin_are_refused(origin):
    assert ask(OWN, ("origin", origin)) == 403
    assert ask(OWN, ("origin", origin), kind="websocket") == "websocket.close"


def test_a_rebound_name_is_refused_although_page_and_request_have_it():
    assert ask(("host", "evil.example:4200"), ("origin", "http://evil.example:4200")) == 421


def ask_settings(path, *, status=200, scheme="http", host="runs.example.org"):
    """Return (headers, body) that a page gets from a server that believes to be at 127.0.0.1:4200."""
    sent = []

    async def answer(_scope, _receive, send):
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-length", b"57"), (b"a", b"b")]}
        )
        for part, more in ((b'{"api_url": "http://127.0.0.1', True), (b':4200/api", "flags": []}', False)):
            await send({"type": "http.response.body", "body": part, "more_body": more})

    async def keep(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "scheme": scheme, "headers": [(b"host", host.encode())]}
    asyncio.run(PageAddress(answer)(scope, None, keep))
    return dict(sent[0]["headers"]), b"".join(one["body"] for one in sent[1:])


@pytest.mark.parametrize("path", ["/ui-settings", "/v2/ui-settings"])
@pytest.mark.parametrize(("scheme", "host"), [("https", "runs.example.org"), ("http", "localhost:14200")])
def test_pages_ask_the_address_under_which_they_were_opened(path, scheme, host):
    headers, body = ask_settings(path, scheme=scheme, host=host)
    assert json.loads(body) == {"api_url": f"{scheme}://{host}/api", "flags": []}
    assert headers == {b"a": b"b", b"content-length": str(len(body)).encode()}


@pytest.mark.parametrize(("path", "status"), [("/api/flows", 200), ("/ui-settings", 304)])
def test_nothing_else_is_changed(path, status):
    assert b"127.0.0.1:4200" in ask_settings(path, status=status)[1]


def test_an_empty_password_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "")
    for name in (*prefect_settings(tmp_path), "NO_PROXY", "no_proxy", "PREFECT_API_AUTH_STRING"):
        monkeypatch.setenv(name, "")  # restored at the end
    apply_settings(tmp_path)
    assert "PREFECT_SERVER_API_AUTH_STRING" not in os.environ


def test_start_and_end_of_the_server_pass():
    assert ask(kind="lifespan") == 200


def test_names_of_a_proxy_are_added(monkeypatch):
    monkeypatch.setenv(NAMES, " Runs.example.org,")
    assert ask(("host", "runs.example.org"), ("origin", "https://runs.example.org")) == 200
    assert ask(OWN, ("origin", "https://runs.example.org")) == 200  # a proxy that replaces the Host header
    assert ask(("host", "evil.example")) == 421


def test_a_database_that_others_could_read_is_for_this_user_only(tmp_path, capsys):
    (tmp_path / "prefect.db").touch(mode=0o644)
    (tmp_path / "prefect.db-wal").touch(mode=0o600)
    protect_database(tmp_path)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    assert capsys.readouterr().out.count("prefect.db") == 1
