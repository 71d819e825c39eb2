"""The model registry: immutable, content-addressed versions, aliases moved by compare-and-set, verified pulls.

Callers use `Registry`. `layout.py` defines the keys in the store, `rules.py` which files a package may contain,
`version_manifest.py` the identity of a version, `log.py` the append-only event logs.
"""

from ropeway.registry.aliases import ANY, AnyDigest, Promotion
from ropeway.registry.facade import Artifact, Registry
from ropeway.registry.log import LogPage
from ropeway.registry.pulling import PullResult
from ropeway.registry.versions import PRODUCTION, Decision, Provenance, Version

__all__ = [
    "ANY",
    "PRODUCTION",
    "AnyDigest",
    "Artifact",
    "Decision",
    "LogPage",
    "Promotion",
    "Provenance",
    "PullResult",
    "Registry",
    "Version",
]
