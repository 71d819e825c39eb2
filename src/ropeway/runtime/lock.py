"""The workspace lock: one run at a time in a workspace, its holder named, nothing to clean up after a crash.

It is a `flock` on `.work/lock`, so it dies with the last process that holds the file open. The flow hands its open
file on to the supervisors of its stages (`HeldLock.handle`), so the lock lasts until the last rank has ended even when
the flow itself was killed.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from ropeway.runtime.errors import ConfigError, TemporaryError
from ropeway.runtime.manifest import Json, json_mapping

_HELD = "ROPEWAY_LOCK_HELD"  # pid of the ancestor that holds the lock: its stages enter without taking it


@dataclass(frozen=True, slots=True)
class HeldLock:
    """A lock that this process, or an ancestor of it, holds.

    Attributes:
        handle: The open file, to be passed on (`pass_fds`) to what must keep the lock alive; None under an ancestor.
        environment: What children need in theirs to enter.
    """

    handle: int | None
    environment: dict[str, str]


@contextmanager
def workspace_lock(root: Path, *, command: str, profile: str = "") -> Iterator[HeldLock]:
    """Hold the workspace at `root`, or enter under an ancestor that holds it.

    `command` is what the holder is called when another process is turned away, e.g. "ropeway run".

    Raises:
        TemporaryError: Another process holds it; the message names it.
        ConfigError: The file system cannot lock.
    """
    path = root / ".work" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if above := _ancestor_holding(handle):
            yield HeldLock(None, {_HELD: str(above)})
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise TemporaryError(f"{root}: {_describe(_read_holder(handle))}") from None
            raise ConfigError(f"{path}: cannot be locked here ({error.strerror}); move to a local disk") from None
        holder = {
            "pid": os.getpid(),
            "command": command,
            "since": datetime.now().astimezone().isoformat(),
            "profile": profile,
        }
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(holder).encode(), 0)
        yield HeldLock(handle, {_HELD: str(os.getpid())})
    finally:
        os.close(handle)


def _ancestor_holding(handle: int) -> int | None:
    """Return the pid in the environment if it is a living ancestor and the one written in the lock file."""
    with suppress(ValueError):
        pid = int(os.environ.get(_HELD, ""))
        if pid == _read_holder(handle).get("pid") and pid in {above.pid for above in psutil.Process().parents()}:
            return pid
    return None


def _read_holder(handle: int) -> Json:
    """Return what the holder wrote; empty when it has not written yet."""
    return json_mapping(os.pread(handle, 4096, 0))


def _describe(holder: Json) -> str:
    if not holder:
        return "the workspace is held by another process; wait for it or stop it"
    pid, command, since = holder.get("pid"), holder.get("command"), str(holder.get("since"))
    run = f" of profile {holder['profile']}" if holder.get("profile") else ""
    who = f"pid {pid}, `{command}`{run}, since {since[11:16]}"
    if isinstance(pid, int) and not psutil.pid_exists(pid):
        return (
            f"the workspace was held by {who}; it was killed and its stages are still saving their work. Wait a minute"
        )
    return f"the workspace is held by {who}; wait for it or stop it"
