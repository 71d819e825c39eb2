"""Who measures: this process, or several of this machine, each with its own share of the rows and one card.

Where it runs is environment: `ROPEWAY_EVALUATE_WORKERS`, else one process per card that trains (`ROPEWAY_RANKS`), else
this process alone. The numbers are the same: an item's result depends on that item alone, and whoever asked adds the
results in the items' own order. On a CPU every worker has as many threads as this process would, since another number
of threads rounds differently.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

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
    found = [item for part in parts for item in part]  # as long as all of them; each place is written below
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
    """Return for each process the card that it sees, of those `list_gpus` found; more processes than cards share."""
    # Without CUDA_VISIBLE_DEVICES, CUDA counts the cards it finds, whatever their device files are called.
    cards = [card.strip() if "CUDA_VISIBLE_DEVICES" in environment else str(at) for at, card in enumerate(found)]
    seen = {**environment, "CUDA_VISIBLE_DEVICES": ",".join(cards)}
    usual = min(count_here(seen, count_ranks(seen)), len(cards)) if cards else 1
    count = count_asked(_VARIABLE, environment) or usual
    return tuple(cards[number % len(cards)] if cards else None for number in range(count))


def share_out(function: Callable[..., Result], arguments: Sequence[object], cards: Cards) -> list[Result]:
    """Return `function(*arguments, share)` for every share, by the shares' numbers; one share is made here.

    `function` is a module's own, so that another process finds it.

    Raises:
        TemporaryError: A process was killed.
        RopewayError: What a process raised; or it ended by another error, whose traceback it has printed.
    """
    count = len(cards)
    if count == 1:
        return [function(*arguments, Share(0, 1))]
    with ExitStack() as stack:  # whatever happens, no process is left
        workers: list[_Worker[Result]] = []
        for number, card in enumerate(cards):
            workers.append(_Worker(function, arguments, Share(number, count), card))
            stack.callback(workers[-1].close)
        found = {worker.share.number: worker.receive() for worker in _as_they_answer(workers)}
    return [found[number] for number in range(count)]


class _Worker(Generic[Result]):
    """A process that makes one call.

    It is spawned: a forked process can use neither CUDA nor the threads of the one it was.
    """

    def __init__(
        self, function: Callable[..., Result], arguments: Sequence[object], share: Share, card: str | None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.share = share
        self.answer, theirs = context.Pipe(duplex=False)
        call = (theirs, function, (*arguments, share), card, torch.get_num_threads())
        self._process = context.Process(target=_work, args=call, daemon=True)
        with suppress(BrokenPipeError):  # killed while it began: whoever waits for its answer will say so
            self._process.start()
        theirs.close()  # else a dead worker's end would stay open here

    def close(self) -> None:
        """End the process if it still runs."""
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()
        self.answer.close()

    def receive(self) -> Result:
        """Return what it sent, or raise that."""
        try:
            made: Result = self.answer.recv()
        except (EOFError, OSError):
            if self._process.pid is not None:
                self._process.join()
            who = f"evaluate: process {self.share.number + 1} of {self.share.count}"
            if (code := self._process.exitcode or 0) > 0:
                raise RopewayError(f"{who} ended by an error (exit {code}); its traceback is above") from None
            raise TemporaryError(
                f"{who} died (killed, or out of memory); nothing was written. Run the same command again; fewer "
                f"processes need less memory: {_VARIABLE}={max(1, self.share.count // 2)}"
            ) from None
        if isinstance(made, RopewayError):
            raise made
        return made


def _as_they_answer(workers: Sequence[_Worker[Result]]) -> Iterator[_Worker[Result]]:
    """Yield each worker once its answer, or its end, can be read."""
    waiting = {worker.answer: worker for worker in workers}
    while waiting:
        for answer in wait(list(waiting)):
            yield waiting.pop(answer)  # type: ignore[call-overload]


def _work(
    answer: Connection, function: Callable[..., object], arguments: Sequence[object], card: str | None, threads: int
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
