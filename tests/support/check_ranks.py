"""Ranks that only compare each other. Run as ranks with `python -m tests.support.check_ranks FOLDER…`, one per rank."""

import os
import sys
from pathlib import Path


def main(*folders):
    from ropeway.stages.train.rank_check import check_ranks

    check_ranks(Path(folders[int(os.environ["RANK"])]), "cpu", os.environ)
    print("compared", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
