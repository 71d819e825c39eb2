"""The registry: immutable, content-addressed versions; aliases that move by compare-and-set; pulls that are verified.

Callers use `Registry`. Layout in `layout.py`, rules of what may be in a package in `rules.py`, a version's identity in
`core.py`, logs in `log.py`.
"""

from ropeway.registry.aliases import ANY, AnyDigest, Promotion
from ropeway.registry.facade import Artifact, Registry
from ropeway.registry.pulling import PullResult
from ropeway.registry.versions import PRODUCTION, Decision, Provenance, Version

__all__ = [
    "ANY",
    "PRODUCTION",
    "AnyDigest",
    "Artifact",
    "Decision",
    "Promotion",
    "Provenance",
    "PullResult",
    "Registry",
    "Version",
]
