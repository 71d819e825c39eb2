"""The Prefect server of a workspace: `ropeway server` or a temporary one for one run; settings and health checks."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import psutil

from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.runtime.launcher import LOOPBACK, free_port
from ropeway.runtime.manifest import write_json

DEFAULT_PORT = 4200
DEFAULT_URL = f"http://{LOOPBACK}:{DEFAULT_PORT}/api"
START_SECONDS = 600.0  # 3.5 s on two idle cores, 9 s with a new database, 100 s at load 12
_OUTAGE_SECONDS = 1800.0  # after that, Prefect's own retries apply
_NOTE, _UI_EXIT = "ropeway-server.json", "ui.exit.json"
_NO_PROXY = "127.0.0.1,localhost,::1"
_OWN_ADDRESS = {"0.0.0.0": LOOPBACK, "::": "[::1]"}  # noqa: S104 - of a server that listens on every address
_GIVEN_SECONDS = 10.0  # for a running server; after that a temporary one is reported as slow
_OWN_SECONDS = 60.0  # for a `ropeway server` that does not answer; then a run starts a temporary one
_EXIT = "server.exit.json"
_LOGIN = "PREFECT_SERVER_API_AUTH_STRING"
_RESTARTS = 5  # of a server that had answered and then ended, e.g. killed for lack of memory


def serve_ui(root: Path, *, port: int = DEFAULT_PORT, host: str = LOOPBACK) -> None:
    """Run the Prefect server of this workspace until it is stopped; its UI shows every run of the workspace.

    Raises:
        ConfigError: The port is in use, the host is reachable from the network without a password, or a variable of
            alerts is invalid.
        TemporaryError: The server did not start, or exited.
    """
    from ropeway.orchestration import alert_sender as alerts  # httpx takes 0.1 s
    from ropeway.orchestration.automations import apply_automations

    root = root.resolve()
    if host not in (LOOPBACK, "localhost", "::1") and not os.environ.get(_LOGIN):
        raise ConfigError(
            f"--host {host} makes the server reachable from the network; its users can run code on this machine. Set "
            "PREFECT_SERVER_API_AUTH_STRING=user:password, or use --host 127.0.0.1"
        )
    hook, limits = alerts.read_hook(), alerts.read_limits()
    _check_free(root, host, port)
    apply_settings(root)
    url = f"http://{_OWN_ADDRESS.get(host, f'[{host}]' if ':' in host else host)}:{port}/api"
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    server = start_process(root, server_arguments(host, port), url, record=_UI_EXIT, output=None)
    try:
        write_json(_note(root), {"url": url, "pid": os.getpid()})
        if not await_answer(url, START_SECONDS, lambda: server.poll() is not None):
            raise TemporaryError(f"the Prefect server did not start at {url}; its output is above")
        print(f"Prefect UI: {page_address(url)}  (Ctrl-C stops it)", flush=True)
        try:
            for words in apply_automations(url):
                print(f"automation: {words}", flush=True)
        except TemporaryError as error:  # runs that wait for the server need it more than its automations
            print(
                f"the server runs, but its automations were not updated: {error}. Restart it to try again", flush=True
            )
        if hook:
            print(f"alerts: posted to {urlsplit(hook).hostname}, once per run and reason", flush=True)
            alerts.AlertSender(root, url, hook, limits).start()
        if server.wait():
            raise TemporaryError("the Prefect server exited; its output is above. Start it again")
    except KeyboardInterrupt:
        print("stopping the Prefect server", flush=True)
    finally:
        _note(root).unlink(missing_ok=True)
        server.terminate()
        server.wait()


def await_recovery(url: str) -> None:
    """Return once the run's server answers, or after 30 minutes; print when it is unreachable.

    Prefect's client (3.9.1) doubles its pause at each retry and keeps sleeping for minutes after the server is back.
    """
    if is_answering(url):
        return
    print(
        f"the Prefect server at {url} does not answer; the run waits for up to {_OUTAGE_SECONDS / 60:.0f} minutes",
        flush=True,
    )
    if await_answer(url, _OUTAGE_SECONDS, lambda: False, pause_seconds=1.0):
        print("the Prefect server answers again", flush=True)


def find_server(root: Path) -> str | None:
    """Return the URL of this workspace's running `ropeway server` if it answers, or None."""
    url = read_server_note(root)
    return url if url and is_answering(url) else None


