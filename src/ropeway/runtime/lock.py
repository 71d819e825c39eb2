"""The workspace lock: one run at a time in a workspace; the message names the holder, and a crash needs no cleanup.

The lock is a `flock` on `.work/lock`, so the kernel releases it when the last process closes the file. The flow passes
its open file to the supervisors of its stages (`HeldLock.handle`), so the lock is held until the last rank has exited,
even if the flow is killed.
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
from ropeway.runtime.workspace import Workspace

_HELD = "ROPEWAY_LOCK_HELD"  # pid of the ancestor that holds the lock; its stages do not acquire it again


@dataclass(frozen=True, slots=True)
class HeldLock:
    """A lock that this process, or an ancestor of it, holds.

    Attributes:
        handle: The open file; pass it (`pass_fds`) to processes that must keep the lock. None if an ancestor holds it.
        environment: Variables that let child processes use the workspace.
    """

    handle: int | None
    environment: dict[str, str]


@contextmanager
def workspace_lock(root: Path, *, command: str, profile: str = "") -> Iterator[HeldLock]:
    """Acquire the lock of the workspace at `root`, unless an ancestor of this process holds it.

    Args:
        root: The workspace.
        command: Name of the holder in the error message of another process, e.g. "ropeway run".
        profile: Profile of the run, for the same message.

    Raises:
        TemporaryError: Another process, named in the message, holds it; wait for it or stop it.
        ConfigError: The file system does not support locks; move the workspace to a local disk.
    """
    path = _lock_path(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if ancestor := _ancestor_holding(handle):
            yield HeldLock(None, {_HELD: str(ancestor)})
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise TemporaryError(f"{root}: {_describe(_read_holder(handle))}") from None
            raise ConfigError(
                f"{path}: the file system does not support locks ({error.strerror}). Move the workspace to a local disk"
            ) from None
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


@dataclass(frozen=True, slots=True)
class LockHolder:
    """The process that acquired a workspace lock last.

    Attributes:
        command: What it runs, e.g. "ropeway run".
        profile: Profile of the run; empty if the command has none.
        since: ISO time at which it acquired the lock.
        holds: Whether it still holds the lock. If not, it released the lock or was killed; after a kill, processes that
            it started may hold the lock until they have saved.
    """

    pid: int
    command: str
    profile: str
    since: str
    holds: bool


def read_last_holder(root: Path) -> LockHolder | None:
    """Return who acquired the workspace lock last, None if nobody did; touches no lock and writes nothing."""
    path = _lock_path(root)
    try:
        record = json_mapping(path.read_bytes())
    except OSError:
        return None
    pid = record.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return None
    command, profile, since = (str(record.get(key) or "") for key in ("command", "profile", "since"))
    return LockHolder(pid, command, profile, since, holds=_has_open(pid, path))


def _has_open(pid: int, path: Path) -> bool:
    """Return whether a process has the lock file open, which is so only while it holds or acquires the lock."""
    try:
        return any(Path(file.path) == path.resolve() for file in psutil.Process(pid).open_files())
    except psutil.AccessDenied:  # another user's process
        return bool(psutil.pid_exists(pid))
    except psutil.NoSuchProcess:
        return False


def _lock_path(root: Path) -> Path:
    return Workspace(root, "").work / "lock"


def is_held(root: Path) -> bool:
    """Return whether a process holds the lock of the workspace at `root`."""
    try:
        handle = os.open(root / ".work" / "lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _ancestor_holding(handle: int) -> int | None:
    """Return the pid in the environment if it is a living ancestor and matches the pid in the lock file."""
    with suppress(ValueError):
        pid = int(os.environ.get(_HELD, ""))
        if pid == _read_holder(handle).get("pid") and pid in {above.pid for above in psutil.Process().parents()}:
            return pid
    return None


def _read_holder(handle: int) -> Json:
    """Return the record that the holder wrote; empty if it has not written yet."""
    return json_mapping(os.pread(handle, 4096, 0))


def _describe(holder: Json) -> str:
    if not holder:
        return "the workspace is held by another process. Wait for it or stop it"
    pid, command, since = holder.get("pid"), holder.get("command"), str(holder.get("since"))
    run = f" of profile {holder['profile']}" if holder.get("profile") else ""
    who = f"pid {pid}, `{command}`{run}, since {since[11:16]}"
    if isinstance(pid, int) and not psutil.pid_exists(pid):
        return f"the workspace was held by {who}; it was killed and its stages are still saving. Run again in a minute"
    return f"the workspace is held by {who}. Wait for it or stop it, then run again"
