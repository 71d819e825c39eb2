"""Stands in for a rank: `-m tests.support.failing_rank ROOT FAILS`; the rank FAILS ends with 64, the others wait."""

import os
import signal
import sys

if __name__ == "__main__":
    if os.environ["SLURM_PROCID"] == sys.argv[2]:
        os._exit(64)
    signal.pause()
