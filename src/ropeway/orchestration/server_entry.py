"""Starts Prefect's server so that pages of other sites cannot use it: `python -m ropeway.orchestration.server_entry`.

Prefect's own command (3.9.1) allows every origin and reads no Host header. A page that a person opens could then ask a
server without a password to run a command: directly, or through a name that resolves to 127.0.0.1 (DNS rebinding).
"""

import argparse
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

NAMES = "ROPEWAY_SERVER_HOSTS"
_ORIGINS = "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"
_PAGES = ("PREFECT_SERVER_UI_API_URL", "PREFECT_UI_API_URL")
_LOCAL = ("127.0.0.1", "localhost", "[::1]")
_OK, _MISDIRECTED, _FORBIDDEN = 200, 421, 403  # RFC 9110, 15.3.1, 15.5.20 and 15.5.4


def find_names(host: str) -> tuple[str, ...]:
    """Return the names in a Host header under which a server that listens on `host` is asked, ports left out."""
    given = (name.strip() for name in os.environ.get(NAMES, "").split(","))
    # An address on the network needs a password, and with one, names are not checked: 0.0.0.0 needs none here.
    return tuple(dict.fromkeys(name.lower() for name in (*_LOCAL, host, *given) if name))


def list_origins(names: Collection[str], port: int) -> tuple[str, ...]:
    """Return the origins of pages that may use a server: the server's own, on its port or behind a TLS proxy.

    >>> list_origins(["localhost", "runs.example.org"], 4200)
    ('http://localhost:4200', 'http://runs.example.org:4200', 'https://runs.example.org')
    """
    behind_proxy = [f"https://{name}" for name in names if name not in _LOCAL]
    return (*(f"http://{name}:{port}" for name in names), *behind_proxy)


@dataclass(frozen=True, slots=True)
class OriginGuard:
    """An ASGI application that answers 421 to a foreign Host and 403 to a page of a foreign origin, before `app`.

    The origin is checked beside Prefect's CORS settings because a browser sends some requests without asking first:
    a POST without a content type, which Prefect reads as JSON, and web sockets.
    """

    app: "ASGIApp"
    names: Collection[str]
    origins: Collection[str]

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer or refuse one request, one web socket, or pass on the start and end of the server."""
        refusal = self.find_refusal(scope) if scope["type"] in {"http", "websocket"} else None
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": ""})  # before accept: HTTP 403
        else:
            status, words = refusal
            body = json.dumps({"exception_message": words}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def find_refusal(self, scope: "Scope") -> tuple[int, str] | None:
        """Return the HTTP status and the reason why a request is refused, or None."""
        hosts = _read_headers(scope, b"host")
        if len(hosts) != 1 or _name_of(hosts[0]) not in self.names:
            asked = ", ".join(hosts)
            return _MISDIRECTED, (
                f"the Host header {asked!r} is not a name of this server, which has no password. Add the name to "
                f"{NAMES} and start the server again, or set PREFECT_SERVER_API_AUTH_STRING"
            )
        for origin in _read_headers(scope, b"origin"):
            if origin not in self.origins and origin.partition("://")[2].lower() != hosts[0].lower():
                return _FORBIDDEN, (
                    f"the origin {origin!r} is not this server's, which has no password. Add its name to {NAMES} and "
                    "start the server again, or set PREFECT_SERVER_API_AUTH_STRING"
                )
        return None


@dataclass(frozen=True, slots=True)
class PageAddress:
    """An ASGI application that tells Prefect's pages to ask the address under which they were opened.

    Prefect (3.9.1) knows one address for all: a page on another machine, or through a forwarded port, would ask the
    wrong one. A proxy must pass the Host header on, and `X-Forwarded-Proto` if it adds TLS.
    """

    app: "ASGIApp"

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request; only the settings of the pages are changed."""
        hosts = _read_headers(scope, b"host") if scope["type"] == "http" else []
        if not scope.get("path", "").endswith("/ui-settings") or len(hosts) != 1:
            await self.app(scope, receive, send)
            return
        body = b""
        start: Message = {}

        async def change(message: "Message") -> None:
            nonlocal body, start
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if message.get("more_body"):
                return
            if start["status"] == _OK:
                body = json.dumps({**json.loads(body), "api_url": f"{scope['scheme']}://{hosts[0]}/api"}).encode()
            headers = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
            await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            await send({"type": "http.response.body", "body": body})

        plain = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]}
        await self.app(plain, receive, change)


def _read_headers(scope: "Scope", name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _name_of(host: str) -> str:
    """Return a Host header without its port.

    >>> _name_of("localhost:4200"), _name_of("[::1]:4200"), _name_of("Example.org")
    ('localhost', '[::1]', 'example.org')
    """
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() and (not name.startswith("[") or name.endswith("]")) else host).lower()


def main() -> None:
    """Run Prefect's server until it is stopped."""
    parser = argparse.ArgumentParser(prog="ropeway.orchestration.server_entry")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--no-schedules", action="store_true", help="no scheduler, no detection of late runs")
    options = parser.parse_args()
    os.umask(0o077)  # the database and the logs have params, paths and addresses of the workspace
    names = find_names(options.host)
    os.environ.setdefault(_ORIGINS, ",".join(list_origins(names, options.port)))
    if options.no_schedules:
        os.environ["PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED"] = "false"
        os.environ["PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED"] = "false"

    import uvicorn  # after the settings above, which Prefect reads when it is imported
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    server = get_current_settings().server
    app: ASGIApp = create_app(final=True)
    if not any(os.environ.get(name) for name in _PAGES):
        app = PageAddress(app)
    password = server.api.auth_string
    if not (password and password.get_secret_value()):  # a foreign page cannot send it: it is in no cookie
        given = os.environ[_ORIGINS].split(",")
        app = OriginGuard(app, names, [origin for origin in given if origin != "*"])
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        timeout_keep_alive=server.api.keepalive_timeout,
        ws_ping_interval=server.api.websocket_ping_interval,
        ws_ping_timeout=server.api.websocket_ping_timeout,
        log_level=server.logging_level.lower(),
    )


if __name__ == "__main__":
    main()
