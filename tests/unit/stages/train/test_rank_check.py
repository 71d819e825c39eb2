"""Ranks that cannot train together are refused by name before they communicate."""

import base64
import json
import sys
from functools import partial
from pathlib import Path

import pytest

from ropeway.runtime.launcher import free_port
from ropeway.stages.train import rank_check
from ropeway.stages.train.rank_check import RankReport, find_faults
from tests.support import forked

PATH = Path("/w/.work/train.nonce")


def ranks(*hosts, **changes):
    """Return one report per host, all well but for `changes`: field -> one value per rank."""
    usual = {"accelerator": "cuda", "nonce": "right", "problem": None}
    return [
        RankReport(
            rank=rank,
            host=host,
            **{
                "card": f"GPU-{rank}",
                **usual,
                **{key: values[rank] for key, values in changes.items()},
            },
        )
        for rank, host in enumerate(hosts)
    ]


def faults(reports):
    return find_faults(reports, nonce="right", path=PATH)


def test_equal_machines_with_a_gpu_per_rank_are_accepted():
    assert faults(ranks("a", "a", "b", "b")) == []
    assert faults(ranks("a", "b", card=["GPU-0", "GPU-0"])) == []  # other machines, e.g. with virtual GPUs
    assert faults(ranks("a", "a", accelerator=["cpu", "cpu"], card=["", ""])) == []


@pytest.mark.parametrize(
    ("reports", "words"),
    [
        (ranks("a", "b", "b", accelerator=["cuda", "cpu", "cpu"]), ["cuda on a; cpu on b"]),
        (ranks("a", "a", "b", nonce=["right", "right", None]), [str(PATH), "cannot be read on b", "file system"]),
        (ranks("a", "b", nonce=["right", "old"]), ["cannot be read on b"]),
        (ranks("a", "b", "b", card=["0", "1", "1"]), ["host b: 2 ranks use GPU 1"]),
        (ranks("a", "b", problem=[None, "no C++ compiler"]), ["rank 1 on host b: no C++ compiler"]),
    ],
)
def test_what_differs_is_named_with_its_host(reports, words):
    (fault,) = faults(reports)
    assert all(word in fault for word in words)


def test_a_gpu_that_torch_cannot_use_is_not_replaced_by_the_cpu(monkeypatch, tmp_path):
    visible = {"CUDA_VISIBLE_DEVICES": "0"}
    problem = partial(rank_check._find_problem, devices=tmp_path)
    assert problem("cpu", visible) is None  # no GPU: DeepSpeed's launcher has set the variable
    (tmp_path / "nvidia0").touch()
    assert "has GPUs (0)" in problem("cpu", visible)
    assert problem("cpu", {"CUDA_VISIBLE_DEVICES": ""}) is None
    assert problem("cpu", {**visible, "DS_ACCELERATOR": "cpu"}) is None
    assert problem("cuda", visible) is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in problem("cpu", {"CUDA_VISIBLE_DEVICES": ""})


def start_ranks(*folders):
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(len(folders)))}).encode()).decode()
    options = [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    return forked.run([sys.executable, "-m", forked.LAUNCHER, *options, "tests.support.check_ranks", *folders])


def test_ranks_without_a_shared_file_system_end_with_one_message(tmp_path):
    shared, other = str(tmp_path / "shared"), tmp_path / "other"
    assert start_ranks(shared, shared, shared).stdout.count("compared") == 3
    other.mkdir()
    (other / rank_check.NONCE).write_text("of an earlier run")
    done = start_ranks(shared, shared, str(other))
    assert done.returncode == 64
    assert done.stdout.count("cannot be read on") == 1
    assert "compared" not in done.stdout


class FakeStore:
    """A store that rank 0 serves; notes for which keys a rank waits."""

    def __init__(self, **values):
        self.values, self.awaited = values, []

    def set(self, key, value):
        self.values[key] = value

    def get(self, key):
        return self.values[key]

    def wait(self, keys, _timeout):
        self.awaited += keys


def test_rank_0_serves_the_store_until_all_have_read_the_result(tmp_path, monkeypatch):
    other = ranks("a", "a", card=["", ""], accelerator=["cpu", "cpu"])[1]
    store = FakeStore(**{"rank-1": json.dumps(rank_check.asdict(other))})
    monkeypatch.setattr(rank_check, "rendezvous", lambda _: iter([(store, 0, 2)]))
    monkeypatch.setattr(rank_check, "PrefixStore", lambda _, served: served)
    monkeypatch.setattr(rank_check, "token_hex", lambda: "right")
    rank_check.check_ranks(tmp_path, "cpu", {"RANK": "0"})
    assert store.awaited == ["read-0", "read-1"]
