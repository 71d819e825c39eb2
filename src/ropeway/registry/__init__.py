"""Room: registry. Immutable, content-addressed versions; aliases that move by compare-and-set; pulls that are verified.

Layout in `layout.py`, rules of what may be in a package in `rules.py`, a version's identity in `core.py`.
"""

from ropeway.registry.aliases import (
    ANY,
    Anything,
    Promotion,
    alias_history,
    list_aliases,
    promote,
    read_alias,
    resolve,
    rollback,
)
from ropeway.registry.collecting import collect, find_garbage
from ropeway.registry.core import load_core, package_digest
from ropeway.registry.publishing import Published, check_publishing, find_number, has_version, is_withdrawn, publish
from ropeway.registry.pulling import Pulled, Verified, pull, verify, verify_folder
from ropeway.registry.reviews import PRODUCTION, find_dirt, list_reviews, record_review, vouch_clean
from ropeway.registry.withdrawing import withdraw

__all__ = [
    "ANY",
    "PRODUCTION",
    "Anything",
    "Promotion",
    "Published",
    "Pulled",
    "Verified",
    "alias_history",
    "check_publishing",
    "collect",
    "find_dirt",
    "find_garbage",
    "find_number",
    "has_version",
    "is_withdrawn",
    "list_aliases",
    "list_reviews",
    "load_core",
    "package_digest",
    "promote",
    "publish",
    "pull",
    "read_alias",
    "record_review",
    "resolve",
    "rollback",
    "verify",
    "verify_folder",
    "vouch_clean",
    "withdraw",
]
