"""Where a run is displayed: the terminal (`RunDisplay`) or the Prefect UI (`PrefectDisplay` in prefect_adapter.py).

A display shows each step, table and report of `sequence.py`, and retries a step after a temporary failure.
"""

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ropeway.orchestration.dvc_stage import LineWriter, StageStoppedError
from ropeway.orchestration.run_summary import Result
from ropeway.runtime.errors import ConfigError, TemporaryError

if TYPE_CHECKING:  # it imports Prefect
    from ropeway.orchestration.remote.pool_caller import PoolCaller

RETRIES = 2
_MAX_RETRY_SECONDS = 86400.0


@dataclass(frozen=True, slots=True)
class StepResult:
    """The final state of a step (Completed, Unchanged, Restored, Published or Rejected) and one sentence about it."""

    state: str
    words: str


class RunDisplay:
    """Displays a run in the terminal alone, where every line is printed anyway; a subclass adds another place."""

    def step(self, name: str, work: Callable[[LineWriter], StepResult], *, after: Sequence[str] = ()) -> StepResult:  # noqa: ARG002
        """Run one step, retry it after a temporary failure, and return its result; other errors pass through.

        Args:
            name: The step's name, unique in a run.
            work: Runs the step; may be called again after a TemporaryError. Its argument receives each line that the
                terminal shows as well.
            after: The steps whose results it needs: its parents in the graph.
        """
        for _ in range(RETRIES):
            try:
                return work(lambda _line: None)
            except TemporaryError as error:
                if not may_retry(error):
                    raise
                print(f"{name}: {error}\n{name}: retrying in {retry_seconds():g} s; it resumes", flush=True)
                time.sleep(retry_seconds())
        return work(lambda _line: None)

    def table(self, key: str, title: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Show a table."""

    def report(self, key: str, text: str) -> None:
        """Show a markdown text."""

    def finish(self, result: Result) -> None:
        """Record the run's result; anything shown after this may be cut short."""

    def report_drift(self, version: str, digest: str, words: str) -> None:
        """Record that a version's data drifted above its limit, so that it is alerted once."""

    def open_pools(self, pools: Collection[str]) -> "PoolCaller":
        """Return what calls stages in these work pools.

        Raises:
            ConfigError: A pool does not exist, or there is no Prefect server that workers can reach.
        """
        raise ConfigError(
            f"stages are placed in work pools ({', '.join(sorted(pools))}), which need a Prefect server: start "
            "`ropeway server` and run without --no-prefect, or unset ROPEWAY_POOL_*"
        )

    def ask_review(self, digest: str) -> str | None:  # noqa: ARG002 - no server here
        """Start the review of a version if reviews are served; return the URL of its page, or None."""
        return None


def may_retry(error: BaseException) -> bool:
    """Return whether a step that failed with `error` may succeed when retried."""
    return isinstance(error, TemporaryError) and not isinstance(error, StageStoppedError)


def retry_seconds() -> float:
    """Return the pause before a retry, in seconds; ConfigError if `ROPEWAY_RETRY_SECONDS` is no number of them."""
    stated = os.environ.get("ROPEWAY_RETRY_SECONDS", "5")
    try:
        seconds = float(stated)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _MAX_RETRY_SECONDS:
        raise ConfigError(
            f"ROPEWAY_RETRY_SECONDS: expected seconds from 0 to {_MAX_RETRY_SECONDS:g}, found {stated[:40]!r}"
        )
    return seconds
