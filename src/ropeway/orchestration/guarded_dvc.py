"""DVC's command line with more checks: `python -m ropeway.orchestration.guarded_dvc COMMAND…`.

What DVC (3.67.1) does with what a writer of the DVC remote can make, without them:
- It writes each file of a folder where the folder's listing says, with `../` in it e.g. over the workspace's code.
- A digest with a path in it, also in a dvc.lock, makes it remove the file at that path.
- It writes each object of the run-cache where its key says; keys of S3 can have `../`.
- It restores the outputs that an entry of the run-cache names, also those that the stage does not have.

And its state, which has pickles, lies below a folder that every user of the machine can write (`keep_state_private`).
"""

import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropeway.runtime.errors import ConfigError

if TYPE_CHECKING:
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.meta import Meta

MODULE = "ropeway.orchestration.guarded_dvc"
COMMAND = (sys.executable, "-m", MODULE)
STATE = "DVC_SITE_CACHE_DIR"  # DVC's own variable
STATES = Path("/var/tmp")  # noqa: S108 - where DVC has its own; sticky, so nobody can replace another user's folder
_DIGEST = re.compile(r"[0-9A-Za-z]*(\.dir)?(\.unpacked)?")
_RUN = re.compile(r"runs/[0-9a-f]{2}/[0-9a-f]{64}/[0-9a-f]{64}")  # an entry of the run-cache
_INSIDE = re.compile(r"runs/(?!.*(?:^|/)\.\.?(?:/|$)).*")  # e.g. what a killed DVC left


def refuse_outside_names() -> None:
    """Make DVC refuse, in this process, names outside of their folder, digests that are paths, and foreign outputs."""
    from dvc.exceptions import DvcException
    from dvc_data.hashfile.db.local import LocalHashFileDB
    from dvc_data.hashfile.tree import Tree
    from dvc_objects.db import ObjectDB

    add = Tree.add
    if hasattr(add, "__wrapped__"):
        return

    @wraps(add)
    def add_inside(self: Tree, key: tuple[str, ...], meta: "Meta | None", oid: "HashInfo | None") -> None:
        if not key or any(part in ("", ".", "..") or "\0" in part for part in key):
            raise DvcException(
                f"the listing of a folder names {'/'.join(key)!r}, which is outside of the folder. Its maker can "
                "write the DVC remote or the cache: find out who did, and remove the listing"
            )
        add(self, key, meta, oid)

    Tree.add = add_inside  # type: ignore[method-assign]
    for kind in (ObjectDB, LocalHashFileDB):
        _check_digests(kind, kind.oid_to_path)
    _check_run_cache()


def keep_state_private() -> None:
    """Let DVC keep its state in a folder of this user alone, unless the environment names another.

    Raises:
        ConfigError: Another user made that folder, or can write it.
    """
    if os.environ.get(STATE):
        return
    folder = STATES / f"ropeway-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{folder}: expected a folder of this user that nobody else may read or write, for the state of DVC. Find "
            f"out who made it and remove it, or set {STATE} to a folder of your own"
        )
    os.environ[STATE] = str(folder)


def _check_run_cache() -> None:
    """Let the run-cache of DVC refuse keys that leave it, and entries with outputs that their stage does not have."""
    from dvc.exceptions import DvcException
    from dvc.stage.cache import StageCache

    transfer, load = StageCache.transfer, StageCache._load  # noqa: SLF001 - the one place that reads an entry

    @wraps(transfer)
    def transfer_inside(self: Any, from_odb: Any, to_odb: Any, force: bool = True) -> Any:  # noqa: ANN401, FBT001, FBT002
        system = from_odb.fs
        find = system.find

        def find_entries(path: str) -> Iterator[str]:
            for name in find(path):
                key = system.as_posix(system.relpath(name, from_odb.path))
                if _RUN.fullmatch(key):
                    yield name
                elif not _INSIDE.fullmatch(key):
                    raise DvcException(
                        f"the run-cache has an object {name!r}, which would be written outside of it. Its maker can "
                        "write the DVC remote: find out who did, and remove the object"
                    )

        system.find = find_entries
        try:
            return transfer(self, from_odb, to_odb, force)
        finally:
            system.find = find

    @wraps(load)
    def load_own(self: Any, stage: Any) -> Any:  # noqa: ANN401 - classes of DVC
        entry = load(self, stage)
        if entry:
            own = {str(out.def_path) for out in stage.outs}
            if foreign := sorted({str(out["path"]) for out in entry.get("outs", ())} - own):
                raise DvcException(
                    f"the run-cache has an entry of {stage.addressing} with outputs that this stage does not have "
                    f"({', '.join(foreign)}). Its maker can write the DVC remote or the cache: find out who did, and "
                    "remove the entry"
                )
        return entry

    StageCache.transfer = transfer_inside  # type: ignore[method-assign]
    StageCache._load = load_own  # type: ignore[method-assign] # noqa: SLF001


def _check_digests(kind: Any, find: Callable[[Any, str], str]) -> None:  # noqa: ANN401 - classes of DVC
    """Let a store of DVC refuse a digest with a path in it: DVC would remove the file there as damaged."""
    from dvc.exceptions import DvcException

    @wraps(find)
    def find_object(self: object, oid: str) -> str:
        if not _DIGEST.fullmatch(oid):
            raise DvcException(
                f"{oid!r} is not the digest of an object. The listing, dvc.lock or run-cache that states it "
                "was made by another program: find out by whom, and remove it"
            )
        return find(self, oid)

    kind.oid_to_path = find_object


def main() -> None:
    """Run DVC."""
    keep_state_private()
    from dvc.cli import main as run

    refuse_outside_names()
    sys.argv[0] = "dvc"
    sys.exit(run())


if __name__ == "__main__":
    main()
