"""A disk in user space (FUSE) that records every change in order and returns errors on request.

Two attributes of the mounted folder control it: `user.mark` writes a mark into the record, `user.fault` is a JSON
`Fault` that the following operations meet, or empty.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEW_DATA = ("write", "grow")
NEW_INODE = ("create", "mkdir", "symlink")
CHANGES = (*NEW_DATA, *NEW_INODE, "truncate", "rename", "link", "unlink", "rmdir", "chmod", "utimens")


@dataclass(frozen=True)
class Fault:
    """An error that operations of these kinds return, from the one after `skip` on, `times` times."""

    error: str
    kinds: tuple[str, ...]
    skip: int = 0
    times: int = 1 << 30


DISK_FULL = Fault("ENOSPC", (*NEW_DATA, *NEW_INODE))
NO_INODES = Fault("ENOSPC", NEW_INODE)
READ_ONLY = Fault("EROFS", CHANGES)
READ_ERROR = Fault("EIO", ("read",))


def mark(mount, text):
    """Write into the record that this was reported as done."""
    os.setxattr(mount, "user.mark", text.encode())


def set_fault(mount, fault):
    """Make the following operations fail; None ends that."""
    os.setxattr(mount, "user.fault", b"" if fault is None else json.dumps(asdict(fault)).encode())


def missing():
    """Return what this machine lacks for a disk in user space, or None."""
    if not os.access("/dev/fuse", os.W_OK):
        return "/dev/fuse cannot be opened"
    return None if shutil.which("fusermount3") else "fusermount3 is not installed (Debian: fuse3 libfuse3-3)"


@contextmanager
def mounted(folder):
    """Yield (mount, record): an empty disk at `folder/disk`, and the file that records it."""
    backing, mount, record = folder / "backing", folder / "disk", folder / "record"
    backing.mkdir(parents=True)
    mount.mkdir()
    command = [sys.executable, "-m", "tests.support.recorded_disk_server", *map(str, (backing, mount, record))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "mounted\n"
        try:
            yield mount, record
        finally:
            subprocess.run(["fusermount3", "-u", "-z", str(mount)], check=True)
            server.wait(60)


def run_chaos(name, cut):
    """Print what `cut(folder)` found as JSON: `make chaos-NAME`. Return the exit code, 1 if an outcome has faults."""
    if reason := missing():
        print(f"make chaos-{name}: {reason}", file=sys.stderr)
        return 1
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"ropeway-{name}-") as folder:
        outcomes = list(cut(Path(folder)))
    good = not any(outcome.faults for outcome in outcomes)
    programs = [vars(outcome) for outcome in outcomes]
    print(json.dumps({"chaos": name, "ok": good, "seconds": round(time.monotonic() - began), "programs": programs}))
    return 0 if good else 1


def read_record(path):
    """Yield the operations of a record."""
    with path.open("rb") as file:
        while True:
            try:
                yield pickle.load(file)  # noqa: S301 - written by this program
            except EOFError:
                return
