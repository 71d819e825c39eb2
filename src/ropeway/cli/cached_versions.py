"""Versions kept on this machine once they were pulled, for commands that use one rather than deliver it."""

import os
from pathlib import Path

from ropeway.cli.registry_options import progress_bar
from ropeway.registry import Pulled, Version


def cache_folder() -> Path:
    """Return where pulled versions stay: `ROPEWAY_CACHE`, else `ropeway` in the user's cache folder."""
    if stated := os.environ.get("ROPEWAY_CACHE"):
        return Path(stated).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "ropeway"


def pull_cached(version: Version) -> Pulled:
    """Return a version's folder in the cache, pulled if it is not there; its bytes are hashed either way.

    Raises:
        RegistryError: It is withdrawn.
        DataError: The registry's bytes, or the cache's, are not the version's.
    """
    target = cache_folder() / "versions" / version.name / version.digest
    with progress_bar(version.store, f"pulling {version.reference}", version.core.total_bytes):
        return version.pull(target)
