"""A Hub on loopback, as much of it as a download asks for, and its cache on disk as huggingface_hub lays it out."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPO, COMMIT, TOKEN = "team/talks", "c0ffee" + "0" * 34, "hf_secretsecretsecret"


@dataclass
class Hub:
    """What the Hub holds and how it answers: `error` is (status, X-Error-Code) in place of every answer."""

    files: dict[str, bytes]
    models: dict[str, bytes] = field(default_factory=dict)  # of a model repository of the same name
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    error: tuple[int, str] | None = None
    private: bool = False
    url: str = ""
    asked: list[str] = field(default_factory=list)


def find(hub: Hub, path: str) -> tuple[int, bytes, str]:
    """Return status, body and X-Error-Code."""
    known = {**hub.branches, COMMIT: COMMIT}
    for kind, place, files in (("datasets", "/datasets/", hub.files), ("models", "/", hub.models)):
        api, tree = f"/api/{kind}/{REPO}/revision/", f"/api/{kind}/{REPO}/tree/"
        resolve = f"{place}{REPO}/resolve/{COMMIT}/"
        if not files:
            continue
        if path.startswith(api):
            if (revision := path.removeprefix(api)) not in known:
                return 404, b"", "RevisionNotFound"
            siblings = [{"rfilename": name} for name in files]
            return 200, json.dumps({"id": REPO, "sha": known[revision], "siblings": siblings}).encode(), ""
        if path.startswith(tree):
            listed = [{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in files.items()]
            return 200, json.dumps(listed).encode(), ""
        if path.startswith(resolve):
            return 200, files[path.removeprefix(resolve)], ""
    return 404, b"", "RepoNotFound"


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()  # noqa: S324 - as git names blobs


@contextmanager
def serve_hub(hub: Hub) -> Iterator[Hub]:
    """Serve it on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            if hub.error:
                self.answer(hub.error[0], error=hub.error[1])
            elif hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer(401)
            else:
                self.answer(*find(hub, path))

        def do_HEAD(self) -> None:
            self.do_GET()

        def answer(self, status: int, body: bytes = b"", error: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            if error:
                self.send_header("X-Error-Code", error)
            if status == 200:
                self.send_header("ETag", f'"{_oid(body)}"')
                self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_at(monkeypatch, cache: Path, *, url: str = "http://127.0.0.1:9", offline: bool = False) -> None:
    """Let huggingface_hub, which reads its environment once, ask this Hub and keep what it gets in `cache`."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def lay_cache(cache: Path, files: dict[str, bytes], branch: str = "main") -> Path:
    """Write a warm cache of the repository; return the folder of its snapshot."""
    repo = cache / f"datasets--{REPO.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / branch).write_text(COMMIT)
    (repo / "blobs").mkdir()
    for name, data in files.items():
        blob = repo / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        link = repo / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return repo / "snapshots" / COMMIT
