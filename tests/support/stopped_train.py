"""The stage train, whose ranks are asked to stop at one look at the request: the same moment in every run of a test.

Run as `python -m tests.support.stopped_train LOOK` in a workspace. Every step counts as long, so that the ranks look
after each micro-batch and each validation batch. Only the last rank is asked: the others must follow it.
"""

import os
import runpy
import sys

from ropeway.runtime import launcher

AT = "TEST_STOP_AT_LOOK"


def main(look):
    os.environ[AT] = look
    launcher.RANK_MODULE = "tests.support.stopped_train"
    sys.argv = ["ropeway", "execute-stage", "train"]
    runpy.run_module("ropeway.cli.main", run_name="__main__")


def be_rank():
    from ropeway.stages.train import loop, stop_request

    loop.LONG_STEP_SECONDS, loop.VALIDATION_BATCHES_PER_LOOK = 0, 1
    looks, look = 0, stop_request.StopRequest.__call__

    def count(request):
        nonlocal looks
        looks += 1
        is_last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
        return look(request) or (is_last and str(looks) == os.environ[AT])

    stop_request.StopRequest.__call__ = count
    runpy.run_module("ropeway.stages.train.rank", run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 2 else be_rank()
