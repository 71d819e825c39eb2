"""Where the files of a `files` source are: in the workspace, or behind https:// and s3:// addresses."""

from collections.abc import Sequence
from pathlib import Path

from ropeway.runtime.errors import ConfigError
from ropeway.stages.fetch import objects, web
from ropeway.stages.fetch.files import check_format
from ropeway.stages.fetch.local import find_files
from ropeway.stages.fetch.remote import Remote
from ropeway.stages.fetch.splits import check_splits


def find_places(paths: list[str], root: Path, splits: Sequence[str] = ()) -> dict[str, Path | Remote]:
    """Return the files that paths, globs and addresses name, by name, sorted; servers are asked, nothing is fetched.

    Args:
        paths: As in params.
        root: Where relative ones start.
        splits: Which splits a pattern may read together.

    Raises:
        ConfigError: One names nothing, what cannot be read, or files of several splits.
        TemporaryError: A server does not answer.
    """
    found: dict[str, Path | Remote] = dict(find_files([path for path in paths if "://" not in path], root, splits))
    for address in (path for path in paths if "://" in path):
        scheme = address.partition("://")[0]
        if scheme not in ("http", "https", "s3"):
            raise ConfigError(f"sources: '{scheme}://…' is no address that is fetched; known are https:// and s3://")
        remotes = objects.look_up(address) if scheme == "s3" else [web.look_up(address)]
        check_splits(address, [remote.name.partition("?")[0] for remote in remotes], splits)
        for remote in remotes:
            check_format(remote.name.partition("?")[0])
            found[remote.name] = remote
    return dict(sorted(found.items()))
