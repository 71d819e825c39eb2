"""A worker's clones: one for each repository, kept between runs with its DVC cache and checkpoints.

`ROPEWAY_WORKER_HOME` is their folder. Two runs at once on one machine have two clones, which share one DVC cache.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from ropeway.orchestration.remote.request import StageRequest, check_repository, run_git
from ropeway.runtime.errors import ConfigError
from ropeway.runtime.git import ask_git

HOME = "ROPEWAY_WORKER_HOME"
_CONFIG = """[cache]
    dir = {cache}
"""


@contextmanager
def open_clone(request: StageRequest) -> Iterator[Path]:
    """Hold a clone of the request's repository at its commit; yield the workspace in it.

    Raises:
        ConfigError: This worker may not clone the repository or cannot, it does not have the commit, or the folder is
            no workspace.
    """
    check_repository(request.repository, os.environ)
    digest = hashlib.sha256(request.repository.encode()).hexdigest()
    home = _home() / digest[:16]
    home.mkdir(parents=True, exist_ok=True)
    for number in count():
        with (home / f"clone-{number}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield _check_out(home / f"clone-{number}", home / "cache", request)
            return


def _home() -> Path:
    stated = os.environ.get(HOME)
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(stated) if stated else (Path(cache) if cache else Path.home() / ".cache") / "ropeway" / "worker"


def _check_out(clone: Path, cache: Path, request: StageRequest) -> Path:
    if not clone.is_dir():
        partial = clone.with_name(f"{clone.name}.partial")  # a clone that was killed must not be taken for a whole one
        shutil.rmtree(partial, ignore_errors=True)
        run_git("clone", "--quiet", "--no-checkout", "--", request.repository, str(partial))
        partial.rename(clone)
    if ask_git(clone, "cat-file", "-e", f"{request.commit}^{{commit}}") is None:
        run_git("fetch", "--quiet", "--tags", "origin", cwd=clone)
    if ask_git(clone, "cat-file", "-e", f"{request.commit}^{{commit}}") is None:
        raise ConfigError(
            f"{request.repository} does not have commit {request.commit[:12]}. Push it there: workers run at the "
            "commit of the calling run"
        )
    for lock in (clone / ".git").glob("*.lock"):  # of a git that was killed; this process holds the clone
        lock.unlink(missing_ok=True)
    run_git("-c", "advice.detachedHead=false", "checkout", "--quiet", "--force", "--detach", request.commit, cwd=clone)
    run_git(
        "clean", "--quiet", "--force", "-d", "--exclude=dvc.lock", cwd=clone
    )  # what git ignores stays: runs, checkpoints
    root = clone / request.folder
    if not ((root / "params.yaml").is_file() and (root / ".dvc").is_dir()):
        raise ConfigError(f"{request.repository} at {request.commit[:12]} has no {request.folder}params.yaml with .dvc")
    private = root / ".dvc" / "config.local"
    if not private.exists():  # a person may have put a remote's credentials there
        private.write_text(_CONFIG.format(cache=cache), encoding="utf-8")
    return root
