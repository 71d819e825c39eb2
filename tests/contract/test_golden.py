"""What preparing makes of a small corpus: ids, masks, order of rows and ledger, as they were before any re-laying.

A container's format may change; these may not. Written by `python -m tests.contract.test_golden`.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ropeway.data.batches import plan_epoch, validation_rows
from ropeway.data.loss_mask import loss_mask
from ropeway.data.shards import open_shards
from tests.support.prepared_run import make_prepared

GOLDEN = Path(__file__).with_name("golden.json")
CASES = {
    "padded": {},
    "packed": {"layout": "packed", "max_length": 96, "document_end": "masked"},
    "answers": {"what_counts": "answers"},
}


def digest(*values):
    """The sha256 of arrays and texts, in order."""
    total = hashlib.sha256()
    for value in values:
        part = np.ascontiguousarray(value).astype(np.int64).tobytes() if not isinstance(value, str) else value.encode()
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


def rows_digest(rows):
    return digest(*(str([(p.source, p.sequence, p.begin, p.end) for p in row]) for row in rows))


def look(root, **changes):
    """Return everything that a re-laying must keep, as JSON values."""
    workspace, profile = make_prepared(root, **changes)
    shards = open_shards(workspace.data)
    sources = {}
    for source in shards.sources:
        read = [source.read(number) for number in range(len(source.lengths))]
        sources[source.name] = {
            "ids": digest(*(ids for ids, _ in read)),
            "masks": digest(*(loss_mask(kinds, profile) for _, kinds in read)),
            "train": [int(number) for number in source.train],
            "validation": [int(number) for number in source.validation],
        }
    plans = [plan_epoch(shards, profile, epoch=epoch) for epoch in range(2)]
    return {
        "sources": sources,
        "epochs": [rows_digest(plan.row(number) for number in range(plan.rows)) for plan in plans],
        "validation": [[name, rows_digest(rows)] for name, rows in validation_rows(shards, profile)],
        "ledger": json.loads(workspace.ledger.read_bytes()),
    }


@pytest.mark.parametrize("case", CASES)
def test_ids_masks_order_and_ledger_are_those_that_were_written_down(tmp_path, case):
    assert look(tmp_path, **CASES[case]) == json.loads(GOLDEN.read_text(encoding="utf-8"))[case]


if __name__ == "__main__":
    import tempfile

    found = {}
    for name, changed in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = look(Path(folder), **changed)
    GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sys.stdout.write(f"{GOLDEN}\n")
