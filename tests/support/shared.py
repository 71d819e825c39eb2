"""What several test files, and both processes of `make test`, begin with: built once for the session, then copied."""

import fcntl
import os
import shutil


def build_once(tmp_path_factory, name, build):
    """Return a folder that `build(folder)` filled once in this session; copy it before changing it.

    Workers of pytest-xdist share the folder: the first to ask builds it, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    done = folder.with_name(f"{name}.done")
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker whose attempt failed
            folder.mkdir()
            build(folder)
            done.touch()
    return folder
