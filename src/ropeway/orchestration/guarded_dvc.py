"""DVC's command line with one more check: `python -m ropeway.orchestration.guarded_dvc COMMAND…`.

DVC (3.67.1) writes each file of a folder where the folder's listing says. A listing with `../` in it, which a writer of
the DVC remote can make, would be written outside of the output, e.g. over the workspace's code. A digest with a path in
it, also in a dvc.lock, makes DVC remove the file at that path.
"""

import re
import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.meta import Meta

MODULE = "ropeway.orchestration.guarded_dvc"
COMMAND = (sys.executable, "-m", MODULE)
_DIGEST = re.compile(r"[0-9A-Za-z]*(\.dir)?(\.unpacked)?")


def refuse_outside_names() -> None:
    """Make DVC refuse, in this process, names outside of their folder and digests that are paths."""
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
    from dvc.cli import main as run

    refuse_outside_names()
    sys.argv[0] = "dvc"
    sys.exit(run())


if __name__ == "__main__":
    main()
