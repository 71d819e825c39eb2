"""Disk and saving: what a run will need, said before step 1, and what a full disk leaves behind."""

import errno
import os
import shutil
from pathlib import Path

from ropeway.runtime.errors import ConfigError, RopewayError, TemporaryError, is_disk_full
from ropeway.stages.train import checkpoints

_LITTLE_BYTES = 64 << 20  # of logs, manifests and files of other programs
_GIB = 2**30


def check_disk(folder: Path, *, one_bytes: int, keep: int, export_bytes: int, free_bytes: int | None = None) -> str:
    """Return what the run needs in words.

    Rotation removes the oldest checkpoint after the newest is whole, so there is one more than `keep` for a moment.

    Raises:
        ConfigError: It is not there.
    """
    free = shutil.disk_usage(folder).free if free_bytes is None else free_bytes
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    needed = max(0, one_bytes * (keep + 1) - there) + export_bytes + _LITTLE_BYTES
    said = (
        f"({keep} + 1) checkpoints of {_say(one_bytes)}, {_say(there)} of it there, and a model of "
        f"{_say(export_bytes)}: {_say(needed)} more, {_say(free)} free"
    )
    if needed > free:
        raise ConfigError(
            f"{folder}: not enough disk for this run. {said}. Free {_say(needed - free)}, lower save_total_limit, or "
            "put .checkpoints on a larger disk (a link will do)"
        )
    return said


def explain_failed_save(error: Exception, root: Path, step: int) -> RopewayError | None:
    """Return what a failed save means when the disk was the reason; None when it was not.

    A full disk is temporary: once there is room the same command resumes, and while there is none `check_disk` refuses
    it at once. torch's writer hides ENOSPC behind a RuntimeError, so how much is free is asked too.
    """
    code = error.errno if isinstance(error, OSError) else None
    free = shutil.disk_usage(root).free
    full = (isinstance(error, OSError) and is_disk_full(error)) or free < _LITTLE_BYTES
    if not full and code is None:
        return None
    kept = [path for number, path in checkpoints.list_steps(root) if number < step]
    stands = f"{kept[-1]} is untouched" if kept else "no earlier checkpoint was there"
    what = "the disk is full" if full else os.strerror(code or 0)
    kind = ConfigError if code in (errno.EACCES, errno.EPERM, errno.EROFS) else TemporaryError
    return kind(
        f"{root}: saving step {step} failed: {what} ({_say(free)} free): {error}. {stands}; the same command resumes "
        "once this is fixed"
    )


def _say(count: int) -> str:
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB else f"{count / 2**20:,.1f} MiB"
