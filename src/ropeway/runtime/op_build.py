"""DeepSpeed's shared-memory op for CPUs: `python -m ropeway.runtime.op_build` builds it once, during setup.

DeepSpeed 0.19.8 guards the build with torch's lock file. If a build is killed, the file stays and every later start
waits for it forever. Each rank also creates a buffer of 69 MB in /dev/shm, which is memory, and never removes it.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil

from ropeway.runtime.devices import list_gpus
from ropeway.runtime.errors import ConfigError, RopewayError

# The longest that ranks wait for one: it reads a checkpoint of the published run (182 GB, before a rewind) from a disk
# of 20 MB/s, the slowest that the watchdog allows: 2.5 h. `stop.hang_seconds` detects a rank that hangs much earlier.
COLLECTIVE_TIMEOUT = timedelta(hours=3)
BUFFERS = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
_OP = "deepspeed_shm_comm"  # Source: ShareMemCommBuilder.NAME, deepspeed/ops/op_builder/cpu/comm.py
# Source: struct allreduce_workspace, shm.cpp of DeepSpeed 0.19.8, with a page for its state.
BUFFER_BYTES = 2 * (1 << 20) + 2 * (32 << 20) + 4096
_BUFFER = "deepspeed_allreduce_buffer"  # Source: SHM_BUFFER_NAME, deepspeed/ops/csrc/cpu/comm/shm.cpp


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Return the build folder of the op: `TORCH_EXTENSIONS_DIR`, else a folder in this Python environment.

    If two environments shared a folder, each switch between them would rebuild the op.
    """
    if stated := environment.get("TORCH_EXTENSIONS_DIR"):
        return Path(stated)
    beside = Path(sys.prefix) / "var"
    return (beside if os.access(sys.prefix, os.W_OK) else Path.home() / ".cache" / "ropeway") / "torch_extensions"


def clear_dead_locks(folder: Path) -> list[Path]:
    """Remove and return the build locks below a folder that no living process on this machine holds.

    torch keeps the file open while it holds the lock (FileBaton of 2.13.0), so a lock that no process has open is
    stale.
    """
    found = list(folder.glob("*/lock"))
    held = _open_paths() if found else set()
    dead = [lock for lock in found if str(lock.resolve()) not in held]
    for lock in dead:
        lock.unlink(missing_ok=True)
    return dead


def _open_paths() -> set[str]:
    paths: set[str] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # process of another user, or just exited
            paths |= {opened.path for opened in process.open_files()}
    return paths


def init_distributed() -> None:
    """Call DeepSpeed's `init_distributed`; on a CPU, then remove this rank's buffer from /dev/shm.

    Its own timeout of 10 minutes ends runs in which one rank reads or writes a large file while the others wait.
    """
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder(os.environ)))
    backend = get_accelerator().communication_backend_name()
    deepspeed.init_distributed(backend, verbose=False, timeout=collective_timeout())
    if get_accelerator().device_name() == "cpu":
        torch.distributed.barrier()  # until every rank has mapped the buffers of the others
        unlink_buffers(int(os.environ["MASTER_PORT"]), rank=torch.distributed.get_rank())


def collective_timeout() -> timedelta:
    """Return how long a collective waits for the other ranks: `DEEPSPEED_TIMEOUT` in minutes, else 3 hours."""
    stated = os.environ.get("DEEPSPEED_TIMEOUT")  # Source of the unit: deepspeed 0.19.8, constants.py
    return timedelta(minutes=int(stated)) if stated else COLLECTIVE_TIMEOUT


def unlink_buffers(port: int, *, rank: int | None = None) -> list[Path]:
    """Remove the buffers of the run on `port` (one rank or all) from /dev/shm; processes that mapped one keep it."""
    pattern = f"{_BUFFER}_{os.getuid()}_*_{port}_{'*' if rank is None else rank}"
    found = list(BUFFERS.glob(pattern))
    for path in found:
        path.unlink(missing_ok=True)
    return found


def check_shared_memory(ranks: int, folder: Path = BUFFERS) -> None:
    """Raise ConfigError unless `ranks` processes on a CPU can create their buffers in `folder`.

    DeepSpeed's op (0.19.8) does not check it: where a buffer could not be created, the ranks wait forever; where
    there was no space for it, they end by SIGSEGV, and the run asks to be resumed.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{folder} is not writable for this user. Ranks on a CPU exchange gradients there; run "
            f"`chmod 1777 {folder}` as root"
        )
    free, needed = shutil.disk_usage(folder).free, ranks * BUFFER_BYTES
    if free < needed:
        raise ConfigError(
            f"{folder}: expected {needed / 1e6:.0f} MB free for {ranks} ranks on a CPU, found {free / 1e6:.0f} MB. "
            f"In a container, start it with `--shm-size 1g`; elsewhere run `mount -o remount,size=1G {folder}` as root"
        )


def announce_build(folder: Path) -> None:
    """Print that the op is about to be compiled and how long it takes, if it is not built yet."""
    if not any(folder.glob(f"*/{_OP}*.so")):
        print(
            f"building DeepSpeed's CPU communication op in {folder} (once per environment, 20 to 80 s without output)",
            file=sys.stderr,
            flush=True,
        )


def main() -> None:
    """Load the op, which compiles it if it is not built yet; do nothing on a machine with GPUs."""
    if list_gpus():
        return
    from ropeway.runtime.launcher import check_compiler

    check_compiler()
    os.environ["DS_ACCELERATOR"] = "cpu"
    # torch looks for ninja on PATH; it is in this environment, which need not be active.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    folder = extensions_folder(os.environ)
    clear_dead_locks(folder)
    announce_build(folder)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)


if __name__ == "__main__":
    try:
        main()
    except RopewayError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
