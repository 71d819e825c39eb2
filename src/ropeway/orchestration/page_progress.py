"""How far a stage has come, as a bar on its page: read from the file that the stage writes for programs."""

import json
import time
from contextlib import suppress
from pathlib import Path
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from ropeway.orchestration.prefect_server import is_answering

_PAUSE_SECONDS = 5.0
_TAIL_BYTES = 1 << 16  # a record is some 1 kB


def read_progress(path: Path) -> tuple[int, int] | None:
    """Return (step, steps of the whole run) of a progress file's last whole record; None where it has none.

    A record without its newline is still being written. A stage that writes no such file has no progress to show.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            *lines, _ = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            step, steps = int(record["step"]), int(record["total_steps"])
            if 0 <= step <= steps and steps:
                return step, steps
    return None


class Bar:
    """The bar of one stage; it is moved at most every five seconds.

    Nobody waits for the bar: where the server is away it stays as it is, and moves at a later refresh.
    """

    def __init__(self, path: Path, key: str, url: str) -> None:
        """Keep the progress file, the artifact's key and the API's address."""
        self._path, self._key, self._url = path, key, url
        self._artifact: UUID | None = None
        self._shown: tuple[int, int] | None = None
        self._looked = float("-inf")

    def refresh(self, *, last: bool = False) -> None:
        """Show how far the stage has come; `last` is its end, which does not wait for the five seconds."""
        now = time.monotonic()
        if not last and now - self._looked < _PAUSE_SECONDS:
            return
        self._looked = now
        found = read_progress(self._path)
        if found is None or found == self._shown or not is_answering(self._url):
            return
        (step, steps), self._shown = found, found
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), suppress(httpx.HTTPError):
            percent, words = round(100 * step / steps, 1), f"step {step} of {steps}"
            if self._artifact is None:
                made = create_progress_artifact(percent, key=self._key, description=words)
                self._artifact = made if isinstance(made, UUID) else None  # never a coroutine: no loop runs here
            else:
                update_progress_artifact(self._artifact, percent, description=words)
