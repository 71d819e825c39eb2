"""How long packing takes and how full its rows are, at the published run's size: one JSON line, 1 when a promise fails.

The lengths are as many as the published mixture has, 188,842 of conversations and 236,022 of chunks of long text, drawn
from two log-normal distributions (the card states no lengths) and cut at 8,192.
"""

import json
import sys
import time

import numpy as np

from ropeway.data.packing import plan_packing

CAPACITY = 8192
PROMISED_SECONDS, PROMISED_FULL = 3.0, 0.995


def main() -> int:
    """Print the figures; return the exit code."""
    generator = np.random.default_rng(0)
    drawn = np.concatenate([generator.lognormal(6.8, 0.9, 188_842), generator.lognormal(7.5, 1.1, 236_022)])
    lengths = np.minimum(drawn.astype(np.int64) + 1, CAPACITY)
    began = time.perf_counter()
    rows = plan_packing(lengths.tolist(), capacity=CAPACITY)
    seconds = time.perf_counter() - began
    full = float(lengths.sum()) / (len(rows) * CAPACITY)
    whole = sorted(index for row in rows for index in row) == list(range(len(lengths)))
    kept = seconds <= PROMISED_SECONDS and full >= PROMISED_FULL and whole
    facts = {"bench": "packing", "sequences": len(lengths), "rows": len(rows), "seconds": round(seconds, 3)}
    print(json.dumps({**facts, "full": round(full, 6), "nothing_lost": whole, "promise_kept": kept}))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
