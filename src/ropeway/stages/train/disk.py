"""Disk space: the check before step 1, and the error of a save that failed."""

import errno
import os
import shutil
from pathlib import Path

from ropeway.runtime.errors import ConfigError, RopewayError, TemporaryError, is_disk_full
from ropeway.stages.train import checkpoints

_RESERVE_BYTES = 64 << 20  # for logs, manifests and files of other programs
_GIB = 2**30


class DiskSpaceError(ConfigError):
    """The disk is too small for the checkpoints of this run; rank 0 raises it, and every other rank with it."""


def check_disk(
    folder: Path, *, checkpoint_bytes: int, keep: int, export_bytes: int, free_bytes: int | None = None
) -> str:
    """Return needed and free disk space as text.

    Rotation removes the oldest checkpoint only once the newest is complete, so `keep` + 1 exist for a moment.

    Raises:
        DiskSpaceError: There is not enough free space.
    """
    free = shutil.disk_usage(folder).free if free_bytes is None else free_bytes
    existing = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    needed = max(0, checkpoint_bytes * (keep + 1) - existing) + export_bytes + _RESERVE_BYTES
    summary = (
        f"({keep} + 1) checkpoints of {_format_bytes(checkpoint_bytes)}, {_format_bytes(existing)} of them on disk, "
        f"and a model of {_format_bytes(export_bytes)}: {_format_bytes(needed)} needed, {_format_bytes(free)} free"
    )
    if needed > free:
        raise DiskSpaceError(
            f"{folder}: not enough disk space for this run. {summary}. Free {_format_bytes(needed - free)}, lower "
            "save_total_limit, or put .checkpoints on a larger disk (a symbolic link works)"
        )
    return summary


def explain_failed_save(error: Exception, root: Path, step: int) -> RopewayError | None:
    """Return the error to raise for a failed save if the disk was the cause; None if it was not.

    A full disk is temporary: once there is free space the same command resumes; until then `check_disk` refuses it.
    torch's writer hides ENOSPC behind a RuntimeError, so the free space is checked too.
    """
    code = error.errno if isinstance(error, OSError) else None
    free = shutil.disk_usage(root).free
    full = (isinstance(error, OSError) and is_disk_full(error)) or free < _RESERVE_BYTES
    if not full and code is None:
        return None
    kept = [path for number, path in checkpoints.list_steps(root) if number < step]
    intact = f"{kept[-1]} is intact" if kept else "there is no earlier checkpoint"
    what = "the disk is full" if full else os.strerror(code or 0)
    kind = ConfigError if code in (errno.EACCES, errno.EPERM, errno.EROFS) else TemporaryError
    return kind(
        f"{root}: saving step {step} failed: {what} ({_format_bytes(free)} free): {error}. {intact}; once this is "
        "fixed, the same command resumes"
    )


def _format_bytes(count: int) -> str:
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB else f"{count / 2**20:,.1f} MiB"
