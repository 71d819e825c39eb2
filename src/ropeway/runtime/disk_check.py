"""What a failed process shows about the disk: by then its exit record, and its log, could not be written either."""

import errno
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ropeway.runtime.errors import RopewayError, disk_error

_NUMBER = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")
# The texts of libc and of SQLite 3.40, which gives no number.
_TEXTS = {
    "No space left on device": errno.ENOSPC,
    "database or disk is full": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "Read-only file system": errno.EROFS,
    "attempt to write a readonly database": errno.EROFS,
    "Input/output error": errno.EIO,
    "disk I/O error": errno.EIO,
}


def find_disk_error(folder: Path, lines: Iterable[str] = ()) -> RopewayError | None:
    """Return the error that a disk shows now, or that a process printed; None if there is none.

    Args:
        folder: An existing folder on the disk; a small file is written, read and removed in it.
        lines: The last lines of a process that failed, in which an error of the disk is looked for.
    """
    probe = folder / f".disk-{os.getpid()}.partial"
    try:
        with probe.open("wb") as file:
            file.write(b"x" * 4096)
            os.fsync(file.fileno())
        probe.read_bytes()
    except OSError as error:
        if told := disk_error(error):
            return told
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    for line in lines:
        if (number := _number_in(line)) and (told := disk_error(OSError(number, os.strerror(number), str(folder)))):
            return told
    return None


def _number_in(line: str) -> int | None:
    """Return the number of the operating system's error that a line states.

    >>> _number_in("ERROR: unexpected error - [Errno 28] No space left on device")
    28
    >>> _number_in("sqlite3.OperationalError: database or disk is full")
    28
    """
    if found := _NUMBER.search(line):
        return int(found[1] or found[2])
    return next((number for text, number in _TEXTS.items() if text in line), None)
