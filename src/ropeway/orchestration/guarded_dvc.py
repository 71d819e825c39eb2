"""DVC's command line with one more check: `python -m ropeway.orchestration.guarded_dvc COMMAND…`.

DVC (3.67.1) writes each file of a folder where the folder's listing says. A listing with `../` in it, which a writer of
the DVC remote can make, would be written outside of the output, e.g. over the workspace's code.
"""

import sys
from functools import wraps
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.meta import Meta

MODULE = "ropeway.orchestration.guarded_dvc"
COMMAND = (sys.executable, "-m", MODULE)


def refuse_outside_names() -> None:
    """Make DVC refuse, in this process, a listing that names a file outside of its folder."""
    from dvc.exceptions import DvcException
    from dvc_data.hashfile.tree import Tree

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


def main() -> None:
    """Run DVC."""
    from dvc.cli import main as run

    refuse_outside_names()
    sys.argv[0] = "dvc"
    sys.exit(run())


if __name__ == "__main__":
    main()
