"""The Prefect server of a workspace, `ropeway server`, and what runs ask of any; `temporary` has the other kind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import psutil

from ropeway.orchestration.automations import apply_automations
from ropeway.orchestration.prefect_settings import apply_settings, prefect_home
from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.runtime.manifest import write_json

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 4200
DEFAULT_URL = f"http://{LOOPBACK}:{DEFAULT_PORT}/api"
START_SECONDS = 600.0  # 3.5 s on two quiet cores, 9 s with a new database, and 100 s of that at load 12
_OUTAGE_SECONDS = 1800.0  # then Prefect's own retries have their turn
_NOTE, _UI_EXIT = "ropeway-server.json", "ui.exit.json"


def serve_ui(root: Path, *, port: int = DEFAULT_PORT, host: str = LOOPBACK) -> None:
    """Run the Prefect server of this workspace until somebody ends it; its UI shows every run that was made here.

    Raises:
        ConfigError: The port is taken, or the host is open to the network without a password.
        TemporaryError: It did not start, or ended by itself.
    """
    root = root.resolve()
    if host not in (LOOPBACK, "localhost") and not os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        raise ConfigError(
            f"--host {host} lets the network in, and whoever is in can run code here. Set "
            "PREFECT_SERVER_API_AUTH_STRING=user:password, or stay on 127.0.0.1"
        )
    _check_free(root, host, port)
    apply_settings(root)
    url = f"http://{LOOPBACK if host == '0.0.0.0' else host}:{port}/api"  # noqa: S104 - compared, not bound
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    server = start_process(root, server_arguments(host, port), url, record=_UI_EXIT, output=None)
    try:
        write_json(_note(root), {"url": url, "pid": os.getpid()})
        if not await_answer(url, START_SECONDS, lambda: server.poll() is not None):
            raise TemporaryError(f"the server did not come up at {url}; what it said stands above")
        print(f"Prefect UI: {page_address(url)}  (Ctrl-C stops it)", flush=True)
        for words in apply_automations(url):
            print(f"watching: {words}", flush=True)
        if server.wait():
            raise TemporaryError("the server ended by itself; what it said stands above. Start it again")
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        _note(root).unlink(missing_ok=True)
        server.terminate()
        server.wait()


def outlast_outage(url: str) -> None:
    """Return once a server that a run already uses answers again, or after half an hour; say so when it is away.

    Prefect's client (3.9.1) doubles its pause at each try and sleeps on for minutes after the server is back.
    """
    if is_answering(url):
        return
    print(f"the Prefect server at {url} is away; the run waits for it and loses nothing", flush=True)
    if await_answer(url, _OUTAGE_SECONDS, lambda: False, pause_seconds=1.0):
        print("the Prefect server is back", flush=True)


def find_server(root: Path) -> str | None:
    """Return the URL of this workspace's running `ropeway server`, or None."""
    with suppress(OSError, ValueError, KeyError, psutil.NoSuchProcess):
        note = json.loads(_note(root).read_bytes())
        psutil.Process(note["pid"])
        return str(note["url"]) if is_answering(note["url"]) else None
    return None


def standing_server(root: Path) -> str | None:
    """Return the URL of a server that no run starts or ends: `PREFECT_API_URL`'s, or the running `ropeway server`."""
    return os.environ.get("PREFECT_API_URL") or find_server(root)


def page_address(url: str, page: str = "") -> str:
    """Return where a person finds a page of the server whose API is at `url`."""
    return url.removesuffix("/api") + page


def start_process(
    root: Path, arguments: list[str], url: str, *, record: str, output: BinaryIO | None
) -> "subprocess.Popen[bytes]":
    """Start a server under a supervisor, so that it ends with this process however that ends."""
    home = prefect_home(root)
    home.mkdir(parents=True, exist_ok=True)
    (home / record).unlink(missing_ok=True)
    supervisor = [sys.executable, "-m", "ropeway.runtime.supervise", "--record", str(home / record)]
    supervisor += ["--leader", str(os.getpid()), "--grace", "5", "--", sys.executable]
    return subprocess.Popen(
        [*supervisor, *arguments],
        env={**os.environ, **_server_environment(url)},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def await_answer(url: str, seconds: float, has_ended: Callable[[], bool], *, pause_seconds: float = 0.05) -> bool:
    """Return True once a server answers, False when it has ended or the time is over."""
    deadline = time.monotonic() + seconds
    while not is_answering(url):
        if has_ended() or time.monotonic() > deadline:
            return False
        time.sleep(pause_seconds)
    return True


def is_answering(url: str) -> bool:
    """Return whether a Prefect server answers at an API's URL."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(f"{url}/health", timeout=2).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)  # it answers, if only to say no
    return True


def _note(root: Path) -> Path:
    return prefect_home(root) / _NOTE


def server_arguments(host: str, port: int) -> list[str]:
    """Return what follows `python` in the command of a server."""
    return ["-m", "prefect", "server", "start", "--host", host, "--port", str(port), "--analytics-off"]


def _server_environment(url: str) -> dict[str, str]:
    """Return what the server must know of itself; else its pages ask port 4200 whatever port they came from."""
    return {"PREFECT_API_URL": url, "PREFECT_SERVER_UI_API_URL": url}


def is_free(host: str, port: int) -> bool:
    """Return whether a port can be listened on."""
    try:
        _bind(host, port)
    except OSError:
        return False
    return True


def _bind(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _check_free(root: Path, host: str, port: int) -> None:
    try:
        _bind(host, port)
    except OSError as error:
        ours = find_server(root)
        there = f"this workspace's server is there: {page_address(ours)}" if ours else "another program has it"
        raise ConfigError(
            f"port {port} on {host} cannot be used ({error.strerror}); {there}. Choose another port "
            f"(`ropeway server --port {port + 1}`) or stop what holds it"
        ) from None
