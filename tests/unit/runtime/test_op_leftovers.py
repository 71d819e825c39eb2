"""Locks and buffers that DeepSpeed leaves on a CPU neither block a later start nor use up memory."""

import inspect
import math
import os
import re
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.file_baton import FileBaton

from ropeway.runtime import op_build as leftovers
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.op_build import (
    announce_build,
    check_shared_memory,
    clear_dead_locks,
    extensions_folder,
    unlink_buffers,
)

# torch's module by its path: importing torch takes 2 s.
HOLD = "import runpy, sys; runpy.run_path(sys.argv[2])['FileBaton'](sys.argv[1]).try_acquire(); {then}"
BUILD = """
import signal, sys
import torch.utils.cpp_extension as extension
def hold(*_, **__):
    print("building", flush=True)
    signal.pause()
extension._write_ninja_file_and_build_library = hold
from ropeway.runtime.op_build import main
main()
"""


@pytest.fixture
def lock(tmp_path):
    (tmp_path / "deepspeed_shm_comm").mkdir()
    return tmp_path / "deepspeed_shm_comm" / "lock"


def hold(lock, then):
    command = [sys.executable, "-c", HOLD.format(then=then), str(lock), inspect.getfile(FileBaton)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_lock_of_a_killed_build_is_cleared(lock, tmp_path):
    with hold(lock, "import os; os.kill(os.getpid(), 9)") as dead:
        dead.wait()
    assert lock.exists()
    assert clear_dead_locks(tmp_path) == [lock]
    assert FileBaton(str(lock)).try_acquire()


def test_the_lock_of_a_living_build_stays(lock, tmp_path):
    with hold(lock, "print('held', flush=True); sys.stdin.read()") as alive:
        assert alive.stdout.readline() == "held\n"
        assert clear_dead_locks(tmp_path) == []
        assert lock.exists()
        alive.communicate()


def test_setup_works_after_a_killed_build(tmp_path):
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    # As in a Dockerfile: the environment, which has ninja, is not on PATH.
    environment |= {"CXX": shutil.which(os.environ.get("CXX", "c++")), "PATH": str(tmp_path)}
    command = [sys.executable, "-c", BUILD]
    for _ in range(2):  # the second waits forever if the lock of the first is left
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as building:
            try:
                assert building.stdout.readline() == "building\n"
            finally:
                building.kill()
        assert list(tmp_path.glob("*/lock"))


def test_a_buffer_has_the_size_of_deepspeeds():
    import deepspeed

    source = (Path(deepspeed.__file__).parent / "ops" / "csrc" / "cpu" / "comm" / "shm.cpp").read_text()
    naive, largest = (
        math.prod(map(int, re.search(rf"#define {name} ([0-9 *]+)\n", source)[1].split(" * ")))
        for name in ("NAIVE_ALLREDUCE_THRESHOLD", "MAX_BUF_SIZE")
    )
    assert "char buffer[2 * NAIVE_ALLREDUCE_THRESHOLD + 2 * MAX_BUF_SIZE];" in source
    assert 0 < leftovers.BUFFER_BYTES - 2 * (naive + largest) <= 4096


def test_ranks_without_shared_memory_do_not_start(monkeypatch, tmp_path):
    free = [2 * leftovers.BUFFER_BYTES]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    check_shared_memory(2, tmp_path)
    with pytest.raises(ConfigError, match="not writable"):
        check_shared_memory(2, tmp_path / "gone")
    free[0] = 64 << 20  # Docker's default
    with pytest.raises(ConfigError, match="--shm-size"):
        check_shared_memory(2, tmp_path)


def test_a_build_is_announced_with_its_folder_and_only_once(lock, tmp_path, capsys):
    announce_build(tmp_path)
    assert re.search(rf"building .* {re.escape(str(tmp_path))}.* s ", capsys.readouterr().err)
    lock.with_name("deepspeed_shm_comm.so").touch()
    announce_build(tmp_path)
    assert capsys.readouterr().err == ""


def test_each_environment_has_its_own_build_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert extensions_folder({}) == tmp_path / "var" / "torch_extensions"
    assert str(extensions_folder({"TORCH_EXTENSIONS_DIR": "/elsewhere"})) == "/elsewhere"


def test_only_the_buffers_of_this_run_are_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(leftovers, "BUFFERS", tmp_path)
    here = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1"
    for name in (f"{here}_4100_0", f"{here}_4100_1", f"{here}_41001_0", f"{here}_4200_0", "other_4100_0"):
        (tmp_path / name).write_bytes(b"")
    unlink_buffers(4100, rank=1)
    assert not (tmp_path / f"{here}_4100_1").exists()
    unlink_buffers(4100)
    assert {path.name for path in tmp_path.iterdir()} == {f"{here}_41001_0", f"{here}_4200_0", "other_4100_0"}


@pytest.mark.parametrize(("stated", "minutes"), [(None, 180), ("7", 7)])
def test_collectives_wait_for_a_rank_that_reads_a_large_checkpoint(monkeypatch, stated, minutes):
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    given = {}
    monkeypatch.setattr(deepspeed, "init_distributed", lambda *_, **options: given.update(options))
    monkeypatch.setattr(get_accelerator(), "device_name", lambda: "cuda", raising=False)
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    if stated:
        monkeypatch.setenv("DEEPSPEED_TIMEOUT", stated)
    leftovers.init_distributed()
    assert given["timeout"] == timedelta(minutes=minutes)
