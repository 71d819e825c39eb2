"""Versions kept on this machine once they were pulled, for commands that use one rather than deliver it."""

import os
from pathlib import Path

from ropeway.cli.registry_options import progress_bar
from ropeway.registry.aliases import resolve
from ropeway.registry.core import load_core
from ropeway.registry.layout import read_reference
from ropeway.registry.pulling import Pulled, pull
from ropeway.storage import Store


def cache_folder() -> Path:
    """Return where pulled versions stay: `ROPEWAY_CACHE`, else `ropeway` in the user's cache folder."""
    if stated := os.environ.get("ROPEWAY_CACHE"):
        return Path(stated).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "ropeway"


def pull_cached(store: Store, reference: str) -> Pulled:
    """Return a version's folder in the cache, pulled if it is not there; its bytes are hashed either way.

    Raises:
        RegistryError: As in `pull`: no such version, or it is withdrawn.
        DataError: The registry's bytes, or the cache's, are not the version's.
    """
    name, digest = read_reference(reference).name, resolve(store, reference)
    target = cache_folder() / "versions" / name / digest
    with progress_bar(store, f"pulling {reference}", load_core(store, name, digest).total_bytes):
        return pull(store, f"{name}@{digest}", target)
