"""Ranks as threads of one process, with the collectives of torch.distributed that saving a checkpoint uses."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


class FakeRanks:
    """Takes the place of `torch.distributed`; every collective waits for all ranks."""

    class ReduceOp:
        MIN = "min"

    def __init__(self, count):
        self.count = count
        self._barrier = threading.Barrier(count, timeout=30)
        self._here = threading.local()
        self._values = [None] * count

    def run(self, act):
        """Return `act(rank)` of every rank; raise the first rank's error once all have ended."""

        def go(rank):
            self._here.rank = rank
            try:
                return act(rank)
            except BaseException:
                self._barrier.abort()  # as the launcher ends the others
                raise

        with ThreadPoolExecutor(self.count) as pool:
            futures = [pool.submit(go, rank) for rank in range(self.count)]
        errors = [error for one in futures if (error := one.exception())]
        own = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        if errors:
            raise (own or errors)[0]
        return [one.result() for one in futures]

    def get_rank(self):
        return self._here.rank

    def get_world_size(self):
        return self.count

    def barrier(self):
        self._barrier.wait()

    def _exchange(self, value):
        self._barrier.wait()
        self._values[self.get_rank()] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def all_gather_object(self, into, value):
        into[:] = self._exchange(value)

    def broadcast_object_list(self, values):
        values[:] = self._exchange(list(values))[0]

    def all_reduce(self, tensor, op=None):
        values = torch.stack(self._exchange(tensor.clone()))
        tensor.copy_(values.min(dim=0).values if op == "min" else values.sum(dim=0))
