"""Suspend on a run's page: the run stops as for a signal, its checkpoint saved; Resume starts it again from there.

Prefect (3.9.1) writes Suspended into its database and tells the run's process nothing.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

import httpx
from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import Pause, PrefectException

_LOOK_SECONDS = 2.0


@contextmanager
def suspended_on_request() -> Iterator[None]:
    """Watch a deployment's flow run; when it is suspended, end the block as SIGTERM does and leave the run Suspended.

    Raises:
        Pause: It was suspended. Prefect ends the process and leaves the state as it is.
    """
    if not runtime.deployment.id:  # Prefect suspends no other run: it could not start it again
        yield
        return
    found: list[State[Any]] = []
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(runtime.flow_run.id, found, done), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        if not found:
            raise
        pause = Pause("suspended on the run's page")
        pause.state = found[0]
        raise pause from error
    finally:
        done.set()
        watcher.join()


def _watch(flow_run: str, found: list[State[Any]], done: threading.Event) -> None:
    while not done.wait(_LOOK_SECONDS):
        with suppress(httpx.HTTPError, PrefectException), get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run)).state
            if state and state.type == StateType.PAUSED:
                found.append(state)
                print(
                    "suspended on the run's page: the stage is ended and saves; Resume there goes on from it, as does "
                    "`ropeway run`",
                    flush=True,
                )
                os.kill(os.getpid(), signal.SIGTERM)
                return
