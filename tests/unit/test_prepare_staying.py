"""Worker processes are started once for all passes of prepare."""

import os

from ropeway.prepare.workers import make, staying_workers


def pid_of(_job):
    return os.getpid()


def test_passes_of_a_block_share_their_workers_and_none_outlives_it(monkeypatch, tmp_path):
    monkeypatch.setenv("ROPEWAY_PREPARE_WORKERS", "2")

    def one_pass():
        return set(make(pid_of, list(range(6)), text_bytes=0, work=tmp_path))

    with staying_workers():
        first, second = one_pass(), one_pass()
        assert second <= first
    assert os.getpid() not in first
    assert not first & one_pass()
    for pid in first:
        assert not os.path.exists(f"/proc/{pid}")  # noqa: PTH110
