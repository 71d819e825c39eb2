"""A Dask cluster as workers: `ROPEWAY_DASK_SCHEDULER` names its scheduler, e.g. `tcp://10.0.0.5:8786`.

Its workers read raw files and write units by the same paths, so they need this workspace's file system and this
version of the code; both are checked before any work is given out. A worker's threads are its cores.
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
from ropeway.stages.tokenize.encode_workers import Workforce
from ropeway.stages.tokenize.units import code_digest

TIMEOUT_SECONDS = 10.0
NAME = "ROPEWAY_DASK_SCHEDULER"


class Client(Protocol):
    """What is used of `distributed.Client`, an optional package."""

    status: str

    def run(self, function: Callable[[str], dict[str, str]], argument: str) -> Mapping[str, dict[str, str]]:
        """Return every worker's answer."""

    def scheduler_info(self, n_workers: int) -> Mapping[str, Mapping[str, object]]:
        """Return what the scheduler knows, `workers` among it."""


@contextmanager
def open_cluster(address: str, work: Path) -> Iterator[Workforce]:
    """Yield the workers of the cluster at `address`.

    Raises:
        ConfigError: `distributed` is not installed, the scheduler is not reached or has no workers, or a worker sees
            other files or has another version of the code.
    """
    try:
        import distributed
    except ImportError:
        raise ConfigError(
            f"{NAME} is {address}, but the package `distributed` is not installed; `make setup EXTRAS=cluster` "
            "installs it, or unset the variable to use this machine"
        ) from None
    try:
        client = distributed.Client(address, timeout=TIMEOUT_SECONDS)
    except (OSError, TimeoutError, ValueError) as error:
        raise ConfigError(
            f"{NAME}: no Dask scheduler answers at {address} within {TIMEOUT_SECONDS:g} s ({error}); start one "
            "(`dask scheduler`), correct the address, or unset the variable to use this machine"
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=TIMEOUT_SECONDS)
        except TimeoutError:
            raise ConfigError(
                f"{NAME}: the scheduler at {address} has no workers after {TIMEOUT_SECONDS:g} s; start some "
                f"(`dask worker {address}`) on machines that see {work}"
            ) from None
        check_workers(client, work)
        executor = client.get_executor()
        try:
            yield Workforce(
                f"the Dask cluster at {address}",
                executor,
                (distributed.KilledWorker, CancelledError),
                _Watch(client, address, work),
            )
        finally:
            executor.shutdown(wait=False)


def check_workers(client: Client, work: Path) -> None:
    """Raise ConfigError unless every worker finds a file written here, and has the same code and tokenizers."""
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
                f"{NAME}: the worker {worker} does not see {work}; workers need this workspace's file system under the "
                "same path"
            )
        if found != expected:
            wrong = next(name for name in ("code", "tokenizers") if found[name] != expected[name])
            raise ConfigError(
                f"{NAME}: the worker {worker} has other {wrong} than this process ({found[wrong] or 'none'}, expected "
                f"{expected[wrong]}); install the same version there"
            )


def _make_probe() -> Callable[[str], dict[str, str]]:
    """Return a function that travels by value, so that a worker without this package can answer, too."""

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


class _Watch:
    """Sees that the cluster has workers: without any, Dask would wait for new ones for ever."""

    def __init__(self, client: Client, address: str, work: Path) -> None:
        self._client, self._address, self._work = client, address, work
        self._seen = monotonic()

    def __call__(self) -> None:
        """Raise TemporaryError when there has been nobody for a while; a nanny's worker may come again."""
        if self._client.status == "running" and self._client.scheduler_info(n_workers=-1)["workers"]:
            self._seen = monotonic()
        elif monotonic() - self._seen > TIMEOUT_SECONDS:
            raise TemporaryError(
                f"tokenize: the Dask cluster at {self._address} is gone or has no workers left; whole units are kept "
                f"in {self._work}. Run the same command again: it makes only those that are missing"
            )
