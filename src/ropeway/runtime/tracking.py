"""The mirror in Weights & Biases: steps go there from a thread, and nothing that happens there reaches training.

Our own steps.csv is the truth. wandb-core may die, the disk may fill, a network may be slow or gone: lines are then
dropped and counted, never waited for. One W&B run per attempt, grouped by the run's fingerprint, since W&B does not
stitch offline parts of one run together. Digests go there, never files: an artifact would copy the weights.

Who and where is environment, as W&B itself reads it: WANDB_MODE (disabled, offline, online), WANDB_API_KEY or
~/.netrc, WANDB_PROJECT, WANDB_ENTITY, WANDB_BASE_URL, WANDB_DIR.
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

PROJECT = "supervised-finetuning"  # Source: Open-Assistant's trainer, where WANDB_PROJECT names no other
_WAITING_LINES = 1000
_FAILURES_IN_ROW = 3  # then the breaker opens
_FINISH_SECONDS = 15.0
_INIT_SECONDS = 20.0  # of W&B's 90: measured with a key and no network, a raise after it (wandb issues 7671, 10669)
_HOST = "https://api.wandb.ai"


class TrackingResult(TypedDict):
    """Where the steps of an attempt went, and what was lost on the way; part of its provenance."""

    mode: str
    link: str | None
    sent: int
    dropped: int
    trouble: list[str]


class TrackingClient(Protocol):
    """What of a W&B run is used."""

    url: str | None
    dir: str

    def log(self, data: Mapping[str, object], *, step: int) -> None:
        """Send one line."""

    def finish(self) -> None:
        """Send what is left."""


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What the mirror is told about an attempt.

    Attributes:
        folder: Where offline files go, unless WANDB_DIR says otherwise.
        group: The fingerprint: attempts of one training run stand together.
    """

    folder: Path
    name: str
    group: str
    config: dict[str, Any]


def choose_modes(environment: Mapping[str, str], *, home: Path) -> tuple[str, ...]:
    """Return the modes to try, in order: online only with a key, offline behind it, none where W&B is switched off."""
    asked = environment.get("WANDB_MODE", "").lower()
    if asked == "disabled" or environment.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return ()
    if asked in ("offline", "dryrun"):
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
    """Lines go in and never wait; a thread opens the mirror and sends them."""

    def __init__(self, start: Callable[[str], TrackingClient], modes: Sequence[str]) -> None:
        """Begin to open the mirror in the first of the modes; on trouble the next, then none."""
        self._start, self._modes = start, modes
        self._lines: deque[Line] = deque(maxlen=_WAITING_LINES)
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
        """Leave a line to be sent; the oldest is dropped where too many wait."""
        with self._changed:
            if self._off or len(self._lines) == _WAITING_LINES:
                self._dropped += 1
            if not self._off:
                self._lines.append(dict(line))
                self._changed.notify()

    def finish(self, *, seconds: float = _FINISH_SECONDS) -> TrackingResult:
        """Send what is left, for so long at most; return where it went and what was lost, for the provenance."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(seconds)
        with self._changed:
            if self.is_stuck:
                self._trouble.append(f"it did not finish within {seconds:g} s")
            lost = self._dropped + len(self._lines)
            return TrackingResult(
                mode=self._mode, link=self._link, sent=self._sent, dropped=lost, trouble=list(self._trouble)
            )

    @property
    def is_stuck(self) -> bool:
        """Whether the thread hangs inside W&B; W&B's own exit hook would then hang too."""
        return self._thread.is_alive()

    def _work(self) -> None:
        for mode in self._modes:
            client: TrackingClient | None = None
            with self._errors_recorded(mode):
                client = self._start(mode)
            if client is None:
                continue
            with self._changed:
                # Offline: the folder that `wandb sync` takes; to ask for its url makes W&B complain.
                self._mode, self._link = mode, client.url if mode == "online" else str(Path(client.dir).parent)
            if self._send_all(client, mode):
                return
        with self._changed:
            self._off = True
            self._dropped += len(self._lines)
            self._lines.clear()

    def _send_all(self, client: TrackingClient, mode: str) -> bool:
        """Send lines until the end; return False when the breaker opened."""
        failures = 0
        while (line := self._next()) is not None:
            sent = self._sent
            with self._errors_recorded(mode, told=failures + 1 == _FAILURES_IN_ROW):
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
    def _errors_recorded(self, mode: str, *, told: bool = True) -> Iterator[None]:
        """Go on without W&B whatever it raises; note what that was if it is to be told."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - nothing that happens there reaches training
            if told:
                self._trouble.append(_tell(mode, error))

    def _next(self) -> Line | None:
        with self._changed:
            while not self._lines and not self._closing:
                self._changed.wait()
            return self._lines.popleft() if self._lines else None


def describe_tracking(facts: TrackingResult) -> str:
    """Return in one line where the steps went, and what was lost on the way.

    >>> describe_tracking({"mode": "offline", "link": "/run", "sent": 9, "dropped": 1, "trouble": []})
    'W&B (offline): 9 steps in /run (`wandb sync` sends them), 1 not mirrored'
    """
    sync = " (`wandb sync` sends them)" if facts["mode"] == "offline" else ""
    lost = f", {facts['dropped']} not mirrored" if facts["dropped"] else ""
    trouble = "".join(f"; {one}" for one in facts["trouble"])
    return f"W&B ({facts['mode']}): {facts['sent']} steps in {facts['link']}{sync}{lost}{trouble}"


def _tell(mode: str, error: Exception) -> str:
    """Return an error in one line, without the key: it goes into the provenance."""
    text = f"{mode}: {type(error).__name__}: {error}".splitlines()[0]
    key = os.environ.get("WANDB_API_KEY")
    return text.replace(key, "***") if key else text


def open_tracker(run: TrackedRun) -> Tracker:
    """Return the tracker of an attempt, as the environment asks."""
    return Tracker(lambda mode: _start_wandb(run, mode), choose_modes(os.environ, home=Path.home()))


def _start_wandb(run: TrackedRun, mode: str) -> TrackingClient:
    import wandb

    folder = Path(os.environ.get("WANDB_DIR") or run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        init_timeout=_INIT_SECONDS,
        x_disable_meta=True,  # command line, user and host are nobody's business there
        x_disable_stats=True,  # a thread that samples the machine takes time from two cores
    )
    init: Any = wandb.init  # its type wants literals
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
