"""The registry: immutable, content-addressed versions; aliases that move by compare-and-set; pulls that are verified.

Callers use `Registry`. Layout in `layout.py`, rules of what may be in a package in `rules.py`, a version's identity in
`core.py`, logs in `log.py`.
"""

from ropeway.registry.aliases import ANY, Alias, Anything, Promotion
from ropeway.registry.core import Facts, package_digest
from ropeway.registry.facade import Artifact, Registry
from ropeway.registry.log import Event
from ropeway.registry.publishing import Published
from ropeway.registry.pulling import Pulled, Verified
from ropeway.registry.versions import PRODUCTION, Decision, Provenance, Version

__all__ = [
    "ANY",
    "PRODUCTION",
    "Alias",
    "Anything",
    "Artifact",
    "Decision",
    "Event",
    "Facts",
    "Promotion",
    "Provenance",
    "Published",
    "Pulled",
    "Registry",
    "Verified",
    "Version",
    "package_digest",
]
