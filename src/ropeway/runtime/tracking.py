"""Experiment tracking with Weights & Biases: a background thread logs the steps, and its errors never stop training.

steps.csv is authoritative. If wandb-core dies, the disk is full or the network is slow or down, steps are dropped and
counted; training never waits. Each attempt is one W&B run, grouped by the fingerprint of the training run, because W&B
cannot merge offline parts into one run. Digests are logged, files are not: an artifact would copy the weights.

The settings are W&B's own environment variables: WANDB_MODE (disabled, offline, online), WANDB_API_KEY or ~/.netrc,
WANDB_PROJECT, WANDB_ENTITY, WANDB_BASE_URL, WANDB_DIR.
"""

import netrc
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict
from urllib.parse import urlparse

from ropeway.runtime.progress import Line

PROJECT = "supervised-finetuning"  # default of WANDB_PROJECT. Source: Open-Assistant's trainer
_QUEUE_LINES = 1000
_FAILURES_IN_ROW = 3  # then the circuit breaker opens
_FINISH_SECONDS = 15.0
_INIT_SECONDS = (
    20.0  # W&B's default is 90; with a key and no network it raises after this time (wandb issues 7671, 10669)
)
_HOST = "https://api.wandb.ai"


class TrackingResult(TypedDict):
    """Where the steps of an attempt were logged and how many were dropped; part of its provenance."""

    mode: str
    link: str | None
    sent: int
    dropped: int
    trouble: list[str]


class TrackingClient(Protocol):
    """The part of the interface of a W&B run that is used here."""

    url: str | None
    dir: str

    def log(self, data: Mapping[str, object], *, step: int) -> None:
        """Log one step."""

    def finish(self) -> None:
        """Send the remaining steps and close the run."""


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """An attempt as it is described to W&B.

    Attributes:
        folder: Folder of offline files, unless WANDB_DIR is set.
        group: Fingerprint of the training run; W&B groups its attempts by it.
    """

    folder: Path
    name: str
    group: str
    config: dict[str, Any]


def choose_modes(environment: Mapping[str, str], *, home: Path) -> tuple[str, ...]:
    """Return the modes to try, in order: online (only with a key), then offline; empty if W&B is disabled."""
    mode = environment.get("WANDB_MODE", "").lower()
    if mode == "disabled" or environment.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return ()
    if mode in ("offline", "dryrun"):
        return ("offline",)
    return ("online", "offline") if _has_key(environment, home) else ("offline",)


def _has_key(environment: Mapping[str, str], home: Path) -> bool:
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlparse(environment.get("WANDB_BASE_URL", _HOST)).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(home / ".netrc").authenticators(host) is not None
    return False


