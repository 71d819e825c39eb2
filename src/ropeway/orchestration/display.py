"""What a run is shown on while it goes: the terminal alone here, Prefect's pages in `prefect_adapter.py`.

A board shows each step, table and report of `sequence.py`, and retries a step that failed for a passing reason.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ropeway.orchestration.dvc_stage import Say, StageStoppedError
from ropeway.orchestration.run_summary import Result
from ropeway.runtime.errors import TemporaryError

RETRIES = 2


@dataclass(frozen=True, slots=True)
class Done:
    """How a step ended: Completed, Unchanged, Restored, Published or Rejected, and one sentence for people."""

    state: str
    words: str


class Board:
    """Where a run appears: here the terminal alone, which has everything already; a subclass shows it elsewhere too."""

    def step(self, name: str, work: Callable[[Say], Done], *, after: Sequence[str] = ()) -> Done:  # noqa: ARG002
        """Do one step and return how it ended, again if its failure may pass; other errors pass through.

        Args:
            name: What it is called; each name once in a run.
            work: Does it; may be called again after a TemporaryError. It is given where its lines go beside the
                terminal.
            after: The steps it follows, for a picture.
        """
        for _ in range(RETRIES):
            try:
                return work(lambda _line: None)
            except TemporaryError as error:
                if not may_retry(error):
                    raise
                print(f"{name}: {error}\n{name}: trying again, it resumes", flush=True)
                time.sleep(retry_seconds())
        return work(lambda _line: None)

    def table(self, key: str, title: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Show a table."""

    def report(self, key: str, text: str) -> None:
        """Show a markdown text."""

    def over(self, result: Result) -> None:
        """Take the run's result: whatever is shown from here on may be cut short."""

    def ask_review(self, digest: str) -> str | None:  # noqa: ARG002 - there is nobody to ask
        """Ask for a review of a version where people are asked; return where they answer, or None."""
        return None


def may_retry(error: BaseException) -> bool:
    """Return whether the same step may succeed if it is made again now; it then resumes."""
    return isinstance(error, TemporaryError) and not isinstance(error, StageStoppedError)


def retry_seconds() -> float:
    """Return the pause before a step is tried again."""
    return float(os.environ.get("ROPEWAY_RETRY_SECONDS", "5"))