def read_server_note(root: Path) -> str | None:
    """Return the URL of this workspace's `ropeway server` while its process lives; it may not answer yet."""
    with suppress(OSError, ValueError, KeyError, psutil.NoSuchProcess):
        note = json.loads(_note(root).read_bytes())
        psutil.Process(note["pid"])
        return str(note["url"])
    return None


def await_own_server(root: Path, seconds: float = START_SECONDS) -> str | None:
    """Return the URL of a server that outlives runs, or None; a `ropeway server` that is starting is waited for."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    url = read_server_note(root)
    if not url or is_answering(url):
        return url
    print(f"the Prefect server at {page_address(url)} is starting, or busy; waiting for it", flush=True)
    is_up = await_answer(url, seconds, lambda: read_server_note(root) != url, pause_seconds=0.5)
    return url if is_up else None


def persistent_server_url(root: Path) -> str | None:
    """Return the URL of a server that outlives runs (`PREFECT_API_URL` or the running `ropeway server`), or None."""
    return os.environ.get("PREFECT_API_URL") or find_server(root)


def page_address(url: str, page: str = "") -> str:
    """Return the URL of a page of the server whose API is at `url`."""
    return url.removesuffix("/api") + page


def start_process(
    root: Path, arguments: list[str], url: str, *, record: str, output: BinaryIO | None
) -> "subprocess.Popen[bytes]":
    """Start a server under a supervisor, which ends it when this process ends, even if killed."""
    from ropeway.orchestration.automations import await_heartbeats  # httpx takes 0.1 s

    home = prefect_home(root)
    home.mkdir(parents=True, exist_ok=True)
    (home / record).unlink(missing_ok=True)
    protect_database(home)
    try:
        await_heartbeats(home)
    except OSError as error:
        print(f"runs that the server knows may be marked as crashed when it starts: {error}", flush=True)
    supervisor = [sys.executable, "-m", "ropeway.runtime.supervise", "--record", str(home / record)]
    supervisor += ["--leader", str(os.getpid()), "--grace", "5", "--", sys.executable]
    return subprocess.Popen(
        [*supervisor, *arguments],
        env={**os.environ, "PREFECT_API_URL": url},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def protect_database(home: Path) -> None:
    """Let only this user read the database that an older Ropeway made; that of a new home is made so."""
    for path in home.glob("prefect.db*"):
        with suppress(OSError):  # another user's, or a journal that was removed just now
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
                print(f"{path}: other users of this machine could read it; now only you can", flush=True)


def await_answer(url: str, seconds: float, has_ended: Callable[[], bool], *, pause_seconds: float = 0.05) -> bool:
    """Return True once a server answers, False if it has ended or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not is_answering(url):
        if has_ended() or time.monotonic() > deadline:
            return False
        time.sleep(pause_seconds)
    return True


def is_answering(url: str) -> bool:
    """Return whether a Prefect server answers at an API's URL."""
    # Not httpx, which loads all certificates for each request: at a start this is called 20 times a second.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(f"{url}/health", timeout=2).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)  # any HTTP status is an answer
    return True


def _note(root: Path) -> Path:
    return prefect_home(root) / _NOTE


def server_arguments(host: str, port: int) -> list[str]:
    """Return the arguments of `python` that start a server."""
    return ["-m", "ropeway.orchestration.server_entry", "--host", host, "--port", str(port)]


def is_free(host: str, port: int) -> bool:
    """Return whether this process could listen on a port."""
    try:
        _bind(host, port)
    except OSError:
        return False
    return True


def _bind(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _check_free(root: Path, host: str, port: int) -> None:
    try:
        _bind(host, port)
    except OSError as error:
        ours = find_server(root)
        holder = f"this workspace's server uses it: {page_address(ours)}" if ours else "another program uses it"
        raise ConfigError(
            f"port {port} on {host} cannot be used ({error.strerror}); {holder}. Choose another port "
            f"(`ropeway server --port {port + 1}`) or stop that program"
        ) from None


def apply_settings(root: Path) -> None:
    """Set the settings in this process's environment, which its children inherit."""
    for name, value in prefect_settings(root).items():
        os.environ.setdefault(name, value)
    if password := os.environ.get(_LOGIN):  # the server's password is the client's too
        os.environ.setdefault("PREFECT_API_AUTH_STRING", password)
    else:
        os.environ.pop(_LOGIN, None)  # with an empty one, Prefect refuses every request
    # A proxy must not be used for the loopback server (httpx and websockets read these).
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, dict.fromkeys([*os.environ.get(name, "").split(","), _NO_PROXY])))


