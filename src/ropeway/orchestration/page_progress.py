"""How far a stage has come, as a bar on its page: read from the steps that it names in what it says."""

import re
import time
from contextlib import suppress
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from ropeway.orchestration.dvc_stage import Say
from ropeway.orchestration.prefect_server import is_answering

_STEP = re.compile(r"\bstep (\d+)/(\d+)\b")
_PAUSE_SECONDS = 5.0


class Bar:
    """Passes a stage's lines on; a line that names `step 5/24` moves the bar, at most every five seconds.

    Nobody waits for the bar: where the server is away it stays as it is, and moves with a later line.
    """

    def __init__(self, say: Say, key: str, url: str) -> None:
        """Keep whom to pass lines on to, the artifact's key and the API's address."""
        self._say, self._key, self._url = say, key, url
        self._artifact: UUID | None = None
        self._moved = float("-inf")

    def __call__(self, line: str) -> None:
        """Take a line."""
        self._say(line)
        if (found := _STEP.search(line)) and int(found[2]):
            self._move(min(int(found[1]), int(found[2])), int(found[2]))

    def _move(self, done: int, steps: int) -> None:
        now = time.monotonic()
        if (done < steps and now - self._moved < _PAUSE_SECONDS) or not is_answering(self._url):
            return
        self._moved = now
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), suppress(httpx.HTTPError):
            percent, words = round(100 * done / steps, 1), f"step {done} of {steps}"
            if self._artifact is None:
                made = create_progress_artifact(percent, key=self._key, description=words)
                self._artifact = made if isinstance(made, UUID) else None  # never a coroutine: no loop runs here
            else:
                update_progress_artifact(self._artifact, percent, description=words)