class Tracker:
    """Queues steps without blocking; a background thread opens the W&B run and sends them."""

    def __init__(self, start: Callable[[str], TrackingClient], modes: Sequence[str]) -> None:
        """Start the thread, which opens a run in the first mode that works; if no mode works, steps are dropped."""
        self._start, self._modes = start, modes
        self._lines: deque[Line] = deque(maxlen=_QUEUE_LINES)
        self._changed = threading.Condition()
        self._closing, self._off = False, not modes
        self._sent = self._dropped = 0
        self._trouble: list[str] = []
        self._mode = "off"
        self._link: str | None = None
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        if modes:
            self._thread.start()

    def log(self, line: Line) -> None:
        """Queue a step; the oldest one is dropped if the queue is full."""
        with self._changed:
            if self._off or len(self._lines) == _QUEUE_LINES:
                self._dropped += 1
            if not self._off:
                self._lines.append(dict(line))
                self._changed.notify()

    def finish(self, *, seconds: float = _FINISH_SECONDS) -> TrackingResult:
        """Send the remaining steps for at most `seconds`; return what was sent and dropped, for the provenance."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(seconds)
        with self._changed:
            if self.is_stuck:
                self._trouble.append(f"W&B did not finish within {seconds:g} s")
            lost = self._dropped + len(self._lines)
            return TrackingResult(
                mode=self._mode, link=self._link, sent=self._sent, dropped=lost, trouble=list(self._trouble)
            )

    @property
    def is_stuck(self) -> bool:
        """Whether the thread hangs inside W&B; W&B's exit hook would then also hang."""
        return self._thread.is_alive()

    def _work(self) -> None:
        for mode in self._modes:
            client: TrackingClient | None = None
            with self._errors_recorded(mode):
                client = self._start(mode)
            if client is None:
                continue
            with self._changed:
                # Offline: the folder for `wandb sync`; reading `url` makes W&B print a warning.
                self._mode, self._link = mode, client.url if mode == "online" else str(Path(client.dir).parent)
            if self._send_all(client, mode):
                return
        with self._changed:
            self._off = True
            self._dropped += len(self._lines)
            self._lines.clear()

    def _send_all(self, client: TrackingClient, mode: str) -> bool:
        """Send steps until the queue is closed; return False if the circuit breaker opened."""
        failures = 0
        while (line := self._next()) is not None:
            sent = self._sent
            with self._errors_recorded(mode, reported=failures + 1 == _FAILURES_IN_ROW):
                client.log({key: value for key, value in line.items() if value is not None}, step=line["step"])
                self._sent += 1
            failures = 0 if self._sent > sent else failures + 1
            self._dropped += failures > 0
            if failures == _FAILURES_IN_ROW:
                return False
        with self._errors_recorded(mode):
            client.finish()
        return True

    @contextmanager
    def _errors_recorded(self, mode: str, *, reported: bool = True) -> Iterator[None]:
        """Suppress every error of W&B; record it if `reported`."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - an error of W&B must not stop training
            if reported:
                self._trouble.append(_one_line(mode, error))

    def _next(self) -> Line | None:
        with self._changed:
            while not self._lines and not self._closing:
                self._changed.wait()
            return self._lines.popleft() if self._lines else None


def describe_tracking(facts: TrackingResult) -> str:
    """Return one line: where the steps were logged and how many were not.

    >>> describe_tracking({"mode": "offline", "link": "/run", "sent": 9, "dropped": 1, "trouble": []})
    'W&B (offline): 9 steps in /run (send them with `wandb sync`), 1 dropped'
    """
    sync = " (send them with `wandb sync`)" if facts["mode"] == "offline" else ""
    lost = f", {facts['dropped']} dropped" if facts["dropped"] else ""
    trouble = "".join(f"; {one}" for one in facts["trouble"])
    return f"W&B ({facts['mode']}): {facts['sent']} steps in {facts['link']}{sync}{lost}{trouble}"


def _one_line(mode: str, error: Exception) -> str:
    """Return an error as one line without the API key, because it is written to the provenance."""
    text = f"{mode}: {type(error).__name__}: {error}".splitlines()[0]
    key = os.environ.get("WANDB_API_KEY")
    return text.replace(key, "***") if key else text


def open_tracker(run: TrackedRun) -> Tracker:
    """Return the tracker of an attempt, configured by the environment."""
    return Tracker(lambda mode: _start_wandb(run, mode), choose_modes(os.environ, home=Path.home()))


def _start_wandb(run: TrackedRun, mode: str) -> TrackingClient:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it sends tracebacks of its own errors
    import wandb

    folder = Path(os.environ.get("WANDB_DIR") or run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        init_timeout=_INIT_SECONDS,
        x_disable_meta=True,  # do not upload the command line and user
        host="",
        x_save_requirements=False,
        x_disable_stats=True,  # its sampling thread costs CPU time on a two-core machine
    )
    init: Any = wandb.init  # its type accepts only literals
    client: TrackingClient = init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run.name,
        group=run.group,
        job_type="train",
        config=run.config,
        dir=str(folder),
        mode=mode,
        settings=settings,
    )
    return client
