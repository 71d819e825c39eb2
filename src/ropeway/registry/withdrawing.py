"""Withdraw a version: a tombstone says that nobody may use it any more, by whom and why. It is for ever."""

from datetime import UTC, datetime

from ropeway.registry.aliases import check_words, list_aliases
from ropeway.registry.core import load_core
from ropeway.registry.layout import tombstone_key
from ropeway.registry.log import event_document
from ropeway.runtime.errors import RegistryError
from ropeway.storage import Store


def withdraw(store: Store, name: str, digest: str, *, by: str, reason: str) -> bool:
    """Withdraw a version; return False when it was withdrawn before.

    Raises:
        RegistryError: No such version, or an alias points to it.
    """
    check_words("by", by)
    check_words("reason", reason)
    load_core(store, name, digest)
    if pointing := _pointing(store, name, digest):
        raise RegistryError(
            f"{name} {digest[:12]}…: {', '.join(pointing)} points there; it was not withdrawn. Promote another version "
            "or roll back first"
        )
    at = datetime.now(UTC).isoformat(timespec="seconds")
    tombstone = event_document({"digest": digest, "by": by, "reason": reason, "at": at})
    created = store.put_if_absent(tombstone_key(name, digest), tombstone)
    if pointing := _pointing(store, name, digest):  # a promoter that had looked before the tombstone stood
        raise RegistryError(
            f"{name} {digest[:12]}… is withdrawn, and {', '.join(pointing)} was moved there meanwhile. Roll that back: "
            "pulling it is refused"
        )
    return created


def _pointing(store: Store, name: str, digest: str) -> list[str]:
    return [f"{name}@{alias}" for alias, there in list_aliases(store, name).items() if there == digest]