def prefect_home(root: Path) -> Path:
    """Return the folder of Prefect's database and logs."""
    return Path(os.environ.get("PREFECT_HOME") or prefect_settings(root)["PREFECT_HOME"])


def prefect_settings(root: Path) -> dict[str, str]:
    """Return Prefect's settings for a workspace. Source: prefect 3.9.1, `prefect config view --show-defaults`."""
    return {
        "PREFECT_HOME": str(root / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",  # the SDK's own switch
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds; a host counts as dead after three missed heartbeats
        "PREFECT_CLIENT_MAX_RETRIES": "20",  # the server may be unreachable for minutes while a stage ends
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        # Pages of runs that ended 90 days ago are removed: otherwise the database grows forever. Records of versions
        # are in the registry.
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        # By default a server forgets the slots of running deployments when it is restarted, and revokes those that no
        # run could renew while it was away. Prefect ends their runs at the next renewal, within 4 minutes (measured).
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "ropeway.orchestration.lease_storage",
        # A run prints its own lines; Prefect would print each again with a prefix, and tracebacks.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    }


@contextmanager
def open_server(root: Path) -> Iterator[str]:
    """Yield the API's URL: that of `PREFECT_API_URL`, of the running `ropeway server`, or of a temporary server.

    The temporary one starts in the background and ends with the block; wait for it with `await_server`. It runs under
    a supervisor, so it also ends when this process is killed. If it exits by itself, it is restarted.
    """
    if url := await_own_server(root, _OWN_SECONDS):
        yield url
        return
    port, home = free_port(), prefect_home(root)
    url = f"http://{LOOPBACK}:{port}/api"
    home.mkdir(parents=True, exist_ok=True)
    # Runs are started by a command here: no scheduler, no late-run detection.
    arguments = [*server_arguments(LOOPBACK, port), "--no-schedules"]
    with (home / "server.log").open("wb") as log:
        server = _RestartingServer(url, partial(start_process, root, arguments, url, record=_EXIT, output=log))
        try:
            yield url
        finally:
            server.end()
            (home / _EXIT).unlink(missing_ok=True)


class _RestartingServer:
    """A server that is restarted at the same address with the same database when it exits by itself."""

    def __init__(self, url: str, start: Callable[[], "subprocess.Popen[bytes]"]) -> None:
        self._url, self._start = url, start
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._server = start()
        self._watch = threading.Thread(target=self._restart_on_exit, name="temporary-server", daemon=True)
        self._watch.start()

    def _restart_on_exit(self) -> None:
        for _ in range(_RESTARTS):
            if not await_answer(self._url, START_SECONDS, lambda: self._server.poll() is not None, pause_seconds=0.5):
                return  # it does not start; `await_server` reports that
            self._server.wait()
            with self._lock:
                if self._closing.is_set():
                    return
                print("the temporary Prefect server exited; restarting it", flush=True)
                self._server = self._start()

    def end(self) -> None:
        """End the current server."""
        with self._lock:
            self._closing.set()
            self._server.terminate()
        self._server.wait()
        self._watch.join()


def await_server(url: str, root: Path) -> None:
    """Return once a server answers; raise TemporaryError when it does not."""
    home = prefect_home(root)
    has_ended, log = (home / _EXIT).exists, home / "server.log"
    is_up = await_answer(url, _GIVEN_SECONDS, has_ended)
    if not (is_up or has_ended() or "PREFECT_API_URL" in os.environ):
        print(
            f"the temporary Prefect server is still starting; on a busy machine this takes minutes. Its log: {log}",
            flush=True,
        )
        is_up = await_answer(url, START_SECONDS, has_ended)
    if not is_up:
        if "PREFECT_API_URL" in os.environ:
            raise TemporaryError(
                f"no Prefect server answers at {url} (PREFECT_API_URL). Start that server, unset PREFECT_API_URL, or "
                "use `ropeway run --no-prefect`"
            )
        raise TemporaryError(
            f"no Prefect server answers at {url}; log of the temporary server: {log}. Run the same command again, or "
            "use `ropeway run --no-prefect`"
        )
