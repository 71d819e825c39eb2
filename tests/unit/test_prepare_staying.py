"""Worker processes are started once for all passes of prepare."""

import os
from pathlib import Path

from ropeway.stages.prepare import encode_workers as workers
from ropeway.stages.prepare.encode_workers import make, staying_workers


def pid_of(_job):
    return os.getpid()


def test_passes_of_a_block_share_their_workers_and_none_outlives_it(monkeypatch, tmp_path):
    opened, open_pool = [], workers.open_pool
    monkeypatch.setattr(workers, "open_pool", lambda count: opened.append(count) or open_pool(count))

    def one_pass(count):
        monkeypatch.setenv("ROPEWAY_PREPARE_WORKERS", str(count))
        return set(make(pid_of, list(range(6)), text_bytes=0, work=tmp_path))

    with staying_workers():
        pids = one_pass(2) | one_pass(2)
        assert opened == [2]
        pids |= one_pass(3)  # a pass with more to do is not held to the few of an earlier one
        assert opened == [2, 3]
    assert os.getpid() not in pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    one_pass(2)
    assert opened == [2, 3, 2]
