"""Who measures: this process, or several of this machine, each with its own share of the rows and one card.

Where it runs is environment: `ROPEWAY_EVALUATE_WORKERS`, else one process per card that trains (`ROPEWAY_RANKS`), else
this process alone. The numbers are the same: an item's result depends on that item alone, and whoever asked adds the
results in the items' own order. On a CPU every worker has as many threads as this process would, since another number
of threads rounds differently.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from ropeway.data.mixture import rank_order
from ropeway.runtime.devices import count_here, count_ranks, list_gpus
from ropeway.runtime.errors import RopewayError, TemporaryError
from ropeway.runtime.worker_processes import begin_worker, count_asked

Item = TypeVar("Item")
Result = TypeVar("Result")

Cards = tuple[str | None, ...]  # for each process the card it sees, as in CUDA_VISIBLE_DEVICES; None: none of its own
ALONE: Cards = (None,)
_VARIABLE = "ROPEWAY_EVALUATE_WORKERS"


@dataclass(frozen=True, slots=True)
class Share:
    """One process's part of the items: every `count`-th, from its own number on, so that sorted ones are dealt evenly.

    >>> Share(1, 3).of([10, 11, 12, 13, 14])
    [11, 14]
    """

    number: int
    count: int

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return its part of these items, in their order."""
        return rank_order(items, rank=self.number, world_size=self.count)


def gather(parts: Sequence[Sequence[Item]]) -> list[Item]:
    """Return what all shares made, in the items' own order.

    >>> gather([[10, 13], [11, 14], [12]])
    [10, 11, 12, 13, 14]
    """
    found: list[Any] = [None] * sum(map(len, parts))
    for number, part in enumerate(parts):
        found[number :: len(parts)] = part  # refuses a part of another length than its share
    return found


def plan_workers() -> Cards:
    """Return who measures on this machine, as its environment and its cards have it, and say so.

    Raises:
        ConfigError: As in `count_asked` and `count_ranks`.
    """
    has_cards = torch.cuda.is_available()  # a torch without CUDA sees none
    cards = plan_cards(os.environ, list_gpus() if has_cards else [])
    where = f"on cards {', '.join(map(str, cards))}" if has_cards else f"of up to {torch.get_num_threads()} threads"
    print(f"evaluate: processes: {len(cards)}, {where}", flush=True)
    return cards


def plan_cards(environment: Mapping[str, str], found: Sequence[str]) -> Cards:
    """Return for each process the card that it sees; more processes than cards share them.

    Args:
        environment: What decides how many.
        found: The machine's cards, as `list_gpus` names them.
    """
    # Without CUDA_VISIBLE_DEVICES, CUDA counts the cards it finds, whatever their device files are called.
    cards = [card.strip() if "CUDA_VISIBLE_DEVICES" in environment else str(at) for at, card in enumerate(found)]
    seen = {**environment, "CUDA_VISIBLE_DEVICES": ",".join(cards)}
    usual = min(count_here(seen, count_ranks(seen)), len(cards)) if cards else 1
    count = count_asked(_VARIABLE, environment) or usual
    return tuple(cards[number % len(cards)] if cards else None for number in range(count))


def share_out(function: Callable[..., Result], arguments: Sequence[Any], cards: Cards) -> list[Result]:
    """Return `function(*arguments, share)` for every share, by the shares' numbers; one share is made here.

    Args:
        function: A module's own function, so that another process finds it.
        arguments: Travel to every process.
        cards: Who works.

    Raises:
        TemporaryError: A process was killed.
        RopewayError: What a process raised; or it ended by another error, whose traceback it has printed.
    """
    count, threads = len(cards), torch.get_num_threads()
    shares = [Share(number, count) for number in range(count)]
    if count == 1:
        return [function(*arguments, shares[0])]
    calls = [(function, (*arguments, share), card, threads) for share, card in zip(shares, cards, strict=True)]
    found: dict[int, Result] = {}
    with _started(calls) as workers:
        waiting = {connection: number for number, (_, connection) in enumerate(workers)}
        while waiting:
            for connection in wait(list(waiting)):
                number = waiting.pop(connection)  # type: ignore[call-overload]
                found[number] = _receive(*workers[number], number=number, count=count)
    return [found[number] for number in range(count)]


@contextmanager
def _started(calls: Sequence[tuple[Any, ...]]) -> Iterator[list[tuple[BaseProcess, Connection]]]:
    """Yield (process, connection) per call; whatever happens, none is left.

    They are spawned: a forked process can use neither CUDA nor the threads of the one it was.
    """
    context = multiprocessing.get_context("spawn")
    workers: list[tuple[BaseProcess, Connection]] = []
    try:
        for call in calls:
            ours, theirs = context.Pipe(duplex=False)
            workers.append((context.Process(target=_work, args=(theirs, *call), daemon=True), ours))
            with suppress(BrokenPipeError):  # killed while it began: whoever waits for its answer will say so
                workers[-1][0].start()
            theirs.close()  # else a dead worker's end would stay open here
        yield workers
    finally:
        for worker, connection in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()
            connection.close()


def _work(
    answer: Connection, function: Callable[..., Any], arguments: Sequence[Any], card: str | None, threads: int
) -> None:
    """In a worker: do one call and send what it returns, or what it raises on purpose."""
    begin_worker()
    if card is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = card  # read when CUDA is first used, which nothing has done yet
    torch.set_num_threads(threads)
    try:
        made = function(*arguments)
    except RopewayError as error:
        made = error
    answer.send(made)


def _receive(worker: BaseProcess, connection: Connection, *, number: int, count: int) -> Any:  # noqa: ANN401
    """Return what a worker sent."""
    try:
        made = connection.recv()
    except (EOFError, OSError):
        if worker.pid is not None:
            worker.join()
        who = f"evaluate: process {number + 1} of {count}"
        if (worker.exitcode or 0) > 0:
            raise RopewayError(f"{who} ended by an error (exit {worker.exitcode}); its traceback is above") from None
        raise TemporaryError(
            f"{who} died (killed, or out of memory); nothing was written. Run the same command again; fewer processes "
            f"need less memory: {_VARIABLE}={max(1, count // 2)}"
        ) from None
    if isinstance(made, RopewayError):
        raise made
    return made
