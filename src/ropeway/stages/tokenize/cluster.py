"""Tokenize on a Dask cluster: `ROPEWAY_DASK_SCHEDULER` is its scheduler's address, e.g. `tcp://10.0.0.5:8786`.

Workers read raw files and write units under the same paths as this process, so they need a shared file system and the
same version of the code. Both are checked before any job is submitted. Each thread of a worker runs one job.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Protocol
from uuid import uuid4

import tokenizers

from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.stages.tokenize.encode_workers import WorkerPool
from ropeway.stages.tokenize.units import code_digest

TIMEOUT_SECONDS = 10.0
VARIABLE = "ROPEWAY_DASK_SCHEDULER"


class Client(Protocol):
    """The methods used of `distributed.Client`; the package is optional."""

    status: str

    def run(self, function: Callable[[str], dict[str, str]], argument: str) -> Mapping[str, dict[str, str]]:
        """Return the function's result from each worker."""

    def scheduler_info(self, n_workers: int) -> Mapping[str, Mapping[str, object]]:
        """Return the scheduler's state, including `workers`."""


@contextmanager
def open_cluster(address: str, work: Path) -> Iterator[WorkerPool]:
    """Yield the worker pool of the cluster at `address`.

    Raises:
        ConfigError: `distributed` is not installed, the scheduler cannot be reached or has no workers, or a worker has
            another file system or another version of the code.
    """
    try:
        import distributed
    except ImportError:
        raise ConfigError(
            f"{VARIABLE} is {address}, but the package `distributed` is not installed; run `make setup "
            "EXTRAS=cluster`, or unset the variable to use this machine"
        ) from None
    try:
        client = distributed.Client(address, timeout=TIMEOUT_SECONDS)
    except (OSError, TimeoutError, ValueError) as error:
        raise ConfigError(
            f"{VARIABLE}: no Dask scheduler responds at {address} within {TIMEOUT_SECONDS:g} s ({error}); start "
            "one (`dask scheduler`), correct the address, or unset the variable to use this machine"
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=TIMEOUT_SECONDS)
        except TimeoutError:
            raise ConfigError(
                f"{VARIABLE}: the scheduler at {address} has no workers after {TIMEOUT_SECONDS:g} s; start some "
                f"(`dask worker {address}`) on machines that see {work}"
            ) from None
        check_workers(client, work)
        executor = client.get_executor()
        try:
            yield WorkerPool(
                f"the Dask cluster at {address}",
                executor,
                (distributed.KilledWorker, CancelledError),
                _HealthCheck(client, address, work),
            )
        finally:
            executor.shutdown(wait=False)


def check_workers(client: Client, work: Path) -> None:
    """Raise ConfigError unless every worker sees a file written here and has the same code and tokenizers version."""
    work.mkdir(parents=True, exist_ok=True)
    token = work / f".{uuid4().hex}.token"
    token.write_text(token.name, encoding="utf-8")
    try:
        answers = client.run(_make_probe(), str(token))
    finally:
        token.unlink()
    expected = {"file": token.name, "code": code_digest(), "tokenizers": tokenizers.__version__}
    for worker, found in sorted(answers.items()):
        if found["file"] != token.name:
            raise ConfigError(
                f"{VARIABLE}: the worker {worker} does not see {work}; mount this workspace's file system there "
                "under the same path"
            )
        if found != expected:
            wrong = next(name for name in ("code", "tokenizers") if found[name] != expected[name])
            raise ConfigError(
                f"{VARIABLE}: the worker {worker} has another version of {wrong} ({found[wrong] or 'not installed'}, "
                f"expected {expected[wrong]}); install the same version there"
            )


def _make_probe() -> Callable[[str], dict[str, str]]:
    """Return a function that is pickled by value, so that a worker without this package can run it."""

    def probe(path: str) -> dict[str, str]:
        from pathlib import Path

        found = {"file": "", "code": "", "tokenizers": ""}
        if Path(path).is_file():
            found["file"] = Path(path).read_text(encoding="utf-8")
        try:
            import tokenizers

            from ropeway.stages.tokenize.units import code_digest
        except ImportError:
            return found
        return found | {"code": code_digest(), "tokenizers": tokenizers.__version__}

    return probe


class _HealthCheck:
    """Checks that the cluster has workers: without any, Dask would wait forever."""

    def __init__(self, client: Client, address: str, work: Path) -> None:
        self._client, self._address, self._work = client, address, work
        self._seen = monotonic()

    def __call__(self) -> None:
        """Raise TemporaryError if there has been no worker for `TIMEOUT_SECONDS`; a nanny may restart its worker."""
        if self._client.status == "running" and self._client.scheduler_info(n_workers=-1)["workers"]:
            self._seen = monotonic()
        elif monotonic() - self._seen > TIMEOUT_SECONDS:
            raise TemporaryError(
                f"tokenize: the Dask cluster at {self._address} is down or has no workers; completed units are kept in "
                f"{self._work}. Run the same command again to make the missing ones"
            )
